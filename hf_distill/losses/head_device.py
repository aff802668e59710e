"""Where the rows of a chunked head are one kernel: on GPUs, once a trial has shown that it gives what torch gives."""

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from hf_distill.losses.kernel_rows import KernelCase, KernelRows
from hf_distill.losses.mixtures import mixture_divergence

if TYPE_CHECKING:
    from hf_distill.losses.head_kernel import HeadKernel

KERNEL_DEVICES = ("cuda",)
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
logger = logging.get_logger(__name__)


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel may run there."""
    return device.type in KERNEL_DEVICES


def takes_kernel(logits: Tensor) -> bool:
    """Whether these logits are where the kernel runs, and of a dtype that it reads."""
    return has_kernel(logits.device) and logits.dtype in _TOLERANCES


@functools.cache
def proven_kernel(case: KernelCase) -> "HeadKernel | None":
    """The kernel, after a trial on a few random rows; None, with a warning, where it does not run or is wrong there.

    The host waits for the trial, once for each case.
    """
    try:
        # Triton comes with torch's builds for GPUs alone, and needs a C compiler for its launchers.
        from hf_distill.losses.head_kernel import BLOCK, HeadKernel

        kernel = HeadKernel(case)
        # Triton reads rows of odd lengths another way than those it can take four numbers of at once.
        error = max(_error_in_trial(kernel, case, classes=BLOCK + BLOCK // 2 - odd) for odd in (0, 1))
        reason = f"in a trial it was off by {error:.1e}"
    except Exception as raised:
        error, reason = math.inf, f"{type(raised).__name__}: {raised}"
    if error <= _TOLERANCES[case.gradient_dtype or torch.float32]:
        return kernel
    logger.warning_once(f"The kernel for a head's rows failed on {case.device}; torch forms them, slower. {reason}")
    return None


def _error_in_trial(kernel: "HeadKernel", case: KernelCase, *, classes: int) -> float:
    """The largest difference from float64 in values and gradient, each relative to its largest number."""
    rows = _random_rows(case, classes)
    expected, gradient = _expected(rows, case)
    found = [*kernel(rows)][: len(expected)]
    if rows.direction is not None:
        expected, found = [*expected, gradient], [*found, rows.direction]
    errors = [
        (one.double() - other).abs().max() / other.abs().max() for one, other in zip(found, expected, strict=True)
    ]
    return max(math.inf if math.isnan(error) else error for error in torch.stack(errors).tolist())


def _random_rows(case: KernelCase, classes: int, items: int = 4) -> KernelRows:
    """Rows of which the first has no weight in one term, the last none in the other, and both sides agree in one."""
    options: Any = {"generator": torch.Generator(case.device).manual_seed(0), "device": case.device}
    sizes = (classes, classes - 3 if case.is_wider else classes)
    student, teacher = (
        torch.randn(items, size, dtype=torch.float32, **options).mul_(3).to(dtype)
        for size, dtype in zip(sizes, case.dtypes, strict=True)
    )
    student[1, -4] = teacher[1, student.shape[-1] - 4] = 20
    weights = torch.rand(items, 3, dtype=torch.float32, **options).add_(0.5)
    weights[0, 0] = weights[-1, 1] = 0
    targets = torch.randint(classes, (items,), **options)
    direction = None if case.gradient_dtype is None else student.view(case.gradient_dtype)[:, :classes]
    return KernelRows(student, teacher, targets, weights, direction)


def _expected(rows: KernelRows, case: KernelCase) -> tuple[list[Tensor], Tensor]:
    """Cross-entropies, divergences and, if asked for, agreements; and the gradient; by torch, in float64."""
    student, teacher = rows.student.double(), rows.teacher.double()
    task, kd, inverse_temperature = rows.weights.double().unbind(-1)
    with torch.set_grad_enabled(rows.direction is not None):
        leaf = student.requires_grad_(rows.direction is not None)
        capped = leaf if case.softcap is None else case.softcap * torch.tanh(leaf / case.softcap)
        if case.teacher_softcap is not None:
            teacher = case.teacher_softcap * torch.tanh(teacher / case.teacher_softcap)
        cross_entropy = F.cross_entropy(capped, rows.targets, reduction="none")
        compared = capped[:, : teacher.shape[-1]]
        divergence = mixture_divergence(compared, teacher, 1 / inverse_temperature, case.form)
        # By the softened logits, of the divergence without temperature².
        loss = (task * cross_entropy + kd * inverse_temperature * divergence).sum()
    values = [cross_entropy, divergence * inverse_temperature.square()]
    if case.find_agreement:
        values.append((compared.argmax(-1) == teacher.argmax(-1)).double())
    gradient = torch.autograd.grad(loss, leaf)[0] if rows.direction is not None else student
    return [value.detach() for value in values], gradient
