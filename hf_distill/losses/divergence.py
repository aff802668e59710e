"""Divergences between the softened distributions of teacher and student, and the walk over rows that they share."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.row_gradient import attach_gradient, clear_rows, is_finite, may_read, row_blocks, rows_per_block

_SCRATCH_BUFFERS = 4
# The KL fill three. Half as many rows as the scratch would hold are faster still: they stay in the second-level cache.
_KL_BUFFERS = 6
_LOG_2, _LOG2_E = math.log(2), math.log2(math.e)

# p_s - p_t is about 1 / vocabulary. In float16 that is subnormal at 32,000 classes, so it is stored multiplied by a
# power of two, which backward takes out again in float32.
FLOAT16_HEADROOM = 2.0**15


class Softened(NamedTuple):
    """A block of rows as a formula gets it, in the dtype that is computed in; every tensor may be written over."""

    student: Tensor  # (rows, classes) logits / temperature, the largest of each row 0
    teacher: Tensor  # as `student`
    student_probs: Tensor  # (rows, classes) softmax of `student`
    teacher_probs: Tensor  # (rows, classes) softmax of `teacher`
    value: Tensor  # (rows, 1), to be written
    needs_gradient: bool


# Writes the value of every row and returns, where it is needed, its gradient with respect to `Softened.student`,
# (rows, classes), in a tensor of the block.
Formula = Callable[[Softened], Tensor | None]


def softened_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, formula: Formula
) -> Tensor:
    """A formula of the softened distributions, times temperature², with its gradient to the student attached.

    Value and gradient are formed together, row block by row block: the only tensor of the logits' size is the
    gradient, and none exists where the student needs no gradient. The teacher and the temperature get none.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes).
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        formula: of a block of rows.

    Returns: (...,) float32.
    """
    is_one = not isinstance(temperature, Tensor) and temperature == 1
    block = functools.partial(_divergence_block, formula=formula, soften=not is_one)
    return _divergence_by_blocks(student_logits, teacher_logits, temperature, block, buffers=_SCRATCH_BUFFERS)


def _divergence_by_blocks(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    write_block: Callable[..., None],
    *,
    buffers: int = _KL_BUFFERS,
) -> Tensor:
    """`softened_divergence`, of what writes value and gradient of a block; its arguments are `_divergence_block`'s."""
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    temperature = item_temperature(temperature, student_logits, dtype)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        values = torch.empty(temperature.shape, dtype=dtype, device=student_logits.device)
        tensors = [student_logits, teacher_logits, temperature.reciprocal(), values]
        if needs_gradient:
            direction = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=values.device)
            size = torch.ones_like(values)
            tensors += [direction, size]
        rows = rows_per_block(student_logits, buffers=buffers, dtype=dtype)
        scratch = torch.empty(buffers, rows, student_logits.shape[-1], dtype=dtype, device=values.device)
        for block in row_blocks(tensors, rows):
            write_block(*block, scratch=scratch)
        values = values.mul_(temperature.square()).squeeze(-1)
    if not needs_gradient:
        return values
    return attach_gradient(values, student_logits, direction=direction, scale=temperature * size)


def _divergence_block(
    student_logits: Tensor,  # (rows, classes)
    teacher_logits: Tensor,  # (rows, classes)
    inverse_temperature: Tensor,  # (rows, 1)
    value: Tensor,  # (rows, 1), written
    direction: Tensor | None = None,  # (rows, classes), written with the gradient / size
    size: Tensor | None = None,  # (rows, 1) of ones, multiplied by what the direction was divided by
    *,
    scratch: Tensor,  # (4, at least rows, classes)
    formula: Formula,
    soften: bool,
) -> None:
    student, teacher, student_probs, teacher_probs = scratch[:, : value.shape[0]]
    for logits, shifted, probs in (
        (student_logits, student, student_probs),
        (teacher_logits, teacher, teacher_probs),
    ):
        subtract_maximum(logits, out=shifted)
        if soften:
            shifted.mul_(inverse_temperature)
        torch.softmax(shifted, -1, out=probs)
    gradient = formula(Softened(student, teacher, student_probs, teacher_probs, value, direction is not None))
    if direction is not None and size is not None and gradient is not None:
        _write_direction(gradient, direction, size)


def _write_direction(gradient: Tensor, direction: Tensor, size: Tensor) -> None:
    """Writes the gradient (rows, classes), which is used up, as direction * size."""
    if direction.dtype == torch.float16:
        # Some gradients are as small as 1 / vocabulary, others as large as a logit: each row has its own scale.
        norm = torch.linalg.vector_norm(gradient, math.inf, -1, keepdim=True)
        # A size of NaN would reach an item that nobody asks for, as its incoming 0 would no longer be one.
        norm.div_(FLOAT16_HEADROOM).nan_to_num_(nan=1.0).clamp_(min=torch.finfo(norm.dtype).tiny)
        gradient.div_(norm)
        size.mul_(norm)
    if gradient is not direction:
        direction.copy_(gradient)


