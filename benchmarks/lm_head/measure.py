"""Time and peak memory of each contender."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lm_head.contenders import FLOOR, NAIVE, contenders
from benchmarks.loss_kernels.measure import MIB, ratio, resident_bytes, wait
from benchmarks.rivals import Heads


class Size(NamedTuple):
    """How much there is to compare."""

    items: int
    classes: int
    student: int
    teacher: int

    def draw(self, dtype: str, device: str) -> Heads:
        """The same for every contender."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> Tensor:
            values = torch.randn(rows, width, generator=generator, device=device) * scale
            return values.to(getattr(torch, dtype))

        sides = [
            tensor
            for width in (self.student, self.teacher)
            for tensor in (normal(self.items, width, 1.0), normal(self.classes, width, 2 * width**-0.5))
        ]
        targets = torch.randint(self.classes, (self.items,), generator=generator, device=device)
        return Heads(sides[0].requires_grad_(), sides[1].requires_grad_(), *sides[2:], targets)


def run(name: str, heads: Heads) -> None:
    """Leaves the gradients in `grad`."""
    heads.hidden.grad = heads.weight.grad = None
    contenders()[name](heads)


def peak_bytes(name: str, size: Size, dtype: str, device: str, threads: int) -> int:
    """Peak memory of one run above its inputs; meant for a fresh process."""
    torch.set_num_threads(threads)
    heads = size.draw(dtype, device)
    # The first call of a process loads code and starts libraries, which is not the loss's memory.
    run(name, size._replace(items=8, classes=64).draw(dtype, device))
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, heads)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    run(name, heads)
    return resident_bytes("VmHWM") - before


def measure(size: Size, dtype: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All numbers: time as a ratio to the products alone, memory to the naive composition."""
    spawn = multiprocessing.get_context("spawn")
    where = options.device, options.threads
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_process:
        peaks = {name: fresh_process.submit(peak_bytes, name, size, dtype, *where).result() for name in names}
    heads = size.draw(dtype, options.device)
    known = contenders()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        for name in names:
            heads.hidden.grad = heads.weight.grad = None
            wait(options.device)
            wall, processor = time.perf_counter(), time.process_time()
            known[name](heads)
            wait(options.device)
            if turn > 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    results: dict[str, Any] = {}
    for name in names:
        results[name] = {
            "seconds": statistics.median(wall for wall, _ in seconds[name]),
            "processor_seconds": statistics.median(processor for _, processor in seconds[name]),
            "peak_mib": peaks[name] / MIB,
            "time_over_floor": ratio(seconds[name], seconds[FLOOR], 0),
            "processor_time_over_floor": ratio(seconds[name], seconds[FLOOR], 1),
        }
        if NAIVE in names:
            results[name]["memory_over_naive"] = peaks[name] / peaks[NAIVE]
    return results
