"""The words the layers share: the task of a head, and what a teacher says about a batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
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
class SparseLogits:
    """A teacher's distribution by its most likely classes: what caches keep and servers send.

    The classes that are not among them share the missing probability, the tail. An entry is empty, and its class in
    the tail, where its index is below 0 or its log-probability -inf. The indices of an item differ from each other.

    Attributes:
        indices: (..., k) int64 classes, in any order.
        log_probs: (..., k) float, logarithms of their probabilities in softmax(logits / temperature) over all classes.
        temperature: > 0. The tail at another temperature cannot be known.

    Raises:
        TypeError: the dtypes are others.
        ValueError: the shapes differ, or there is no entry; the temperature is no number above 0.
    """

    indices: Tensor
    log_probs: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        shape = tuple(self.indices.shape)
        if self.indices.dtype != torch.int64 or not self.log_probs.is_floating_point():
            raise TypeError(
                f"indices have dtype {self.indices.dtype}, log_probs {self.log_probs.dtype}; expected torch.int64 and "
                "a float dtype. Pass indices.long()."
            )
        if shape != self.log_probs.shape or not shape or shape[-1] == 0:
            raise ValueError(
                f"indices have shape {shape}, log_probs {tuple(self.log_probs.shape)}; expected (..., k) twice, k >= "
                "1. Fill up items of fewer classes with index -1."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a finite number above 0.")

    @property
    def k(self) -> int:
        """How many entries an item has."""
        return self.indices.shape[-1]

    def narrowed(self, k: int) -> "SparseLogits":
        """The same with the k most likely classes of each item; the others go into the tail."""
        if k >= self.k:
            return self
        given = self.log_probs.masked_fill(self.indices < 0, -math.inf)
        top = given.topk(k, sorted=False).indices
        return replace(self, indices=self.indices.gather(-1, top), log_probs=self.log_probs.gather(-1, top))

    def placed(self, device: torch.device) -> "SparseLogits":
        """The same on a device."""
        return replace(self, indices=self.indices.to(device), log_probs=self.log_probs.to(device))

    def ordered(self, order: Tensor | None) -> "SparseLogits":
        """The same with the classes' numbers in another order.

        Args:
            order: (classes,) for each number the old one, as of `label_order`; None leaves all as it is.
        """
        if order is None:
            return self
        moved = order.to(self.indices.device).argsort()[self.indices.clamp(min=0)]
        return replace(self, indices=torch.where(self.indices < 0, self.indices, moved))

    def dense(self, classes: int) -> Tensor:
        """(..., classes) logits of as much as is known: a class without an entry has none, -inf."""
        logits = self.log_probs.new_full((*self.indices.shape[:-1], classes + 1), -math.inf)
        places = torch.where((self.indices < 0) | (self.indices >= classes), classes, self.indices)
        return logits.scatter_(-1, places, self.log_probs * self.temperature)[..., :classes]

    def likeliest(self, classes: int) -> Tensor:
        """(...,) the most likely of the leading classes; -1 where no entry is one of them."""
        given = (self.indices >= 0) & (self.indices < classes) & (self.log_probs > -math.inf)
        first = self.log_probs.masked_fill(~given, -math.inf).argmax(-1, keepdim=True)
        return torch.where(given, self.indices, -1).gather(-1, first).squeeze(-1)


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
        sparse: in place of the logits, the most likely classes of each item, (batch, k) or (batch, length, k).
    """

    logits: tuple[Tensor, ...]
    overwritable: bool = False
    features: Mapping[Feature, Any] = field(default_factory=dict)
    factors: LogitFactors | None = None
    sparse: SparseLogits | None = None

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