def _nearest(direction: Tensor, scratch: Tensor) -> Tensor:
    """Where a last operation on a gradient may write it: over `direction`, unless that has another dtype."""
    return direction if direction.dtype == scratch.dtype else scratch


def subtract_maximum(logits: Tensor, *, out: Tensor) -> None:
    """Writes (rows, classes) logits less the maximum of their row.

    Logits of 1e4 carry an error of 5e-4; less their maximum, those that matter are near 0 and exact.
    """
    if logits.dtype == out.dtype:
        torch.sub(logits, logits.amax(-1, keepdim=True), out=out)
        return
    # On a CPU bfloat16 costs half the time if it is converted first.
    out.copy_(logits)
    out.sub_(out.amax(-1, keepdim=True))


@register_loss(
    "forward_kl", feature="logits", item="position", paper="Hinton et al. 2015, arXiv:1503.02531", min_classes=2
)
def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(teacher || student) of the softened distributions, times temperature², in nats per item.

    The gradient temperature * (p_s - p_t) is formed together with the value, row block by row block: the only tensor
    of the logits' size is that gradient, and none exists where the student needs no gradient. The teacher and the
    temperature get none.

    A class at -inf has no probability. Where the teacher gives it none either, it contributes 0; where the teacher
    gives it some, the value is +inf. Rounding may leave a value below 0, by about 1e-6 * temperature²; it is not
    clamped, as that would hide errors. A row that holds NaN or +inf, or only -inf, has the value NaN.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 and eq. 2-4; temperature² keeps gradients comparable
        across temperatures.
    """
    block = functools.partial(_forward_kl_block, temperature=temperature)
    return _divergence_by_blocks(student_logits, teacher_logits, temperature, block)


def _forward_kl_block(
    student_logits: Tensor,
    teacher_logits: Tensor,
    inverse_temperature: Tensor,
    value: Tensor,
    direction: Tensor | None = None,
    size: Tensor | None = None,
    *,
    scratch: Tensor,
    temperature: float | Tensor,
) -> None:
    """As `_divergence_block`, from sums of powers in place of probabilities, which takes a CPU fewer passes."""
    student, teacher, teacher_exps = scratch[:3, : value.shape[0]]
    factor = _base_2(temperature, inverse_temperature)
    _write_powers(student_logits, factor, out=student)
    _write_powers(teacher_logits, factor, out=teacher)
    teacher_total = torch.exp2(teacher, out=teacher_exps).sum(-1, keepdim=True)
    ratio = teacher.sub_(student)
    student_exps = student.exp2_()
    student_total = student_exps.sum(-1, keepdim=True)
    total, is_finite = sum_and_look(ratio.mul_(teacher_exps))
    expected = total.div_(teacher_total)
    torch.add((student_total / teacher_total).log_(), expected, alpha=_LOG_2, out=value)
    if direction is None or size is None:
        return
    student_exps.mul_(teacher_total / student_total)
    torch.reciprocal(teacher_total, out=size)
    if not is_finite:
        size.nan_to_num_(nan=1.0)  # as in `_write_direction`, no size may be NaN
    gradient = torch.sub(student_exps, teacher_exps, out=_nearest(direction, student_exps))
    _write_direction(gradient, direction, size)


def write_forward_kl(
    student: Tensor, teacher: Tensor, student_probs: Tensor, teacher_probs: Tensor, *, out: Tensor
) -> None:
    """Writes KL(teacher || student) per row.

    Args:
        student: (rows, classes) softened logits, the largest of each row 0.
        teacher: as `student`; used up.
        student_probs: (rows, classes) softmax of `student`.
        teacher_probs: (rows, classes) softmax of `teacher`.
        out: (rows, 1).
    """
    out.copy_(sum_of_possible(teacher.sub_(student).mul_(teacher_probs)))
    out.add_(log_of_sums(student_probs, teacher_probs))


@register_loss(
    "reverse_kl", feature="logits", item="position", paper="Gu et al. 2024, arXiv:2306.08543", min_classes=2
)
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(student || teacher) of the softened distributions, times temperature², in nats per item.

    A class at -inf in both, such as a padded vocabulary, contributes 0. Where the teacher alone has a class at -inf,
    the value is +inf as soon as the student gives it probability, and such an item has the gradient 0, since no
    finite one is right. Memory, rounding and NaN are as in `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, eq. 1, here per token on given text, in closed form.
    """
    block = functools.partial(_reverse_kl_block, temperature=temperature)
    return _divergence_by_blocks(student_logits, teacher_logits, temperature, block)


