"""Time of steps taken in turns, and peak memory of a step in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.contenders import CONTENDERS, stepper_of
from benchmarks.layers.workloads import batch_of
from benchmarks.step_overhead.measure import MEMORY_RUNS, MIB, seconds_of, status_bytes, summary


def time_in_turns(length: int, *, rounds: int, device: str, bf16: bool, dropout: float) -> dict[str, Any]:
    """Each round takes one step of every contender, in an order that rotates; ratios are formed within a round."""
    inputs = batch_of(length, device)
    steppers = {name: stepper_of(name, device=device, bf16=bf16, dropout=dropout) for name in CONTENDERS}
    for stepper in steppers.values():
        stepper.step(inputs)
    names = list(steppers)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(steppers[name], inputs, device))
    return {
        name: summary(seconds[name], seconds["floor"])
        | {"processor_time_over_eager": summary(seconds[name], seconds["eager"])["processor_time_over_floor"]}
        | {"time_over_eager": summary(seconds[name], seconds["eager"])["time_over_floor"]}
        for name in names
    }


def extra_peak_here(length: int, name: str, *, device: str, bf16: bool, dropout: float) -> float:
    """MiB that one step of this contender needs above weights, optimizer state and inputs, measured in this process.

    See `benchmarks.step_overhead.measure.extra_peak_here`.
    """
    stepper = stepper_of(name, device=device, bf16=bf16, dropout=dropout)
    stepper.step(batch_of(length, device, small=True))
    inputs = batch_of(length, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stepper.step(inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    stepper.step(inputs)
    return (status_bytes("VmHWM") - before) / MIB


def extra_peak(length: int, name: str, *, device: str, bf16: bool, dropout: float) -> float:
    """The median `extra_peak_here` of fresh processes, so that no contender finds another's leavings."""
    command = [sys.executable, "-m", "benchmarks.layers", "--lengths", str(length), "--memory-of", name]
    command += ["--attention-dropout", str(dropout)]
    command += ["--device", device, "--threads", str(torch.get_num_threads()), *(["--bf16"] if bf16 else [])]
    peaks = []
    for _ in range(MEMORY_RUNS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"Measuring the memory of {name} failed; expected a number.\n{done.stderr}")
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    return statistics.median(peaks)
