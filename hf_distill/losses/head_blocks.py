"""Cross-entropy and a divergence of a block of rows of two heads' logits, in place and in few passes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.head_formulas import Exponentials, Formula, Sums
from hf_distill.losses.row_gradient import clear_rows, extremes, may_read

LOG2_E = math.log2(math.e)
_LOG_2 = math.log(2)
_NO_TARGET = -100
# Between these a sum of exponentials is as exact as one whose largest is 1, and so are its quotients with another, and
# the sum of their squares.
_SMALLEST_SUM, _LARGEST_SUM = 2.0**-24, 2.0**40
# Powers of two sides whose sums differ by more have differences that round to more than their distances do.
_LARGEST_QUOTIENT = 2.0**4

# (rows, shared) logits of student and teacher and targets (rows,) -> (rows,) values.
Values = Callable[[Tensor, Tensor, Tensor], Tensor]


class Chunk(NamedTuple):
    """What the blocks of a chunk have in common; each column is (items, 1)."""

    targets: Tensor
    labels: Tensor  # the targets, and a class where there need not be one
    task: Tensor  # the weight of the cross-entropy
    kd: Tensor  # that of the divergence
    weight: Tensor  # that of the divergence's gradient by the softened logits
    temperature: Tensor
    inverse_temperature: Tensor
    divergence: Tensor  # written, where there is no formula
    agreement: Tensor  # written
    scratch: tuple[Tensor, ...]  # 5 or 6 of (at least the rows of a block, classes)
    may_weigh_nothing: bool  # whether an item may have no weight in the divergence
    # Whether rows of the direction are yet to be multiplied by their weight times the formula's factor.
    has_shares: bool
    balance: Tensor | None  # with shares and labels: task / weight


class Labelled(NamedTuple):
    """What the cross-entropy of rows and its gradient are made of."""

    exps: Tensor  # (rows, classes) powers of two proportional to the student's probabilities
    labels: Tensor  # (rows, 1)
    total: Tensor  # (rows, 1) the sums of the powers
    of_label: Tensor  # (rows, 1) which power the label's is


class Rows(NamedTuple):
    """A block of a chunk's rows."""

    student: Tensor  # (rows, classes) logits after the softcap; used up
    teacher: Tensor  # (rows, shared), likewise
    direction: Tensor | None  # (rows, classes), written; in the memory of `student`, row by row
    start: int
    chunk: Chunk

    def of(self, column: Tensor) -> Tensor:
        """(rows, 1) of a column of the chunk: few are needed, and each takes as long as 5,000 logits do."""
        return column.narrow(0, self.start, self.student.shape[0])

    def buffer(self, index: int, like: Tensor) -> Tensor:
        """Some of the scratch in the shape of `like`."""
        buffer = self.chunk.scratch[index]
        return buffer if buffer.shape == like.shape else buffer.flatten()[: like.numel()].view(like.shape)

    def soften(self, temperature: Tensor) -> None:
        """Takes (rows,) temperatures over."""
        column = self.of(self.chunk.temperature).copy_(temperature.unsqueeze(-1))
        torch.reciprocal(column, out=self.of(self.chunk.inverse_temperature))

    def powers(self, logits: Tensor, factor: float | None, *, spare: int) -> Tensor:
        """The logits of either side times a factor, in their own memory if it may be, or else in the spare buffer.

        Args:
            logits: of either side.
            factor: makes the largest of each row about 0 too; None for logits that came multiplied.
            spare: the buffer.
        """
        dtype = self.chunk.scratch[0].dtype
        is_whole = self.direction is None or logits.dtype == self.direction.dtype
        in_place = logits.dtype == dtype and (is_whole or logits is self.teacher)
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
    factors: tuple[float, float] | None,
    temperature: float | None,
    has_labels: bool,
) -> tuple[Sums, Labelled | None]:
    """The two terms at once: writes the gradient, and returns what the values of either are made of.

    Args:
        rows: the block.
        formula: of the divergence.
        factors: what makes the logits of student and teacher powers of two, softened by the temperature if it is one;
            None for those that came so.
        temperature: of all items; None where each has its own.
        has_labels: whether any row counts in the cross-entropy.
    """
    shared = rows.teacher.shape[-1]
    compared = rows.student if has_labels else leading(rows.student, shared)
    of_student, of_teacher = factors or (None, None)
    student, teacher = rows.powers(compared, of_student, spare=0), rows.powers(rows.teacher, of_teacher, spare=2)
    own = labelled = None
    if has_labels and temperature in (1, 2) and student.shape[-1] == shared:
        own, labelled = _both_exponentials(rows, student, int(temperature))
    elif has_labels:
        labelled = _labelled(rows, student, teacher, temperature)
    student = leading(student, shared)
    if temperature is None:
        inverse = rows.of(rows.chunk.inverse_temperature)
        student.mul_(inverse)
        teacher.mul_(inverse)
    scratch = rows.buffer(4, teacher)
    own = own or _exponentials(student, out=scratch, is_part=compared.shape[-1] > shared)
    other = _exponentials(teacher, out=rows.buffer(3, teacher))
    _bring_near(teacher, *other, own[1])
    out = None if rows.direction is None else leading(rows.direction, shared)
    gradient = out if out is not None and out.dtype == scratch.dtype else other[0]
    exps, totals = zip(own, other, strict=True)
    block = Exponentials(student, teacher, *exps, *totals, scratch, gradient, needs_gradient=out is not None)
    sums = Sums(*totals, formula.write(block))
    if out is not None and labelled is not None and rows.chunk.balance is not None:
        _add_in_units(rows, gradient, formula.factor(sums), labelled, out)
    elif out is not None:
        _weigh_and_add(rows, gradient, None if rows.chunk.has_shares else formula.factor(sums), labelled, out)
    return sums, labelled