def _reverse_kl_block(
    student_logits: Tensor,
    teacher_logits: Tensor,
    inverse_temperature: Tensor,
    value: Tensor,
    direction: Tensor | None = None,
    size: Tensor | None = None,
    *,
    scratch: Tensor,
    temperature: float | Tensor,
) -> None:
    """As `_forward_kl_block`."""
    student, teacher, gradient = scratch[:3, : value.shape[0]]
    factor = _base_2(temperature, inverse_temperature)
    _write_powers(student_logits, factor, out=student)
    _write_powers(teacher_logits, factor, out=teacher)
    teacher_total = torch.exp2(teacher, out=gradient).sum(-1, keepdim=True)
    ratio = torch.sub(student, teacher, out=teacher)
    student_exps = student.exp2_()
    student_total = student_exps.sum(-1, keepdim=True)
    total, is_finite = sum_and_look(torch.mul(ratio, student_exps, out=gradient))
    expected = total.div_(student_total)
    torch.add((teacher_total / student_total).log_(), expected, alpha=_LOG_2, out=value)
    if direction is None or size is None:
        return
    torch.reciprocal(student_total, out=size).mul_(_LOG_2)
    if not is_finite:
        size.nan_to_num_(nan=1.0)
        expected.masked_fill_(value.isnan(), math.nan)
    gradient = torch.addcmul(gradient, student_exps, expected, value=-1, out=_nearest(direction, gradient))
    if not is_finite:
        clear_rows(gradient, expected.isposinf().logical_not_())
    _write_direction(gradient, direction, size)


def _base_2(temperature: float | Tensor, inverse_temperature: Tensor) -> float | Tensor:
    """log2(e) / temperature: a number where the host knows it, which is twice as fast a factor as one for each row."""
    return inverse_temperature * _LOG2_E if isinstance(temperature, Tensor) else _LOG2_E / temperature


def _write_powers(logits: Tensor, factor: float | Tensor, *, out: Tensor) -> None:
    """Writes logarithms to base 2 of what is proportional to the softened softmax, the largest of each row about 0.

    On a CPU `exp2` costs half of `softmax`; so does `exp`, but many times as much where its results are denormal or 0.
    """
    if isinstance(factor, Tensor):
        subtract_maximum(logits, out=out)
        out.mul_(factor)
        return
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    # What rounding the maximum does is the same in a whole row, and so nothing to its softmax.
    torch.add(logits.amax(-1, keepdim=True).mul_(-factor), logits, alpha=factor, out=out)


def reverse_kl_of(ratio: Tensor, block: Softened, *, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """KL(student || teacher) per row, (rows, 1), and its gradient p_s * (ratio - its expectation), (rows, classes).

    Args:
        ratio: (rows, classes) `block.student - block.teacher`; kept.
        block: its probabilities are read, and kept.
        out: (rows, classes), of which the gradient is made.
    """
    gradient = torch.mul(ratio, block.student_probs, out=out)
    expected = sum_of_possible(gradient)
    kl = expected + log_of_sums(block.teacher_probs, block.student_probs)
    if not block.needs_gradient:
        return kl, None
    expected.masked_fill_(kl.isnan(), math.nan)
    gradient.addcmul_(block.student_probs, expected, value=-1)
    clear_rows(gradient, expected.isposinf().logical_not_())
    return kl, gradient


def sum_of_possible(contributions: Tensor) -> Tensor:
    """(rows, 1): the sums over the classes, after those of probability 0 had their contribution set to 0, in place."""
    return sum_and_look(contributions)[0]


def sum_and_look(contributions: Tensor) -> tuple[Tensor, bool]:
    """`sum_of_possible`, and whether the host knows all contributions to be finite."""
    # 0 * inf and 0 * (inf - inf) are NaN here. A NaN among the logits is not lost: `log_of_sums` carries it.
    total = contributions.sum(-1, keepdim=True)
    if may_read(total) and is_finite(total):
        return total, True
    contributions.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return contributions.sum(-1, keepdim=True), False


def log_of_sums(probs: Tensor, others: Tensor) -> Tensor:
    """(rows, 1): the log-sum-exp of the logits of `probs` less that of `others`, the largest of either logits 0."""
    # The largest shifted logit is 0, so log-sum-exp is minus the log of the largest probability.
    return others.amax(-1, keepdim=True).div_(probs.amax(-1, keepdim=True)).log_()
