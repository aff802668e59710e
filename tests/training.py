"""Short trainings on one CPU, and what tests read off them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests.tiny import ZOO, pair, rows

SILENT = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 2,
}


def arguments(folder: Path, cls: type = DistillationTrainingArguments, **options: Any) -> Any:
    """Arguments of a short, silent training in the order of the rows, without clipping or decay."""
    return cls(output_dir=str(folder), **{**SILENT, **options})


def make_trainer(folder: Path, name: str = "bert", *, models: tuple[Any, Any] | None = None, **options: Any) -> Any:
    """A trainer for a pair of the zoo on its rows.

    Options that `Trainer` takes go there (a key set to None is left out), the others to the arguments.
    """
    student, teacher = models or pair(name)
    data = rows(ZOO[name][1])
    keywords = {"model": student, "teacher_model": teacher, "train_dataset": data, "eval_dataset": data}
    keywords |= {key: options.pop(key) for key in _TRAINER_KEYWORDS & {*options}}
    cls = keywords.pop("cls", DistillationTrainer)
    args = keywords.pop("args", None) or arguments(folder, **options)
    return cls(args=args, **{key: value for key, value in keywords.items() if value is not None})


_TRAINER_KEYWORDS = {
    "cls",
    "args",
    "model",
    "teacher_model",
    "teacher_processing_class",
    "processing_class",
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "model_init",
    "compute_loss_func",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "peft_config",
    "preprocess_logits_for_metrics",
}


def logged(trainer: Any, name: str) -> list[float]:
    """Every value logged under a name, oldest first."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: value.grad.clone() for name, value in named if value.grad is not None})


def assert_same_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerance: float) -> None:
    """Both name the same parameters, and their gradients are close."""
    assert {*actual} == {*expected}
    assert any(value.abs().max() > 1e-4 for value in expected.values()), "nothing to compare"
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **{"rtol": 1e-4, "atol": 1e-6, **tolerance}, msg=lambda text, n=name: f"{n}: {text}"
        )


def batch_of(data: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of ready tensors as one batch."""
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def values(data: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Rows of tensors as rows of plain numbers and lists."""
    return [{name: value.tolist() for name, value in row.items()} for row in data]


def plain_trainer(
    folder: Path, name: str = "bert", *, cls: type = Trainer, args_cls: type = TrainingArguments, **options: Any
) -> Any:
    """`Trainer` itself on the student and the rows that `make_trainer` takes."""
    keywords = {key: options.pop(key) for key in _TRAINER_KEYWORDS & {*options}}
    data = rows(ZOO[name][1])
    keywords = {"model": pair(name)[0], "train_dataset": data, "eval_dataset": data, **keywords}
    return cls(args=arguments(folder, args_cls, **options), **keywords)


def losses(trainer: Any) -> list[float]:
    """Trains, and returns the logged losses."""
    trainer.train()
    return logged(trainer, "loss")
