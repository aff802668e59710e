"""Cross-entropy and a divergence of a block of rows of two heads' logits, in place and in few passes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.head_formulas import Exponentials, Formula
from hf_distill.losses.row_gradient import clear_rows, may_read

LOG2_E = math.log2(math.e)
_LOG_2 = math.log(2)
_NO_TARGET = -100
# Between these a sum of exponentials is as exact as one whose largest is 1, and so are its quotients with another.
_SMALLEST_SUM, _LARGEST_SUM = 2.0**-24, 2.0**40
# Powers of two sides whose sums differ by more have differences that round to more than their distances do.
_LARGEST_QUOTIENT = 2.0**4

# (rows, shared) logits of student and teacher and targets (rows,) -> (rows,) values.
Values = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """A block of rows; what has one column per row is (rows, 1)."""

    student: Tensor  # (rows, classes) logits after the softcap; used up
    teacher: Tensor  # (rows, shared), likewise
    targets: Tensor
    task: Tensor  # the weight of the cross-entropy
    kd: Tensor  # that of the divergence
    temperature: Tensor
    inverse_temperature: Tensor
    cross_entropy: Tensor  # written
    divergence: Tensor  # written; by a formula without temperature²
    agreement: Tensor
    share: Tensor | None  # written with what the direction is yet to be multiplied by; None where it may be nothing
    direction: Tensor | None  # (rows, classes), written; in the memory of `student`, row by row
    scratch: Tensor  # (5 or 6, at least rows, classes)
    may_weigh_nothing: bool  # whether a row may have no weight in the divergence

    @property
    def own_targets(self) -> Tensor:
        """The targets, and a class where there need not be one."""
        return self.targets.masked_fill(self.task == 0, 0)

    def buffer(self, index: int, like: Tensor) -> Tensor:
        """Some of the scratch in the shape of `like`."""
        buffer = self.scratch[index]
        return buffer if buffer.shape == like.shape else buffer.flatten()[: like.numel()].view(like.shape)

    def soften(self, temperature: Tensor) -> None:
        """Takes (rows,) temperatures over."""
        self.temperature.copy_(temperature.unsqueeze(-1))
        torch.reciprocal(self.temperature, out=self.inverse_temperature)

    def powers(self, logits: Tensor, factor: float | None, *, spare: int) -> Tensor:
        """The logits of either side times a factor, in their own memory if it may be, or else in the spare buffer.

        Args:
            logits: of either side.
            factor: makes the largest of each row about 0 too; None for logits that came multiplied.
            spare: the buffer.
        """
        is_whole = self.direction is None or logits.dtype == self.direction.dtype
        in_place = logits.dtype == self.scratch.dtype and (is_whole or logits is self.teacher)
        out = logits if in_place else self.buffer(spare, logits)
        if logits.dtype != out.dtype:  # bfloat16 costs half the time if it is converted first
            logits = out.copy_(logits)
        if factor is not None:
            # What rounding the maximum does is the same in a whole row, and so nothing to its softmax; the product is
            # not rounded where there are fused multiply-adds.
            return torch.add(logits.amax(-1, keepdim=True).mul_(-factor), logits, alpha=factor, out=out)
        return logits if logits is out else out.copy_(logits)


def write_together(
    rows: Rows,
    formula: Formula,
    *,
    kd: Tensor,
    factors: tuple[float, float] | None,
    softening: float | Tensor,
    has_labels: bool,
) -> None:
    """The two terms at once.

    Args:
        rows: the block.
        formula: of the divergence.
        kd: (rows, 1) the weight of its gradient by the softened logits.
        factors: what makes the logits of student and teacher powers of two; None for those that came so.
        softening: what is then left to soften both by, a number or (rows, 1).
        has_labels: whether any row counts in the cross-entropy, which is of the powers before.
    """
    shared = rows.teacher.shape[-1]
    compared = rows.student if has_labels else leading(rows.student, shared)
    of_student, of_teacher = factors or (None, None)
    student, teacher = rows.powers(compared, of_student, spare=0), rows.powers(rows.teacher, of_teacher, spare=2)
    labelled = _write_cross_entropy(rows, student, teacher) if has_labels else None
    is_part = student.shape[-1] > shared
    student, scratch = leading(student, shared), rows.buffer(4, teacher)
    is_softened = isinstance(softening, Tensor) or softening != 1
    if is_softened:
        student.mul_(softening)
        teacher.mul_(softening)
    if labelled is None or is_part or is_softened:
        own = _exponentials(student, out=scratch, is_part=is_part)
    else:
        own = labelled
    other = _exponentials(teacher, out=rows.buffer(3, teacher))
    _bring_near(teacher, *other, own[1])
    out = None if rows.direction is None else leading(rows.direction, shared)
    gradient = out if labelled is None and rows.share is not None and out is not None else other[0]
    exps, totals = zip(own, other, strict=True)
    result = formula(
        Exponentials(student, teacher, *exps, *totals, scratch, gradient, rows.divergence, out is not None)
    )
    if out is None or result is None:
        return
    gradient, factor = result
    weight = kd * factor
    if rows.may_weigh_nothing:
        clear_rows(gradient, rows.kd)
        weight.masked_fill_(rows.kd == 0, 0.0)  # a factor may be NaN there
    if gradient is out and rows.share is not None:
        rows.share.copy_(weight)
    elif labelled is None:
        torch.mul(gradient, weight, out=out)
    else:
        gradient.mul_(weight)
    _complete(rows, gradient, out, labelled)


def _complete(rows: Rows, gradient: Tensor, out: Tensor, labelled: tuple[Tensor, Tensor] | None) -> None:
    """Adds the gradient of the cross-entropy, if there are labels, and writes that of the classes not compared."""
    shared, direction = out.shape[-1], rows.direction
    if labelled is not None:
        _write_cross_entropy_gradient(rows, *labelled)
        # Two passes with the one before: of three operands, one of them a column, a CPU makes one slow one.
        torch.add(leading(labelled[0], shared), gradient, out=out)
    if direction is not None and shared < direction.shape[-1]:
        direction[:, shared:] = 0 if labelled is None else labelled[0][:, shared:]


def leading(logits: Tensor, classes: int) -> Tensor:
    """(rows, classes) of as many or more."""
    return logits if logits.shape[-1] == classes else logits[:, :classes]


def write_apart(rows: Rows, values_of: Values, *, has_labels: bool) -> None:
    """The two terms one after the other; the divergence forms its own gradient."""
    shared, direction = rows.teacher.shape[-1], rows.direction
    # A label beyond the shared classes is none to the divergence.
    targets = rows.targets.masked_fill((rows.targets < 0) | (rows.targets >= shared), _NO_TARGET)
    leaf = leading(rows.student, shared).detach().requires_grad_(direction is not None)
    with torch.set_grad_enabled(direction is not None):
        values = values_of(leaf, rows.teacher, targets.squeeze(-1))
    rows.divergence.copy_(values.detach().unsqueeze(-1))
    gradient = None
    if direction is not None:
        (gradient,) = torch.autograd.grad(values, leaf, rows.kd.squeeze(-1).to(values.dtype))
        clear_rows(gradient, rows.kd)
    if not has_labels:
        if direction is not None and gradient is not None:
            direction[:, :shared] = gradient
            direction[:, shared:] = 0
        return
    exps, total = _write_cross_entropy(rows, rows.powers(rows.student, LOG2_E, spare=0))
    if direction is not None and gradient is not None:
        _write_cross_entropy_gradient(rows, exps, total)
        exps[:, :shared] += gradient
        direction.copy_(exps)


def _exponentials(
    powers: Tensor, *, out: Tensor, beside: Tensor | None = None, is_part: bool = False
) -> tuple[Tensor, Tensor]:
    """Writes 2 ** powers, and returns it with its sums, (rows, 1).

    On a CPU the powers of a row whose sum is too large or too small are made less by their maximum, in place: looking
    whether there is one costs nothing, and the maximum a pass. A row's result does not depend on the others. Elsewhere
    looking would wait, and powers have to come with maxima of about 0.

    On a CPU `exp2` costs a third of `softmax`; so does `exp`, but 30 times as much where its results are denormal or 0
    (torch 2.13 with MKL).

    Args:
        powers: (rows, classes).
        out: as `powers`.
        beside: (rows, any) powers that are made less in the same rows, each by its own maximum: equal ones stay equal.
        is_part: whether the powers may lack their row's maximum.
    """
    if not may_read(powers):
        if is_part:
            powers.sub_(powers.amax(-1, keepdim=True))
        return out, torch.exp2(powers, out=out).sum(-1, keepdim=True)
    total = torch.exp2(powers, out=out).sum(-1, keepdim=True)
    smallest, largest = total.aminmax()
    if float(smallest) >= _SMALLEST_SUM and float(largest) <= _LARGEST_SUM:  # neither where one is NaN
        return out, total
    is_fine = (total >= _SMALLEST_SUM) & (total <= _LARGEST_SUM)
    for side in (powers,) if beside is None else (powers, beside):
        side.sub_(side.amax(-1, keepdim=True).masked_fill_(is_fine, 0.0))
    return out, torch.exp2(powers, out=out).sum(-1, keepdim=True)


def _bring_near(powers: Tensor, exps: Tensor, total: Tensor, other: Tensor) -> None:
    """Divides the exponentials of rows whose sum is far from that of the other side's by a power of two."""
    if not may_read(total):
        return
    quotient = total / other
    smallest, largest = quotient.aminmax()
    if float(smallest) >= 1 / _LARGEST_QUOTIENT and float(largest) <= _LARGEST_QUOTIENT:
        return
    offset = quotient.log2_().round_()
    offset = torch.where(offset.abs() > math.log2(_LARGEST_QUOTIENT), offset, 0.0)  # 0 where it is NaN
    powers.sub_(offset)
    for scaled in (exps, total):
        scaled.mul_(offset.neg().exp2_())


def _write_cross_entropy(rows: Rows, powers: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Writes the cross-entropy of the student's powers, and returns what `_exponentials` does."""
    exps, total = _exponentials(powers, out=rows.buffer(1, powers), beside=beside)
    torch.mul(total.log2().sub_(powers.gather(-1, rows.own_targets)), _LOG_2, out=rows.cross_entropy)
    return exps, total


def _write_cross_entropy_gradient(rows: Rows, exps: Tensor, total: Tensor) -> None:
    """Writes task * (p - onehot) over `exps`."""
    clear_rows(exps.mul_(rows.task / total), rows.task)
    exps.scatter_add_(-1, rows.own_targets, -rows.task)
