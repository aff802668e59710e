"""Cross-entropy and a divergence of a few rows of two heads' logits, with the gradient written over the student's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.losses.divergence import sum_of_possible
from hf_distill.losses.row_gradient import clear_rows, may_read, row_blocks, rows_per_block
from hf_distill.signals import LogitFactors

_NO_TARGET = -100
_LOG_2, _LOG2_E = math.log(2), math.log2(math.e)


@dataclass(frozen=True)
class Divergence:
    """A registered loss of logits that compares position by position, with its options.

    Attributes:
        spec: the loss; by default `forward_kl`.
        options: its own keywords.

    Raises:
        ValueError: a loss of something else, or one that compares items with each other.
    """

    spec: LossSpec = field(default_factory=lambda: LOSSES.get("forward_kl"))
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.spec.feature != "logits" or self.spec.compares_rows:
            raise ValueError(
                f"{self.spec.name} compares more than the logits of one position, so it cannot be formed chunk by "
                "chunk. Form the logits of all items and call the loss itself."
            )

    def __call__(self, student: Tensor, teacher: Tensor, *, temperature: Tensor, targets: Tensor) -> Tensor:
        """(rows,) values of (rows, classes) logits."""
        filled: dict[str, Any] = {"temperature": temperature} if self.spec.takes_temperature else {}
        if self.spec.takes_targets:
            filled["targets"] = targets
        return self.spec.function(student, teacher, **filled, **self.options)


class HeadItems(NamedTuple):
    """(items, 1) each: what an item has beside its hidden states, and its values."""

    targets: Tensor
    task: Tensor
    kd: Tensor
    temperature: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class RowLosses:
    """The two terms of rows of logits, a block of rows at a time, while they are in the processor's cache.

    Args:
        divergence: the divergence.
        student: whose scale and softcap the gradient passes.
        teacher_softcap: of the teacher's logits.
        one_softmax: whether the temperature is 1 and both have the same classes.
    """

    def __init__(
        self, divergence: Divergence, student: LogitFactors, teacher_softcap: float | None, *, one_softmax: bool
    ) -> None:
        self._divergence, self._one_softmax = divergence, one_softmax
        self._scale, self._softcap, self._teacher_softcap = student.scale, student.softcap, teacher_softcap

    def walk(self, logits: Tensor, teacher_logits: Tensor, items: HeadItems, direction: Tensor | None) -> None:
        """Writes the values of a chunk's items, and over its logits their gradient before scale.

        Args:
            logits: (items, classes) before the softcap; used up.
            teacher_logits: (items, shared) of the leading classes, likewise.
            items: the items; their values are written.
            direction: (items, classes) in the memory of `logits`, row by row; None where no gradient is asked for.
        """
        is_kl = self._divergence.spec.name == "forward_kl"
        buffers = 5 if self._softcap is None else 6
        rows = rows_per_block(logits, buffers=buffers, dtype=items.task.dtype)
        scratch = torch.empty(buffers, rows * logits.shape[-1], dtype=items.task.dtype, device=logits.device)
        weights = [items.task * self._scale, items.kd * self._scale]
        if is_kl:
            weights[1].mul_(items.temperature)
        per_item = [items.targets, *weights, items.temperature, items.temperature.reciprocal()]
        tensors = [logits, teacher_logits, *per_item, items.cross_entropy, items.divergence]
        for student, teacher, *columns in row_blocks([*tensors, *([] if direction is None else [direction])], rows):
            out = None if direction is None else columns.pop()
            slope = None
            if self._softcap is not None:
                slope = _cap(student, self._softcap, slope=scratch[5])
            if self._teacher_softcap is not None:
                _cap(teacher, self._teacher_softcap)
            targets, task, kd, temperature, inverse, cross_entropy, value = columns
            part = _Rows(student, teacher, targets, task, kd, temperature, inverse, cross_entropy, value, out, scratch)
            if is_kl:
                _forward_kl(part, one_softmax=self._one_softmax)
            else:
                _apart(part, self._divergence)
            if out is not None and slope is not None:
                out.mul_(slope)
        if is_kl:
            items.divergence.mul_(items.temperature.square())
        items.cross_entropy.masked_fill_(items.task == 0, 0.0)
        items.divergence.masked_fill_(items.kd == 0, 0.0)


class _Rows(NamedTuple):
    """A block of rows; what has one column per row is (rows, 1)."""

    student: Tensor  # (rows, classes)
    teacher: Tensor  # (rows, shared)
    targets: Tensor
    task: Tensor  # the weight of the cross-entropy's gradient
    kd: Tensor  # that of the divergence's; of forward KL times the temperature
    temperature: Tensor
    inverse_temperature: Tensor
    cross_entropy: Tensor  # written
    divergence: Tensor  # written; of forward KL without temperature²
    direction: Tensor | None  # (rows, classes), written
    scratch: Tensor  # (5 or 6, at least rows * classes)

    def buffers(self, first: int, like: Tensor, count: int) -> list[Tensor]:
        """Some of the scratch, each in the shape of `like`."""
        return [buffer[: like.numel()].view(like.shape) for buffer in self.scratch[first : first + count]]


def _forward_kl(rows: _Rows, *, one_softmax: bool) -> None:
    """Forward KL and cross-entropy, as in `losses.fused`, in fewer passes and without its equality to the bit."""
    shared = rows.teacher.shape[-1]
    student, exps = rows.buffers(0, rows.student, 2)
    teacher, teacher_exps = rows.buffers(2, rows.teacher, 2)
    total = _write_cross_entropy(rows, powers=student, exps=exps)
    student_exps, student_total = exps, total
    if not one_softmax:
        (student_exps,) = rows.buffers(4, rows.teacher, 1)
        if shared < rows.student.shape[-1]:
            (student,) = rows.buffers(0, rows.teacher, 1)
            _write_powers(rows.student[:, :shared], out=student)
        torch.exp2(student.mul_(rows.inverse_temperature), out=student_exps)
        student_total = student_exps.sum(-1, keepdim=True)
    _write_powers(rows.teacher, out=teacher)
    if not one_softmax:
        teacher.mul_(rows.inverse_temperature)
    torch.exp2(teacher, out=teacher_exps)
    teacher_total = teacher_exps.sum(-1, keepdim=True)
    expected = sum_of_possible(teacher.sub_(student).mul_(teacher_exps)).div_(teacher_total)
    torch.add((student_total / teacher_total).log_(), expected, alpha=_LOG_2, out=rows.divergence)
    if rows.direction is None:
        return
    # The teacher's less the student's probabilities, times the teacher's total: exactly 0 where both agree.
    difference = teacher_exps.addcmul_(student_exps, teacher_total / student_total, value=-1)
    clear_rows(difference, rows.kd)
    _write_cross_entropy_gradient(rows, exps, total)
    difference.mul_((rows.kd / teacher_total).masked_fill_(rows.kd == 0, 0.0))  # the total may be NaN there
    # Two passes: of three operands, one of them a column, a CPU makes one slow one.
    torch.sub(exps[:, :shared], difference, out=rows.direction[:, :shared])
    rows.direction[:, shared:] = exps[:, shared:]


def _apart(rows: _Rows, divergence: Divergence) -> None:
    """The two terms one after the other; the divergence forms its own gradient."""
    shared, direction = rows.teacher.shape[-1], rows.direction
    # A label beyond the shared classes is none to the divergence.
    targets = rows.targets.masked_fill((rows.task == 0) | (rows.targets >= shared), _NO_TARGET)
    leaf = rows.student[:, :shared].detach().requires_grad_(direction is not None)
    with torch.set_grad_enabled(direction is not None):
        values = divergence(leaf, rows.teacher, temperature=rows.temperature.squeeze(-1), targets=targets.squeeze(-1))
    rows.divergence.copy_(values.detach().unsqueeze(-1))
    gradient = None
    if direction is not None:
        (gradient,) = torch.autograd.grad(values, leaf, rows.kd.squeeze(-1).to(values.dtype))
        clear_rows(gradient, rows.kd)
    if may_read(rows.task) and not bool(rows.task.any()):
        if direction is not None and gradient is not None:
            direction[:, :shared] = gradient
            direction[:, shared:] = 0
        return
    powers, exps = rows.buffers(0, rows.student, 2)
    total = _write_cross_entropy(rows, powers=powers, exps=exps)
    if direction is not None and gradient is not None:
        _write_cross_entropy_gradient(rows, exps, total)
        exps[:, :shared] += gradient
        direction.copy_(exps)


def _write_cross_entropy(rows: _Rows, *, powers: Tensor, exps: Tensor) -> Tensor:
    """Writes the cross-entropy, and both of (rows, classes); returns the sums of `exps`, (rows, 1)."""
    _write_powers(rows.student, out=powers)
    torch.exp2(powers, out=exps)
    total = exps.sum(-1, keepdim=True)
    torch.sub(total.log(), powers.gather(-1, rows.targets), alpha=_LOG_2, out=rows.cross_entropy)
    return total


def _write_cross_entropy_gradient(rows: _Rows, exps: Tensor, total: Tensor) -> None:
    """Writes task * (p - onehot) over `exps`."""
    clear_rows(exps.mul_(rows.task / total), rows.task)
    exps.scatter_add_(-1, rows.targets, -rows.task)


def _write_powers(logits: Tensor, *, out: Tensor) -> None:
    """Writes logarithms to base 2 of what is proportional to the softmax, the largest of each row about 0.

    On a CPU `exp2` costs a third of `softmax`; so does `exp`, but 30 times as much where its results are denormal or 0
    (torch 2.13 with MKL).
    """
    if logits.dtype != out.dtype:  # bfloat16 costs half the time if it is converted first
        logits = out.copy_(logits)
    # What rounding the maximum does is the same in a whole row, and so nothing to its softmax.
    torch.add(logits.amax(-1, keepdim=True).mul_(-_LOG2_E), logits, alpha=_LOG2_E, out=out)


def _cap(logits: Tensor, softcap: float, *, slope: Tensor | None = None) -> Tensor | None:
    """Caps (rows, classes) logits in place; returns its derivative at each of them, in the memory of `slope`."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        slope = slope[: logits.numel()].view(logits.shape)
        slope.copy_(logits).square_().neg_().add_(1)
    logits.mul_(softcap)
    return slope
