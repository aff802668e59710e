"""Time, peak memory and accuracy of each contender."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.loss_kernels.contenders import CASES, Contender, Inputs

MIB = 2**20
CHECKED_ROWS = 16


class Setting(NamedTuple):
    """One table of the results."""

    case: str
    dtype: str
    temperature: float

    def run(self, name: str, inputs: Inputs) -> None:
        """Leaves the gradient of the mean loss in the student's `grad`."""
        inputs.student_logits.grad = None
        CASES[self.case][name](inputs, self.temperature).backward()


def draw_inputs(options: argparse.Namespace, dtype: str) -> Inputs:
    """The same for every contender."""
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (options.items, options.classes)
    student, teacher = (
        torch.randn(shape, generator=generator, device=options.device, dtype=getattr(torch, dtype)).mul_(3)
        for _ in range(2)
    )
    targets = torch.randint(options.classes, (options.items,), generator=generator, device=options.device)
    return Inputs(student.requires_grad_(), teacher, targets)


def times(options: argparse.Namespace, setting: Setting) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each contender, in turns: the latter do not see what else the machine does."""
    inputs = draw_inputs(options, setting.dtype)
    teacher = inputs.teacher_logits.clone()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES[setting.case]}
    for turn in range(options.rounds + 1):
        for name in seconds:
            inputs.teacher_logits.copy_(teacher)  # the last contender may have written over them
            wait(options.device)
            wall, processor = time.perf_counter(), time.process_time()
            setting.run(name, inputs)
            wait(options.device)
            if turn > 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(name: str, options: argparse.Namespace, setting: Setting) -> int:
    """Peak memory of one run above its inputs; meant for a fresh process."""
    torch.set_num_threads(options.threads)
    inputs = draw_inputs(options, setting.dtype)
    # The first call of a process loads code and starts libraries, which is not the loss's memory.
    student, *others = (tensor[:1].detach().clone() for tensor in inputs)
    setting.run(name, Inputs(student.requires_grad_(), *others))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        setting.run(name, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    setting.run(name, inputs)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def errors(options: argparse.Namespace, setting: Setting) -> dict[str, dict[str, float]]:
    """Largest error of value and gradient against float64, relative to the largest of each, on the first rows."""
    student, teacher, targets = (tensor.detach()[:CHECKED_ROWS] for tensor in draw_inputs(options, setting.dtype))

    def value_and_gradient(loss: Contender, dtype: torch.dtype) -> list[Tensor]:
        inputs = Inputs(student.to(dtype, copy=True).requires_grad_(), teacher.to(dtype, copy=True), targets)
        value = loss(inputs, setting.temperature)
        (gradient,) = torch.autograd.grad(value, inputs.student_logits)
        return [value.detach().double(), gradient.double()]

    contenders = CASES[setting.case]
    exact = value_and_gradient(next(iter(contenders.values())), torch.float64)
    found = {name: value_and_gradient(loss, student.dtype) for name, loss in contenders.items()}
    return {
        name: {
            part: ((result - expected).abs().max() / expected.abs().max()).item()
            for part, result, expected in zip(("value_error", "gradient_error"), results, exact, strict=True)
        }
        for name, results in found.items()
    }


def ratio(own: list[tuple[float, float]], base: list[tuple[float, float]], clock: int) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(mine[clock] / theirs[clock] for mine, theirs in zip(own, base, strict=True))


def measure(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """All numbers of one setting; ratios are to the case's first contender, and smaller is better."""
    names = list(CASES[setting.case])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_process:
        peaks = {name: fresh_process.submit(peak_bytes, name, options, setting).result() for name in names}
    seconds = times(options, setting)
    accuracy = errors(options, setting)
    return {
        name: {
            "seconds": statistics.median(wall for wall, _ in seconds[name]),
            "processor_seconds": statistics.median(processor for _, processor in seconds[name]),
            "peak_mib": peaks[name] / MIB,
            "time_ratio": ratio(seconds[name], seconds[names[0]], 0),
            "processor_time_ratio": ratio(seconds[name], seconds[names[0]], 1),
            "memory_ratio": peaks[name] / peaks[names[0]],
            **accuracy[name],
        }
        for name in names
    }
