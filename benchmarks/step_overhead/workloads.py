"""The workloads: models of random weights with the shapes of real ones, and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    set_seed,
)

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """Student, teacher and batch, with the goals for our step.

    Attributes:
        time_goal: our step's time over the floor's, at most.
        memory_goal: what our step needs above the backbones over what the naive trainer's does, at most; None where
            memory is no concern.
    """

    title: str
    student: Callable[[], PreTrainedModel]
    teacher: Callable[[], PreTrainedModel]
    batch: Callable[[int, int], Inputs]
    rows: int
    tokens: int
    time_goal: float
    memory_goal: float | None = None
    is_language_model: bool = False


def bert(layers: int, width: int) -> PreTrainedModel:
    """A BERT classifier with dropout, as people train it."""
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    return BertForSequenceClassification(config)


def llama(layers: int, width: int, *, classes: int = 32_000, tied: bool = False) -> PreTrainedModel:
    """A Llama language model."""
    config = LlamaConfig(
        vocab_size=classes, num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, intermediate_size=8 * width // 3, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def classification_batch(rows: int, tokens: int) -> Inputs:
    """Full rows: input_ids and attention_mask (rows, tokens), labels (rows,)."""
    ids = torch.randint(1000, 30_000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (rows,))}


def language_batch(rows: int, tokens: int) -> Inputs:
    """Full rows with every next token supervised: the most logits that a batch of this size can need."""
    ids = torch.randint(3, 32_000, (rows, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


WORKLOADS: dict[str, Workload] = {
    "bert": Workload(
        title="BERT classification, teacher 12 x 256, student 4 x 256, batch 16 x 128",
        student=lambda: bert(4, 256),
        teacher=lambda: bert(12, 256),
        batch=classification_batch,
        rows=16,
        tokens=128,
        time_goal=1.05,
    ),
    "llama": Workload(
        title="Llama LM, vocabulary 32,000, teacher 12 x 512, student 6 x 384, batch 8 x 256",
        student=lambda: llama(6, 384),
        teacher=lambda: llama(12, 512),
        batch=language_batch,
        rows=8,
        tokens=256,
        time_goal=1.00,
        memory_goal=0.10,
        is_language_model=True,
    ),
    "llama-152k": Workload(
        title="Llama LM, vocabulary 151,936 and tied heads, teacher 12 x 512, student 6 x 384, batch 4 x 256",
        student=lambda: llama(6, 384, classes=151_936, tied=True),
        teacher=lambda: llama(12, 512, classes=151_936, tied=True),
        batch=language_batch,
        rows=4,
        tokens=256,
        time_goal=1.00,
        memory_goal=0.10,
        is_language_model=True,
    ),
}


def student_of(workload: Workload) -> PreTrainedModel:
    """A fresh student, the same for every contender."""
    set_seed(0)
    return workload.student()


def teacher_of(workload: Workload) -> PreTrainedModel:
    """A fresh teacher, the same for every contender."""
    set_seed(1)
    return workload.teacher().eval().requires_grad_(False)


def batch_of(workload: Workload, device: torch.device | str, *, small: bool = False) -> Inputs:
    """The batch on its device; the small one warms caches up without raising the peak of memory."""
    set_seed(2)
    inputs = workload.batch(1, 8) if small else workload.batch(workload.rows, workload.tokens)
    return {name: value.to(device) for name, value in inputs.items()}