def _add_in_units(rows: Rows, gradient: Tensor, factor: Tensor | float, labelled: Labelled, out: Tensor) -> None:
    """Adds the gradients of both terms in units of the divergence's, by which rows are to be multiplied later.

    Args:
        rows: the block; all of its direction is written.
        gradient: of the divergence, but for its factor.
        factor: the factor.
        labelled: the cross-entropy.
        out: the leading classes of the direction.
    """
    chunk, shared, direction = rows.chunk, out.shape[-1], rows.direction
    assert direction is not None
    assert chunk.balance is not None
    task = rows.of(chunk.balance) / factor
    weight = task / labelled.total
    torch.addcmul(gradient, leading(labelled.exps, shared), weight, out=out)
    if shared < direction.shape[-1]:
        torch.mul(labelled.exps[:, shared:], weight, out=direction[:, shared:])
    direction.scatter_add_(-1, labelled.labels, task.neg_())


def _weigh_and_add(
    rows: Rows, gradient: Tensor, factor: Tensor | float | None, labelled: Labelled | None, out: Tensor
) -> None:
    """Weighs the gradients of both terms, either of which may weigh nothing, and adds them.

    Args:
        rows: the block; all of its direction is written.
        gradient: of the divergence, but for its factor; used up.
        factor: the factor; None where rows are to be multiplied by it and their weight later.
        labelled: the cross-entropy; None without labels.
        out: the leading classes of the direction.
    """
    chunk, shared, direction = rows.chunk, out.shape[-1], rows.direction
    assert direction is not None
    if chunk.may_weigh_nothing:
        clear_rows(gradient, rows.of(chunk.kd))
    if factor is not None:
        weight = rows.of(chunk.weight) * factor
        if chunk.may_weigh_nothing:
            weight.masked_fill_(rows.of(chunk.kd) == 0, 0.0)  # a factor may be NaN there
        torch.mul(gradient, weight, out=out if labelled is None else gradient)
    if labelled is not None:
        _write_labelled_gradient(rows, labelled)
        torch.add(leading(labelled.exps, shared), gradient, out=out)
    if shared < direction.shape[-1]:
        direction[:, shared:] = 0 if labelled is None else labelled.exps[:, shared:]


def leading(logits: Tensor, classes: int) -> Tensor:
    """(rows, classes) of as many or more."""
    return logits if logits.shape[-1] == classes else logits[:, :classes]


