"""Value and gradient of the losses on given logits: time and peak memory against the naive composition.

    python -m benchmarks.loss_kernels                  # one CPU thread, float32 and bfloat16
    python -m benchmarks.loss_kernels --cases cross_entropy_and_forward_kl --temperatures 2 --dtypes float32
    python -m benchmarks.loss_kernels --device cuda --items 8192 --classes 152000

Writes benchmarks/results/loss_kernels.json (loss_kernels-cuda.json on a GPU). On a CPU it needs Linux, which keeps the
peak of a process's resident memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import re
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
from hf_distill.losses import forward_kl
from hf_distill.losses.fused import cross_entropy_and_forward_kl

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
CHECKED_ROWS = 16
TASK_WEIGHT = KD_WEIGHT = 0.5


class Inputs(NamedTuple):
    """What a loss is given."""

    student_logits: Tensor  # (items, classes), with gradient
    teacher_logits: Tensor  # (items, classes)
    targets: Tensor  # (items,)


def naive(inputs: Inputs, temperature: float) -> Tensor:
    """The composition that tutorials show, in float32, as a mean over the items."""
    log_probs = functional.log_softmax(inputs.student_logits.float() / temperature, dim=-1)
    teacher_probs = functional.softmax(inputs.teacher_logits.float() / temperature, dim=-1)
    return functional.kl_div(log_probs, teacher_probs, reduction="batchmean") * temperature**2


def ours(inputs: Inputs, temperature: float) -> Tensor:
    """`hf_distill.forward_kl`."""
    return forward_kl(inputs.student_logits, inputs.teacher_logits, temperature=temperature).mean()


def with_cross_entropy(kd: Callable[[Inputs, float], Tensor]) -> Callable[[Inputs, float], Tensor]:
    """The loss beside torch's cross-entropy, in float32 as Transformers' own."""

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        cross_entropy = functional.cross_entropy(inputs.student_logits.float(), inputs.targets)
        return TASK_WEIGHT * cross_entropy + KD_WEIGHT * kd(inputs, temperature)

    return loss


def fused(inputs: Inputs, temperature: float, *, overwrite_teacher: bool = False) -> Tensor:
    """`hf_distill.losses.fused.cross_entropy_and_forward_kl`."""
    share = torch.full_like(inputs.targets, 1 / len(inputs.targets), dtype=torch.float32)
    loss, _, _ = cross_entropy_and_forward_kl(
        *inputs,
        task_weights=TASK_WEIGHT * share,
        kd_weights=KD_WEIGHT * share,
        temperature=temperature,
        overwrite_teacher=overwrite_teacher,
    )
    return loss


# The first contender of a case is what the others are compared with.
CASES: dict[str, dict[str, Callable[[Inputs, float], Tensor]]] = {
    "forward_kl": {"naive": naive, "forward_kl": ours},
    "cross_entropy_and_forward_kl": {
        "naive": with_cross_entropy(naive),
        "cross_entropy + forward_kl": with_cross_entropy(ours),
        "fused": fused,
        "fused, over the teacher": functools.partial(fused, overwrite_teacher=True),
    },
}


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

    def value_and_gradient(loss: Callable[[Inputs, float], Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = Inputs(student.to(dtype, copy=True).requires_grad_(), teacher.to(dtype, copy=True), targets)
        value = loss(inputs, setting.temperature)
        (gradient,) = torch.autograd.grad(value, inputs.student_logits)
        return [value.detach().double(), gradient.double()]

    def forward_kl_in_float64(inputs: Inputs, temperature: float) -> Tensor:
        student_log_probs = functional.log_softmax(inputs.student_logits / temperature, dim=-1)
        teacher_log_probs = functional.log_softmax(inputs.teacher_logits / temperature, dim=-1)
        terms = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
        return terms.sum(-1).mean() * temperature**2

    def with_cross_entropy_in_float64(inputs: Inputs, temperature: float) -> Tensor:
        cross_entropy = functional.cross_entropy(inputs.student_logits, inputs.targets)
        return TASK_WEIGHT * cross_entropy + KD_WEIGHT * forward_kl_in_float64(inputs, temperature)

    in_float64 = forward_kl_in_float64 if setting.case == "forward_kl" else with_cross_entropy_in_float64
    exact = value_and_gradient(in_float64, torch.float64)
    found = {name: value_and_gradient(loss, student.dtype) for name, loss in CASES[setting.case].items()}
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


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = itertools.starmap(Setting, itertools.product(options.cases, options.dtypes, options.temperatures))
    results = {
        "environment": environment(device=options.device),
        "settings": {name: getattr(options, name) for name in ("items", "classes", "rounds")},
        "results": [{**setting._asdict(), "contenders": measure(options, setting)} for setting in settings],
    }
    text = json.dumps(results, indent=2)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    output = options.output or RESULTS / f"loss_kernels{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
