"""The two ways the demo trains a classifier: on labels alone, and distilled from a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.trainer import DistillationTrainer

WARMUP_RATIO = 0.02
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Run:
    """How long and how fast one model trains, and whom to tell after each step."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    output_dir: str
    on_step: Callable[[], None]

    def arguments(self) -> dict[str, Any]:
        """What both kinds of `TrainingArguments` have in common."""
        return {
            "output_dir": self.output_dir,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": WARMUP_RATIO,
            "weight_decay": WEIGHT_DECAY,
            "seed": self.seed,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),  # else torch warns on each machine without
        }


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._on_step()


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Returns the rows with the tokenizer's columns for `text`, and `teacher_*` columns for a teacher with its own."""

    def columns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(batch["text"], truncation=True, max_length=max_length))
        if teacher_tokenizer is not None:
            teacher_encoded = teacher_tokenizer(batch["text"], truncation=True, max_length=max_length)
            encoded |= {f"teacher_{name}": values for name, values in teacher_encoded.items()}
        return encoded

    return rows.map(columns, batched=True, remove_columns="text")


def train_on_labels(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Trains the model in place with `transformers.Trainer`; every row has a label."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**run.arguments()),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_StepCallback(run.on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    temperature: float,
    kd_weight: float,
    task_weight: float,
) -> None:
    """Trains the student in place with `DistillationTrainer`; rows without label learn from the teacher alone."""
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationTrainingArguments(
            **run.arguments(), temperature=temperature, kd_weight=kd_weight, task_weight=task_weight
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        callbacks=[_StepCallback(run.on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
