"""Divergences of a few rows from what a softmax is made of, in place and in few passes, for a chunked head.

They are those of `losses.divergence` and `losses.mixtures`, in fewer passes and without their equality to the bit.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.divergence import sum_and_look, sum_of_possible
from hf_distill.losses.mixtures import Mixture, mixture_of
from hf_distill.losses.row_gradient import clear_rows

_LOG_2 = math.log(2)
# With larger shares the rounding of 1 + w is lost in that of w, and a CPU's log takes a third of log1p's time.
_SMALL_SHARE = 1 / 16
_MIXTURES = ("jsd", "generalized_jsd", "skewed_kl", "skewed_reverse_kl")


class Exponentials(NamedTuple):
    """A block of rows as a formula gets it; every tensor but `student_exps` may be written over."""

    student: Tensor  # (rows, classes) softened logits to base 2, near enough to 0 for sums of their powers
    teacher: Tensor  # as `student`
    student_exps: Tensor  # (rows, classes) 2 ** student
    teacher_exps: Tensor  # (rows, classes) 2 ** teacher
    student_total: Tensor  # (rows, 1) the sums of `student_exps`
    teacher_total: Tensor  # (rows, 1) the sums of `teacher_exps`
    scratch: Tensor  # (rows, classes); may be `student_exps`, where a formula has read it for the last time
    gradient: Tensor  # (rows, classes), to be written; it may be the memory of `student` or `teacher_exps`
    needs_gradient: bool


class Sums(NamedTuple):
    """What value and factor of rows are made of, (rows, 1) each."""

    student_total: Tensor
    teacher_total: Tensor
    expected: Tensor  # as `Formula.write` returns it


class Formula(NamedTuple):
    """A divergence.

    Attributes:
        write: returns `Sums.expected` and writes the gradient, where it is needed, but for its factor.
        value: (rows, 1), of as many rows at once as one likes.
        factor: (rows, 1) or a number; times what was written it is the gradient by the student's softened logits.
    """

    write: Callable[[Exponentials], Tensor]
    value: Callable[[Sums], Tensor]
    factor: Callable[[Sums], Tensor | float]


def closed_form(name: str, options: Mapping[str, Any]) -> Mixture | str | None:
    """What a registered loss with its options comes down to here: a mixture, `forward_kl` or `reverse_kl`, or None."""
    if name in _MIXTURES:
        return mixture_of(name, **options)
    return name if name in _KLS else None


def formula_of(form: Mixture | str) -> Formula:
    """The formula of a closed form."""
    if isinstance(form, str):
        return _KLS[form]
    factor = form.student_weight or form.spread_weight / form.student_share
    # What is near 1 may wait for a product; what is not would cost the smallest gradients their digits.
    here, later = (1.0, factor) if 2**-20 <= abs(factor) <= 2**20 else (factor, 1.0)
    write = functools.partial(_mixture, mixture=form, factor=here)
    return Formula(write, lambda sums: sums.expected, lambda _: later)


def _forward_kl(block: Exponentials) -> Tensor:
    student_exps, teacher_exps, teacher_total = block.student_exps, block.teacher_exps, block.teacher_total
    # Over the student's logits, whose memory is written anyway: the teacher's need not go back to it.
    contributions = torch.sub(block.teacher, block.student, out=block.student).mul_(teacher_exps)
    expected = sum_of_possible(contributions).div_(teacher_total)
    if block.needs_gradient:
        # The teacher's less the student's probabilities, times the teacher's total: exactly 0 where both agree.
        ratio = teacher_total / block.student_total
        torch.addcmul(teacher_exps, student_exps, ratio, value=-1, out=block.gradient)
    return expected


def _forward_kl_value(sums: Sums) -> Tensor:
    return (sums.student_total / sums.teacher_total).log_().add_(sums.expected, alpha=_LOG_2)


def _reverse_kl(block: Exponentials) -> Tensor:
    student_exps, student_total = block.student_exps, block.student_total
    contributions = block.student.sub_(block.teacher).mul_(student_exps)
    total, is_finite = sum_and_look(contributions)
    expected = total.div_(student_total)
    if not block.needs_gradient:
        return expected
    if is_finite:
        torch.addcmul(contributions, student_exps, expected, value=-1, out=block.gradient)
        return expected
    value = _reverse_kl_value(Sums(student_total, block.teacher_total, expected))
    expected.masked_fill_(value.isnan(), math.nan)
    torch.addcmul(contributions, student_exps, expected, value=-1, out=block.gradient)
    clear_rows(block.gradient, expected.isposinf().logical_not_())
    return expected


def _reverse_kl_value(sums: Sums) -> Tensor:
    return (sums.teacher_total / sums.student_total).log_().add_(sums.expected, alpha=_LOG_2)


def _mixture(block: Exponentials, *, mixture: Mixture, factor: float) -> Tensor:
    """As in `losses.mixtures`, from w = student_share * (p_t - p_s) / m, of which one product less is made.

    With r = teacher_share / student_share, p_t / m is 1 + w and p_s / m is 1 - r w.
    """
    ratio = mixture.teacher_share / mixture.student_share
    student = torch.mul(block.student_exps, block.student_total.reciprocal(), out=block.student)
    teacher = block.teacher_exps.mul_(block.teacher_total.reciprocal())
    m = torch.add(student, teacher, alpha=ratio, out=block.teacher)
    w = torch.sub(teacher, student, out=block.scratch).div_(m.clamp_(min=torch.finfo(m.dtype).tiny))
    # Where a ratio is 0, a probability of 0 multiplies its logarithm, which has to be finite for that.
    nearly_one = 1 - 4 * torch.finfo(m.dtype).eps  # also after another rounding
    w.clamp_(min=-nearly_one, max=min(nearly_one / ratio, torch.finfo(m.dtype).max))
    value = torch.zeros_like(block.student_total)
    if mixture.teacher_weight:
        terms = _log_of_ratio(w, 1.0, mixture, out=block.teacher).mul_(teacher)
        value.add_(terms.sum(-1, keepdim=True), alpha=mixture.teacher_weight)
    gradient = None
    if mixture.student_weight:
        gradient = _log_of_ratio(w, -ratio, mixture, out=block.teacher).mul_(student)
        expected = gradient.sum(-1, keepdim=True)
        value.add_(expected, alpha=mixture.student_weight)
        if block.needs_gradient:
            out = gradient if mixture.spread_weight else block.gradient
            torch.addcmul(gradient, student, expected, value=-1, out=out)
    if block.needs_gradient and mixture.spread_weight:
        spread = w.mul_(student)
        expected = spread.sum(-1, keepdim=True)
        torch.addcmul(spread, student, expected, value=-1, out=block.gradient if gradient is None else spread)
        if gradient is not None:
            weight = mixture.spread_weight / (mixture.student_share * mixture.student_weight)
            torch.add(gradient, spread, alpha=weight, out=block.gradient)
    if block.needs_gradient and factor != 1:
        block.gradient.mul_(factor)
    return value


def _log_of_ratio(w: Tensor, factor: float, mixture: Mixture, *, out: Tensor) -> Tensor:
    """log(1 + factor * w)."""
    if min(mixture.teacher_share, mixture.student_share) < _SMALL_SHARE:
        return torch.mul(w, factor, out=out).log1p_()
    return torch.add(w.new_ones(()), w, alpha=factor, out=out).log_()


_KLS = {
    "forward_kl": Formula(_forward_kl, _forward_kl_value, lambda sums: sums.teacher_total.reciprocal().neg_()),
    "reverse_kl": Formula(_reverse_kl, _reverse_kl_value, lambda sums: _LOG_2 / sums.student_total),
}
