"""Trainings over the same rows, cut and padded in other ways, and what their steps have in common."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests.training import SILENT

# Float noise of sums in another order; an error in a count is above 1e-2.
TOLERANCE = 1e-5
LABELS = ("labels", "start_positions", "end_positions")
_LABEL_PER_POSITION = ("tokens", "masked", "causal", "translation", "features", "speech")
_PADDING = {"input_ids": 0, "attention_mask": 0, "input_values": 0.0}
# The rows in order, and steps so short that the noise of one is not seen in the next.
_BARE_STEPS = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": -1, "num_train_epochs": 1}


@dataclass
class Run:
    """What a training left behind: per step its gradient (parameters,) in float64, and its log."""

    gradients: list[torch.Tensor] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)


class Recorder(TrainerCallback):
    """Copies the gradient that each optimizer step is about to use, and the step's log."""

    def __init__(self):
        self.run = Run()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
        self.run.gradients.append(torch.cat([gradient.double().flatten() for gradient in gradients]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.run.logs.append(dict(logs))


def recorded(trainer):
    """Trains, and returns what was recorded."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.run


def step_options(output_dir, batch, accumulation, **changes):
    """Arguments of one epoch of bare steps: a number of rows per micro-batch, and of micro-batches per step."""
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return {**SILENT, "output_dir": output_dir, **_BARE_STEPS, **sizes, **changes}


def distil(models, rows, output_dir, batch=8, accumulation=1, **changes):
    """A run of `DistillationTrainer` with bare steps; trains the student of `models` in place."""
    student, teacher = models
    args = DistillationTrainingArguments(**step_options(output_dir, batch, accumulation, **changes))
    return recorded(DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=rows))


def train_plainly(student, rows, output_dir, batch=8, accumulation=1, **changes):
    """The same run of `transformers.Trainer`."""
    args = TrainingArguments(**step_options(output_dir, batch, accumulation, **changes))
    return recorded(Trainer(model=student, args=args, train_dataset=rows))


def relative_difference(vector, reference):
    """The length of the difference, as a fraction of the reference's length."""
    return float((vector - reference).norm() / reference.norm())


def assert_same_steps(run, reference):
    """Each step has the gradient and the logged terms of the reference's."""
    assert len(run.gradients) == len(reference.gradients) == len(run.logs) == len(reference.logs) > 0
    for gradient, expected in zip(run.gradients, reference.gradients, strict=True):
        assert expected.isfinite().all()
        assert expected.norm() > 0
        assert relative_difference(gradient, expected) <= TOLERANCE
    for log, expected in zip(run.logs, reference.logs, strict=True):
        terms = {name: value for name, value in expected.items() if name.startswith("loss")}
        assert {name: log.get(name) for name in terms} == pytest.approx(terms, rel=TOLERANCE, abs=5e-7)


def longer(rows, kind, extra=5):
    """The same rows with `extra` more positions of padding (for sound: frames of 10 samples)."""

    def pad(name, value):
        if name == "labels" and kind in _LABEL_PER_POSITION:
            return F.pad(value, (0, extra), value=-100)
        if name not in _PADDING:
            return value
        return F.pad(value, (0, extra * (10 if kind in ("speech", "sound") else 1)), value=_PADDING[name])

    return [{name: pad(name, value) for name, value in row.items()} for row in rows]


def without_labels(row):
    """The row with -100, or NaN where labels are numbers, in place of every label."""

    def missing(label):
        return torch.full_like(label, math.nan if label.is_floating_point() else -100)

    return {name: missing(value) if name in LABELS else value for name, value in row.items()}


def with_dropout(model):
    """The model with 10 % dropout wherever it has a dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        for name in ("dropout", "attention_dropout"):  # read by functional dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.1)
    return model
