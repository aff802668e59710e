"""The trainers whose steps are timed, and the driver that takes one optimizer step of each."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.naive import NaiveDistillationTrainer
from benchmarks.rivals import Heads, Loss, installed, liger
from benchmarks.step_overhead.workloads import Inputs, Workload, student_of

TEMPERATURE, KD_WEIGHT = 2.0, 0.5


class FloorTrainer(Trainer):
    """The plain training step, and the teacher's forward pass whose output nobody reads."""

    teacher: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.compute_loss`, after the teacher's logits."""
        with torch.no_grad(), self.accelerator.autocast():
            self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        return super().compute_loss(model, inputs, *args, **kwargs)


def training_arguments(device: str, *, bf16: bool) -> dict[str, Any]:
    """Plain AdamW with clipping off; nothing is written or reported."""
    return {
        "output_dir": tempfile.gettempdir(),
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "bf16": bf16,
    }


def floor(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any]) -> Trainer:
    """Teacher forward and plain step."""
    trainer = FloorTrainer(student, TrainingArguments(**arguments))
    trainer.teacher = teacher.to(trainer.args.device)
    return trainer


def ours(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any]) -> Trainer:
    """`DistillationTrainer` with task loss and forward KL."""
    from hf_distill import DistillationTrainer, DistillationTrainingArguments

    args = DistillationTrainingArguments(
        **arguments, kd_weight=KD_WEIGHT, task_weight=1 - KD_WEIGHT, temperature=TEMPERATURE
    )
    return DistillationTrainer(model=student, teacher_model=teacher, args=args)


def naive(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any]) -> Trainer:
    """The same loss under autograd, over full logits."""
    trainer = NaiveDistillationTrainer(
        model=student,
        teacher=teacher,
        temperature=TEMPERATURE,
        kd_weight=KD_WEIGHT,
        args=TrainingArguments(**arguments),
    )
    teacher.to(trainer.args.device)
    return trainer


class HeadsTrainer(Trainer):
    """Both backbones, and a loss from their last hidden states and heads."""

    teacher: nn.Module
    loss: Loss

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        """The loss of a causal language model, next tokens shifted; all rows are full."""
        read = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden = self.teacher.model(**read).last_hidden_state
        hidden = model.model(**read).last_hidden_state
        sides = (side[:, :-1].flatten(0, 1) for side in (hidden, teacher_hidden))
        targets = inputs["labels"][:, 1:].flatten()
        return self.loss(Heads(next(sides), model.lm_head.weight, next(sides), self.teacher.lm_head.weight, targets))


def of_heads(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any], *, loss: Loss) -> Trainer:
    """A rival's loss in a plain trainer."""
    trainer = HeadsTrainer(student, TrainingArguments(**arguments))
    trainer.teacher, trainer.loss = teacher.to(trainer.args.device), loss
    return trainer


def nothing(heads: Heads) -> Tensor:
    """No loss at all: what a step costs before its heads."""
    return heads.hidden.sum() + heads.teacher_hidden.sum()


CONTENDERS = {"floor": floor, "ours": ours, "naive": naive}
# Of language models also others' losses, where they are installed, and what all of them need before the heads.
BACKBONES = "backbones"
found = installed()
OF_LANGUAGE_MODELS = {
    **CONTENDERS,
    BACKBONES: partial(of_heads, loss=nothing),
    **{f"{name} (no labels, T 1)": partial(of_heads, loss=loss) for name, loss in found.items()},
}
if "liger" in found:
    OF_LANGUAGE_MODELS["liger"] = partial(of_heads, loss=partial(liger, hard=1 - KD_WEIGHT, temperature=TEMPERATURE))


def contenders_of(workload: Workload) -> dict[str, Any]:
    """Builders of the trainers of a workload, by name; the floor first."""
    return OF_LANGUAGE_MODELS if workload.is_language_model else CONTENDERS


class Stepper:
    """One contender, ready to take optimizer steps one at a time: `Trainer`'s own calls in `Trainer`'s order."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        if hasattr(trainer, "_chunked"):  # as the train() of ours does
            trainer._chunked.attach(trainer.model)
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()

    def count(self, inputs: Inputs) -> tuple[Inputs, Any]:
        """The batch, and what the trainer counted in it: an accumulation window of one."""
        batches, counted = self.trainer.get_batch_samples(iter([inputs]), 1, self.trainer.args.device)
        return batches[0], counted

    def step(self, inputs: Inputs) -> Tensor:
        """Counting, forward, backward, optimizer; the loss, left on its device."""
        batch, counted = self.count(inputs)
        loss = self.trainer.training_step(self.model, batch, counted)
        self.optimizer.step()
        self.model.zero_grad()
        return loss


def stepper_of(name: str, workload: Workload, teacher: PreTrainedModel, *, device: str, bf16: bool) -> Stepper:
    """A contender with a fresh student."""
    build = contenders_of(workload)[name]
    return Stepper(build(student_of(workload), teacher, training_arguments(device, bf16=bf16)))