def write_apart(rows: Rows, values_of: Values, *, has_labels: bool) -> Labelled | None:
    """The two terms one after the other; the divergence writes its value and forms its own gradient.

    Returns: what the cross-entropy's values are made of.
    """
    shared, direction = rows.teacher.shape[-1], rows.direction
    # A label beyond the shared classes is none to the divergence.
    targets = rows.of(rows.chunk.targets)
    targets = targets.masked_fill((targets < 0) | (targets >= shared), _NO_TARGET)
    leaf = leading(rows.student, shared).detach().requires_grad_(direction is not None)
    with torch.set_grad_enabled(direction is not None):
        values = values_of(leaf, rows.teacher, targets.squeeze(-1))
    rows.of(rows.chunk.divergence).copy_(values.detach().unsqueeze(-1))
    gradient = None
    if direction is not None:
        kd = rows.of(rows.chunk.kd)
        (gradient,) = torch.autograd.grad(values, leaf, kd.squeeze(-1).to(values.dtype))
        clear_rows(gradient, kd)
    if not has_labels:
        if direction is not None and gradient is not None:
            direction[:, :shared] = gradient
            direction[:, shared:] = 0
        return None
    labelled = _labelled(rows, rows.powers(rows.student, LOG2_E, spare=0))
    if direction is not None and gradient is not None:
        _write_labelled_gradient(rows, labelled)
        labelled.exps[:, :shared] += gradient
        direction.copy_(labelled.exps)
    return labelled


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
    smallest, largest = extremes(total)
    if smallest >= _SMALLEST_SUM and largest <= _LARGEST_SUM:
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
    smallest, largest = extremes(quotient)
    if smallest >= 1 / _LARGEST_QUOTIENT and largest <= _LARGEST_QUOTIENT:
        return
    offset = quotient.log2_().round_()
    offset = torch.where(offset.abs() > math.log2(_LARGEST_QUOTIENT), offset, 0.0)  # 0 where it is NaN
    powers.sub_(offset)
    for scaled in (exps, total):
        scaled.mul_(offset.neg().exp2_())


def _labelled(rows: Rows, powers: Tensor, beside: Tensor | None = None, temperature: float | None = None) -> Labelled:
    """The cross-entropy of the student's powers.

    Args:
        rows: the block.
        powers: (rows, classes).
        beside: as `_exponentials` has it.
        temperature: that the powers were softened by; None where they were not.
    """
    if temperature not in (None, 1):
        powers, beside = torch.mul(powers, temperature, out=rows.buffer(3, powers)), None
    exps, total = _exponentials(powers, out=rows.buffer(1, powers), beside=beside)
    labels = rows.of(rows.chunk.labels)
    return Labelled(exps, labels, total, powers.gather(-1, labels))


def _both_exponentials(rows: Rows, powers: Tensor, temperature: int) -> tuple[tuple[Tensor, Tensor], Labelled]:
    """`_exponentials` of powers softened by 1 or 2, and the cross-entropy of what they were before."""
    exps, total = own = _exponentials(powers, out=rows.buffer(1 if temperature == 1 else 4, powers))
    labels = rows.of(rows.chunk.labels)
    of_label = powers.gather(-1, labels)
    if temperature == 2:
        exps = torch.square(exps, out=rows.buffer(1, powers))  # takes a third of another exp2
        total, of_label = exps.sum(-1, keepdim=True), of_label.mul_(2)
    return own, Labelled(exps, labels, total, of_label)


def cross_entropy(total: Tensor, of_label: Tensor) -> Tensor:
    """(rows, 1) of columns of `Labelled`."""
    return total.log2().sub_(of_label).mul_(_LOG_2)


def _write_labelled_gradient(rows: Rows, labelled: Labelled) -> None:
    """Writes task * (p - onehot) over the exponentials."""
    task = rows.of(rows.chunk.task)
    clear_rows(labelled.exps.mul_(task / labelled.total), task)
    labelled.exps.scatter_add_(-1, labelled.labels, -task)
