"""The trainers under test, each built from the same student, teacher, rows and training arguments.

Packages that only one contender needs are imported in its builder: most environments hold some of them, not all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.environment import installed_version
from benchmarks.exactness.models import Case
from benchmarks.exactness.rows import Row, collate
from benchmarks.naive import NaiveDistillationTrainer

TEMPERATURE, KD_WEIGHT = 2.0, 0.5

Builder = Callable[[PreTrainedModel, PreTrainedModel, Sequence[Row], dict[str, Any]], Trainer]


@dataclass(frozen=True)
class Contender:
    """A way to train: how to build it, what it is called, what it needs, and which tasks it is made for."""

    title: str
    package: str
    build: Builder
    tasks: tuple[str, ...] | None = None

    def unavailable(self) -> str | None:
        """Why this environment cannot run it, or None."""
        if self.package == "hf_distill":
            try:
                from hf_distill import DistillationTrainer  # noqa: F401
            except ImportError as error:
                return f"hf_distill does not import here: {error}"
            return None
        return None if installed_version(self.package) else f"{self.package} is not installed here"

    def refuses(self, case: Case) -> str | None:
        """Why this contender does not train this model, or None."""
        if self.tasks is None or case.task in self.tasks:
            return None
        return f"made for {', '.join(self.tasks)} only"

    def version(self) -> str:
        """The package and version behind it, with the transformers it ran on."""
        own = f"{self.package} {installed_version(self.package) or 'from source'}"
        return own if self.package == "transformers" else f"{own}, transformers {installed_version('transformers')}"


def plain(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], arguments: dict[str, Any]
) -> Trainer:
    """`transformers.Trainer` on the labels; the teacher is not used."""
    del teacher
    return Trainer(student, TrainingArguments(**arguments), data_collator=collate, train_dataset=list(rows))


def ours(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], arguments: dict[str, Any]
) -> Trainer:
    """`hf_distill.DistillationTrainer`: half task loss, half forward KL."""
    from hf_distill import DistillationTrainer, DistillationTrainingArguments

    args = DistillationTrainingArguments(
        **arguments, kd_weight=KD_WEIGHT, task_weight=1 - KD_WEIGHT, temperature=TEMPERATURE
    )
    return DistillationTrainer(
        model=student, teacher_model=teacher, args=args, data_collator=collate, train_dataset=list(rows)
    )


def naive(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], arguments: dict[str, Any]
) -> Trainer:
    """A `Trainer` whose `compute_loss` is overridden, as most people write distillation."""
    return NaiveDistillationTrainer(
        model=student,
        teacher=teacher,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=list(rows),
    )


def _word_tokenizer() -> Any:
    """A tokenizer without files: TRL asks for one, though rows arrive tokenized."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(3, 97)} | {"<s>": 0, "<pad>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def trl_gkd(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], arguments: dict[str, Any]
) -> Trainer:
    """TRL's `GKDTrainer`, off-policy (lmbda 0) with forward KL (beta 0); it has no task loss."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(
        **arguments, lmbda=0.0, beta=0.0, temperature=TEMPERATURE, bf16=False, gradient_checkpointing=False
    )
    dataset = Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        data_collator=collate,
        train_dataset=dataset.with_format("torch"),
        processing_class=_word_tokenizer(),
    )


def modelopt(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], arguments: dict[str, Any]
) -> Trainer:
    """NVIDIA Model Optimizer's `KDTrainer`; it has no task loss."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    return KDTrainer(
        model=student,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=list(rows),
        distill_args={"teacher_model": teacher, "distill": True, "temperature": TEMPERATURE},
    )


CAUSAL_ONLY = ("causal_lm",)
CONTENDERS: dict[str, Contender] = {
    "ours": Contender("hf_distill DistillationTrainer (task + KD)", "hf_distill", ours),
    "plain": Contender("transformers Trainer (no distillation)", "transformers", plain),
    "naive": Contender("naive Trainer subclass (task + KD)", "transformers", naive),
    "trl_gkd": Contender("TRL GKDTrainer, off-policy (KD)", "trl", trl_gkd, CAUSAL_ONLY),
    "modelopt": Contender("ModelOpt KDTrainer (KD)", "nvidia-modelopt", modelopt, CAUSAL_ONLY),
}
