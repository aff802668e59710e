"""Task and logit term from hidden states: time and peak memory against the bare products and the naive composition.

    python -m benchmarks.lm_head                              # one CPU thread, float32, about three minutes
    python -m benchmarks.lm_head --dtype bfloat16 --classes 151936 --items 1024 --student 896 --teacher 1536
    python -m benchmarks.lm_head --device cuda --dtype bfloat16 --items 8192

Writes benchmarks/results/lm_head.json (lm_head-cuda.json on a GPU). On a CPU it needs Linux, which keeps the peak of a
process's resident memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.environment import environment
from benchmarks.loss_kernels import MIB, RESULTS, ratio, resident_bytes, wait
from hf_distill.losses import LOSSES
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_rows import Divergence
from hf_distill.signals import LogitFactors

TEMPERATURE = 2.0


class Inputs(NamedTuple):
    """Two heads and what they read; the student's side asks for gradients."""

    hidden: Tensor  # (items, student width)
    weight: Tensor  # (classes, student width)
    teacher_hidden: Tensor  # (items, teacher width)
    teacher_weight: Tensor  # (classes, teacher width)
    targets: Tensor  # (items,)


def floor(inputs: Inputs, *, chunk: int = 512) -> None:
    """The four products that nobody can do without, in chunks."""
    hidden, weight, teacher_hidden, teacher_weight, _ = (tensor.detach() for tensor in inputs)
    logits, teacher_logits = (hidden.new_empty(chunk, len(weight)) for _ in range(2))
    gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        torch.mm(part, weight.t(), out=logits[: len(part)])
        torch.mm(teacher_hidden[start : start + chunk], teacher_weight.t(), out=teacher_logits[: len(part)])
        torch.mm(logits[: len(part)], weight, out=gradient[start : start + chunk])
        weight_gradient.addmm_(logits[: len(part)].t(), part)


def naive(inputs: Inputs, *, kept: int = 1) -> None:
    """Both terms of all logits, as tutorials show them; the items that do not count are masked."""
    student = (inputs.hidden @ inputs.weight.t()).float()
    teacher = (inputs.teacher_hidden @ inputs.teacher_weight.t()).float()
    mask = torch.arange(len(student), device=student.device) % kept == 0
    cross_entropy = functional.cross_entropy(student, inputs.targets, reduction="none")
    log_probs = functional.log_softmax(student / TEMPERATURE, -1)
    teacher_log_probs = functional.log_softmax(teacher / TEMPERATURE, -1)
    kl = functional.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="none").sum(-1) * TEMPERATURE**2
    (torch.where(mask, cross_entropy + kl, 0.0).sum() / (2 * mask.sum())).backward()


def ours(inputs: Inputs, *, loss: str = "forward_kl", kept: int = 1) -> None:
    """`hf_distill.losses.chunked_head.chunked_head_loss`."""
    mask = torch.arange(len(inputs.hidden), device=inputs.hidden.device) % kept == 0
    share = mask / (2 * mask.sum())
    total, _, _ = chunked_head_loss(
        LogitFactors(inputs.hidden, inputs.weight),
        LogitFactors(inputs.teacher_hidden, inputs.teacher_weight),
        inputs.targets,
        task_weights=share,
        kd_weights=share,
        temperature=TEMPERATURE,
        divergence=Divergence(LOSSES.get(loss)),
    )
    total.backward()


# The first is what the others' time is compared with, the second what their memory is.
CONTENDERS: dict[str, Callable[[Inputs], None]] = {
    "products alone": floor,
    "naive": naive,
    "ours": ours,
    "ours, jsd": functools.partial(ours, loss="jsd"),
    "naive, half of the items": functools.partial(naive, kept=2),
    "ours, half of the items": functools.partial(ours, kept=2),
}


def draw_inputs(options: argparse.Namespace, items: int) -> Inputs:
    """The same for every contender."""
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        values = torch.randn(rows, width, generator=generator, device=options.device) * scale
        return values.to(getattr(torch, options.dtype))

    sides = [
        tensor
        for width in (options.student, options.teacher)
        for tensor in (normal(items, width, 1.0), normal(options.classes, width, 2 * width**-0.5))
    ]
    targets = torch.randint(options.classes, (items,), generator=generator, device=options.device)
    return Inputs(sides[0].requires_grad_(), sides[1].requires_grad_(), *sides[2:], targets)


def run(name: str, inputs: Inputs) -> None:
    """Leaves the gradients in `grad`."""
    inputs.hidden.grad = inputs.weight.grad = None
    CONTENDERS[name](inputs)


def peak_bytes(name: str, options: argparse.Namespace) -> int:
    """Peak memory of one run above its inputs; meant for a fresh process."""
    torch.set_num_threads(options.threads)
    inputs = draw_inputs(options, options.items)
    # The first call of a process loads code and starts libraries, which is not the loss's memory.
    small = argparse.Namespace(**{**vars(options), "classes": 64})
    run(name, draw_inputs(small, 4))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(name, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    run(name, inputs)
    return resident_bytes("VmHWM") - before


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers: time as a ratio to the products alone, memory to the naive composition."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh_process:
        peaks = {name: fresh_process.submit(peak_bytes, name, options).result() for name in CONTENDERS}
    inputs = draw_inputs(options, options.items)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds + 1):
        for name in CONTENDERS:
            wait(options.device)
            wall, processor = time.perf_counter(), time.process_time()
            run(name, inputs)
            wait(options.device)
            if turn > 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    base, dense = list(CONTENDERS)[:2]
    return {
        name: {
            "seconds": statistics.median(wall for wall, _ in seconds[name]),
            "processor_seconds": statistics.median(processor for _, processor in seconds[name]),
            "peak_mib": peaks[name] / MIB,
            "time_ratio": ratio(seconds[name], seconds[base], 0),
            "processor_time_ratio": ratio(seconds[name], seconds[base], 1),
            "memory_ratio": peaks[name] / peaks[dense],
        }
        for name in CONTENDERS
    }


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--student", type=int, default=512, help="width of the student")
    parser.add_argument("--teacher", type=int, default=1024, help="width of the teacher")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("items", "classes", "student", "teacher", "dtype", "rounds")}
    results = {
        "environment": environment(device=options.device),
        "settings": {**settings, "temperature": TEMPERATURE},
        "results": measure(options),
    }
    text = json.dumps(results, indent=2)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    output = options.output or RESULTS / f"lm_head{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
