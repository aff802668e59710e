"""Value and gradient of forward_kl from given logits: time and peak memory against the naive composition.

    python -m benchmarks.loss_kernels                  # one CPU thread, float32 and bfloat16
    python -m benchmarks.loss_kernels --device cuda --items 8192 --classes 152000

Writes benchmarks/results/loss_kernels.json (loss_kernels-cuda.json on a GPU). On a CPU it needs Linux, which keeps the
peak of a process's resident memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.environment import environment
from hf_distill.losses import forward_kl

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
CHECKED_ROWS = 16


def naive(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The composition that tutorials show, in float32 and per item."""
    log_probs = functional.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher_probs = functional.softmax(teacher_logits.float() / temperature, dim=-1)
    return functional.kl_div(log_probs, teacher_probs, reduction="none").sum(-1) * temperature**2


def ours(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`hf_distill.forward_kl`."""
    return forward_kl(student_logits, teacher_logits, temperature=temperature)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"naive": naive, "forward_kl": ours}


def logits(options: argparse.Namespace, dtype: str) -> tuple[Tensor, Tensor]:
    """Student (with gradient) and teacher logits, (items, classes)."""
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (options.items, options.classes)
    student, teacher = (
        torch.randn(shape, generator=generator, device=options.device, dtype=getattr(torch, dtype)).mul_(3)
        for _ in range(2)
    )
    return student.requires_grad_(), teacher


def run(name: str, student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Leaves the gradient of the mean loss in `student.grad`."""
    student.grad = None
    CONTENDERS[name](student, teacher, temperature).mean().backward()


def times(options: argparse.Namespace, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each contender, in turns: the latter do not see what else the machine does."""
    student, teacher = logits(options, dtype)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds + 1):
        for name in CONTENDERS:
            wait(options.device)
            wall, processor = time.perf_counter(), time.process_time()
            run(name, student, teacher, options.temperature)
            wait(options.device)
            if turn > 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(name: str, options: argparse.Namespace, dtype: str) -> int:
    """Peak memory of one run above its inputs; meant for a fresh process."""
    torch.set_num_threads(options.threads)
    student, teacher = logits(options, dtype)
    # The first call of a process loads code and starts libraries, which is not the loss's memory.
    run(name, student[:1].detach().requires_grad_(), teacher[:1], options.temperature)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, student, teacher, options.temperature)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    run(name, student, teacher, options.temperature)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def errors(options: argparse.Namespace, dtype: str) -> dict[str, dict[str, float]]:
    """Largest error of value and gradient against float64, relative to the largest of each, on the first rows."""
    student, teacher = logits(options, dtype)
    student, teacher = (tensor.detach()[:CHECKED_ROWS] for tensor in (student, teacher))

    def value_and_gradient(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        inputs[0].requires_grad_()
        values = function(*inputs, options.temperature)
        return [values.detach().double(), torch.autograd.grad(values.sum(), inputs[0])[0].double()]

    def in_float64(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        student_log_probs = functional.log_softmax(student_logits / temperature, dim=-1)
        teacher_log_probs = functional.log_softmax(teacher_logits / temperature, dim=-1)
        terms = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
        return terms.sum(-1) * temperature**2

    exact = value_and_gradient(in_float64, [student.double(), teacher.double()])
    found = {name: value_and_gradient(function, [student.clone(), teacher]) for name, function in CONTENDERS.items()}
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


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All numbers of one dtype; ratios are to the naive composition, and smaller is better."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_process:
        peaks = {name: fresh_process.submit(peak_bytes, name, options, dtype).result() for name in CONTENDERS}
    seconds = times(options, dtype)
    accuracy = errors(options, dtype)
    return {
        name: {
            "seconds": statistics.median(wall for wall, _ in seconds[name]),
            "processor_seconds": statistics.median(processor for _, processor in seconds[name]),
            "peak_mib": peaks[name] / MIB,
            "time_ratio": ratio(seconds[name], seconds["naive"], 0),
            "processor_time_ratio": ratio(seconds[name], seconds["naive"], 1),
            "memory_ratio": peaks[name] / peaks["naive"],
            **accuracy[name],
        }
        for name in CONTENDERS
    }


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("items", "classes", "temperature", "rounds")}
    measured = {dtype: measure(options, dtype) for dtype in options.dtypes}
    results = {"environment": environment(device=options.device), "settings": settings, "results": measured}
    text = json.dumps(results, indent=2)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    output = options.output or RESULTS / f"loss_kernels{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
