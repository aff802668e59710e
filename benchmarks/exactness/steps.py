"""One optimizer step of one contender on one split of the same eight rows: its logged loss and whole gradient."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from benchmarks.exactness.contenders import CONTENDERS, Contender
from benchmarks.exactness.models import CASES, Case

STUDENT_LAYERS, TEACHER_LAYERS = 2, 3
PROCESS_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Split:
    """How eight rows reach one optimizer step: batch per process x accumulation x processes, and their padding."""

    batch: int
    accumulation: int
    processes: int = 1
    padded: bool = False


SPLITS: dict[str, Split] = {
    "8x1": Split(8, 1),
    "4x2": Split(4, 2),
    "1x8": Split(1, 8),
    "8x1 padded": Split(8, 1, padded=True),
    "2 processes, 4x1": Split(4, 1, processes=2),
    "2 processes, 2x2": Split(2, 2, processes=2),
}


@dataclass(frozen=True)
class Step:
    """What one step left behind: the logged loss, and the gradient (parameters,) in float64, before the optimizer."""

    loss: float
    gradient: Tensor


class GradientProbe(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copies every trainable parameter's gradient; one without a gradient counts as zeros."""
        trainable = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
        self.gradient = torch.cat([gradient.detach().double().flatten() for gradient in gradients])


def training_arguments(split: Split, output_dir: str) -> dict[str, Any]:
    """Arguments that all contenders share: one step, no clipping, rows in order."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": split.batch,
        "gradient_accumulation_steps": split.accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if split.processes > 1 else None,
    }


def take_step(contender: Contender, case: Case, split: Split) -> Step:
    """Trains for one step from the same weights, whatever the split."""
    student = case.build(layers=STUDENT_LAYERS, seed=0)
    teacher = case.build_teacher(layers=TEACHER_LAYERS, seed=1)
    probe = GradientProbe()
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = training_arguments(split, output_dir)
        trainer = contender.build(student, teacher, case.rows(padded=split.padded), arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(probe)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Step(loss=float(losses[0]), gradient=probe.gradient)


def try_step(contender: Contender, case: Case, split: Split) -> Step | str:
    """The step, or the reason why this contender could not take it."""
    refusal = contender.refuses(case)
    if refusal:
        return refusal
    try:
        with contextlib.redirect_stdout(sys.stderr):  # rivals print; our stdout is the table
            return take_step(contender, case, split)
    except Exception as error:  # a rival that breaks is a result; the run goes on
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def steps_in_one_process(contender: str, split: Split, cases: list[str]) -> dict[str, Step | str]:
    """Every case on one split, here."""
    return {name: try_step(CONTENDERS[contender], CASES[name], split) for name in cases}


def worker(contender: str, split_name: str, cases: list[str], destination: Path) -> None:
    """What each process of a distributed split runs; the first one writes what it saw."""
    steps = steps_in_one_process(contender, SPLITS[split_name], cases)
    if int(os.environ["RANK"]) == 0:
        plain_steps = {
            name: step if isinstance(step, str) else {"loss": step.loss, "gradient": step.gradient}
            for name, step in steps.items()
        }
        torch.save(plain_steps, destination)
    torch.distributed.destroy_process_group()


def steps_in_processes(contender: str, split_name: str, cases: list[str]) -> dict[str, Step | str]:
    """Every case on a distributed split: one launch of torchrun over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder, "steps.pt")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(SPLITS[split_name].processes), "-m", "benchmarks.exactness"),
            *("--worker", contender, "--split", split_name, "--out", str(destination), "--models", *cases),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return dict.fromkeys(cases, f"no answer from the processes in {PROCESS_TIMEOUT_S} s")
        if done.returncode != 0:
            last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return dict.fromkeys(cases, f"the processes failed: {last_line}")
        loaded = torch.load(destination, weights_only=True)
    return {name: step if isinstance(step, str) else Step(**step) for name, step in loaded.items()}


def steps_of(contender: str, split_name: str, cases: list[str]) -> dict[str, Step | str]:
    """Every case of one contender on one split."""
    split = SPLITS[split_name]
    if split.processes > 1:
        return steps_in_processes(contender, split_name, cases)
    return steps_in_one_process(contender, split, [name for name in cases if CASES[name].pads or not split.padded])
