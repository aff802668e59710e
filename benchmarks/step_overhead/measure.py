"""Time of steps taken in turns, peak memory of a step in a process of its own, and waits of the host."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_overhead.contenders import Stepper, contenders_of, stepper_of
from benchmarks.step_overhead.workloads import WORKLOADS, batch_of, teacher_of

MIB = 2**20
MEMORY_RUNS = 3  # small blocks land differently in the heap from run to run


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(stepper: Stepper, inputs: dict[str, torch.Tensor], device: str) -> tuple[float, float]:
    """Wall and processor seconds of one step; the second does not see what else the machine does."""
    _finish(device)
    wall, processor = time.perf_counter(), time.process_time()
    stepper.step(inputs)
    _finish(device)
    return time.perf_counter() - wall, time.process_time() - processor


def time_in_turns(workload_name: str, *, rounds: int, device: str, bf16: bool) -> dict[str, Any]:
    """Each round takes one step of every contender, in an order that rotates; ratios are formed within a round."""
    workload = WORKLOADS[workload_name]
    teacher = teacher_of(workload)
    inputs = batch_of(workload, device)
    names = list(contenders_of(workload))
    steppers = {name: stepper_of(name, workload, teacher, device=device, bf16=bf16) for name in names}
    for stepper in steppers.values():
        stepper.step(inputs)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(steppers[name], inputs, device))
    return {name: summary(seconds[name], seconds["floor"]) for name in names}


def summary(taken: list[tuple[float, float]], floor: list[tuple[float, float]]) -> dict[str, float]:
    """Medians over rounds: seconds, and the ratio to the floor with its quartiles."""
    wall = [own[0] / base[0] for own, base in zip(taken, floor, strict=True)]
    processor = [own[1] / base[1] for own, base in zip(taken, floor, strict=True)]
    low, middle, high = statistics.quantiles(wall, n=4)
    return {
        "seconds": statistics.median(own[0] for own in taken),
        "time_over_floor": middle,
        "time_over_floor_lower_quartile": low,
        "time_over_floor_upper_quartile": high,
        "processor_time_over_floor": statistics.median(processor),
    }


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB, such as VmRSS or VmHWM."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def extra_peak_here(workload_name: str, name: str, *, device: str, bf16: bool) -> float:
    """MiB that one step of this contender needs above weights, optimizer state and inputs, measured in this process.

    On a CPU the peak of the resident set is the kernel's own (VmHWM), set back before the step. It holds activations,
    logits and gradients alike, and no allocation is too short to be seen.
    """
    workload = WORKLOADS[workload_name]
    stepper = stepper_of(name, workload, teacher_of(workload), device=device, bf16=bf16)
    stepper.step(batch_of(workload, device, small=True))
    inputs = batch_of(workload, device)
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


def extra_peak(workload_name: str, name: str, *, runs: int, device: str, bf16: bool) -> float:
    """The median `extra_peak_here` of fresh processes, so that no contender finds another's leavings."""
    command = [sys.executable, "-m", "benchmarks.step_overhead", "--workloads", workload_name]
    command += ["--memory-of", name, "--device", device, "--threads", str(torch.get_num_threads())]
    command += ["--bf16"] if bf16 else []
    peaks = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"Measuring the memory of {name} failed; expected a number.\n{done.stderr}")
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def waits_of_the_host(workload_name: str, name: str, *, bf16: bool) -> str | None:
    """The first place in `compute_loss` where the host waits for the GPU, or None; a first step may set things up."""
    workload = WORKLOADS[workload_name]
    stepper = stepper_of(name, workload, teacher_of(workload), device="cuda", bf16=bf16)
    inputs = batch_of(workload, "cuda")
    stepper.step(inputs)
    batch, counted = stepper.count(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with stepper.trainer.compute_loss_context_manager():
            stepper.trainer.compute_loss(stepper.model, batch, num_items_in_batch=counted)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
