"""The words the layers share: the task of a head, and what a teacher says about a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from torch import Tensor
from torch.nn import functional

from hf_distill.features import Feature


class Task(str, Enum):
    """What a model's head predicts. The values are the names users meet in errors and in `compute_metrics_for`.

    `EMBEDDING` is that of a model without a head: it has no logits, and only what is inside it can be compared.
    """

    SEQUENCE_CLASSIFICATION = "sequence_classification"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"
    MULTIPLE_CHOICE = "multiple_choice"
    MASKED_LM = "masked_lm"
    CAUSAL_LM = "causal_lm"
    SEQ2SEQ_LM = "seq2seq_lm"
    CTC = "ctc"
    EMBEDDING = "embedding"

    def __str__(self) -> str:
        return self.value

    @property
    def one_item_per_row(self) -> bool:
        """Whether a row (sequence, image, clip, set of choices) is one item; else every position is one."""
        return self in _ROW_TASKS

    @property
    def is_language_model(self) -> bool:
        """Whether the classes are a tokenizer's vocabulary."""
        return self in _LANGUAGE_MODELS

    @property
    def has_named_labels(self) -> bool:
        """Whether the classes are those of `config.id2label`."""
        return self in (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)


_ROW_TASKS = frozenset({Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE, Task.QUESTION_ANSWERING, Task.EMBEDDING})
_LANGUAGE_MODELS = frozenset({Task.MASKED_LM, Task.CAUSAL_LM, Task.SEQ2SEQ_LM, Task.CTC})


@dataclass(frozen=True)
class LogitFactors:
    """Logits as what they are made of: softcap((hidden @ weight^T + bias) * scale).

    Attributes:
        hidden: (..., width), what the head reads.
        weight: (classes, width).
        bias: None or (classes,).
        scale: multiplies the products, as in Cohere and Granite.
        softcap: None or c in c * tanh(logits / c), as in Gemma 2.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def dense(self) -> Tensor:
        """(..., classes) the logits."""
        logits = functional.linear(self.hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about one batch, without a graph.

    Attributes:
        logits: one tensor (batch, classes) or (batch, length, classes); for question answering two of
            (batch, length): the start and the end scores; of a model without a head none.
        overwritable: whether nobody else holds these tensors, so that a loss may write its gradient over them.
        features: what was recorded inside the teacher, by its source: hidden states and module outputs as tensors,
            attention layers as `models.capture.AttentionRecord`.
        factors: in place of the logits, what they are made of, where that was asked for.
    """

    logits: tuple[Tensor, ...]
    overwritable: bool = False
    features: Mapping[Feature, Any] = field(default_factory=dict)
    factors: LogitFactors | None = None

    def formed(self) -> "TeacherOutput":
        """The same with its logits."""
        if self.factors is None:
            return self
        # Autocast may have left what the head reads in another dtype than its weight.
        hidden = self.factors.hidden.to(self.factors.weight.dtype)
        return replace(self, logits=(replace(self.factors, hidden=hidden).dense(),), factors=None)


@dataclass(frozen=True)
class Scores:
    """Scores between all pairs of positions, as factors: softcap(left @ right^T * scale) + bias.

    Attributes:
        left: (batch, heads, queries, width).
        right: (batch, heads, keys, width); heads as in `left`, or 1.
        scale: multiplies the products.
        bias: None or finite, broadcastable to (batch, heads, queries, keys), such as T5's position bias.
        softcap: None or c in c * tanh(products / c), as in Gemma 2.
        causal: whether a position only attends to itself and those before it.
        sinks: None or (heads,), a score of one more key that takes probability and gives nothing (GPT-OSS).
        allowed: None or bool, broadcastable to (batch, heads, queries, keys): what the model itself attends to.
    """

    left: Tensor
    right: Tensor
    scale: float
    bias: Tensor | None = None
    softcap: float | None = None
    causal: bool = False
    sinks: Tensor | None = None
    allowed: Tensor | None = None

    @property
    def heads(self) -> int:
        """How many maps of scores there are."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """(batch, heads, queries, keys), nothing masked."""
        scores = self.left @ self.right.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        return scores if self.bias is None else scores + self.bias


def read_logits(task: Task, outputs: Any) -> tuple[Tensor, ...]:
    """The logits in a model's output, as in `TeacherOutput.logits`; none of a model without a head.

    Raises:
        ValueError: the output holds none, as with a fused loss that never forms them.
    """
    if task is Task.EMBEDDING:
        return ()
    names = ("start_logits", "end_logits") if task is Task.QUESTION_ANSWERING else ("logits",)
    values = [outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None) for name in names]
    logits = tuple(value for value in values if value is not None)
    if len(logits) < len(names):
        raise ValueError(
            f"The model's output holds no {' and '.join(names)} (it holds {list(outputs)}), which distillation of "
            f"{task} compares. Turn off fused losses (use_liger_kernel) and keep return_dict=True."
        )
    return logits
