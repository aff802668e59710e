"""Batches of one size in tokens, at three lengths, for one teacher and one student."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, set_seed

from benchmarks.step_overhead.workloads import classification_batch

WIDTH, STUDENT_LAYERS, TEACHER_LAYERS = 256, 4, 12
TOKENS = 2048


@dataclass(frozen=True)
class Goals:
    """What is asked of our step at one length; None where nothing is.

    Attributes:
        time_over_floor: its time over the floor's, at most.
        time_over_eager: its time over that of the usual way, at most.
        extra_peak_over_eager: its extra peak memory over that of the usual way, at most.
    """

    time_over_floor: float | None = None
    time_over_eager: float | None = None
    extra_peak_over_eager: float | None = None


GOALS: dict[int, Goals] = {
    128: Goals(time_over_floor=1.08),
    256: Goals(),
    512: Goals(time_over_eager=0.85, extra_peak_over_eager=0.6),
}


def title(length: int) -> str:
    """The workload in words."""
    return (
        f"BERT classification, teacher {TEACHER_LAYERS} x {WIDTH}, student {STUDENT_LAYERS} x {WIDTH}, "
        f"batch {TOKENS // length} x {length}"
    )


def bert(layers: int, attention_dropout: float) -> PreTrainedModel:
    """A BERT classifier with dropout on its hidden states, and unless asked none on its attention.

    Maps after dropout, which eager attention returns, would differ from the teacher's by chance; and with dropout SDPA
    on a CPU makes whole maps itself.
    """
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=WIDTH,
        num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH,
        attention_probs_dropout_prob=attention_dropout,
    )
    return BertForSequenceClassification(config)


def student_of(attention_dropout: float) -> PreTrainedModel:
    """A fresh student, the same for every contender."""
    set_seed(0)
    return bert(STUDENT_LAYERS, attention_dropout)


def teacher_of(attention_dropout: float) -> PreTrainedModel:
    """A fresh teacher, the same for every contender."""
    set_seed(1)
    return bert(TEACHER_LAYERS, attention_dropout).eval().requires_grad_(False)


def batch_of(length: int, device: str, *, small: bool = False) -> dict[str, Tensor]:
    """The batch on its device; the small one warms caches up without raising the peak of memory."""
    set_seed(2)
    inputs = classification_batch(1, 8) if small else classification_batch(TOKENS // length, length)
    return {name: value.to(device) for name, value in inputs.items()}
