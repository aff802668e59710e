"""The derivative of the forward KL with respect to its temperature, for temperatures that are learned."""

from typing import Any

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, item_temperature
from hf_distill.losses.divergence import subtract_maximum
from hf_distill.losses.row_gradient import row_blocks, rows_per_block

_SCRATCH_BUFFERS = 4


def with_temperature_gradient(
    values: Tensor, student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor
) -> Tensor:
    """The values of `forward_kl`, unchanged, which now have their exact gradient to the temperature as well.

    With a = z_t / T, b = z_s / T and means over p_t and p_s,

        d KL / dT = -(E_s[b] - E_t[b] + Cov_t(a, a - b)) / T,    d (T² KL) / dT = 2 T KL + T² d KL / dT,

    formed row block by row block, so that no further tensor of the logits' size exists. At high temperatures the two
    summands cancel but for the third order of 1 / T, hence they are computed in float64 where the device has it. The
    logits get no gradient from it: that of the values to the student's stays as it is.

    Args:
        values: (...,) `forward_kl(student_logits, teacher_logits, temperature=temperature.detach())`.
        student_logits: (..., classes), any float dtype.
        teacher_logits: (..., classes).
        temperature: > 0, with a graph; a scalar or one value per item, (...,).

    Returns: (...,); items whose incoming gradient is 0 give the temperature exactly 0, even where they hold NaN.
    Source: the temperature of Li et al. 2022, arXiv:2211.16231, is trained through this derivative.
    """
    if not (torch.is_grad_enabled() and temperature.requires_grad):
        return values
    check_logits(student_logits, teacher_logits)
    with torch.no_grad():
        dtype = torch.float32 if student_logits.device.type == "mps" else torch.float64
        per_item = item_temperature(temperature.detach(), student_logits, dtype)
        derivative = torch.empty(per_item.shape, dtype=dtype, device=per_item.device)
        rows = rows_per_block(student_logits, buffers=_SCRATCH_BUFFERS, dtype=dtype)
        scratch = torch.empty(_SCRATCH_BUFFERS, rows, student_logits.shape[-1], dtype=dtype, device=per_item.device)
        for block in row_blocks((student_logits, teacher_logits, per_item.reciprocal(), derivative), rows):
            _write_derivative(*block, scratch=scratch)
        derivative = derivative.mul_(per_item).squeeze(-1).to(values.dtype)
    return _TemperatureGradient.apply(values, temperature, derivative)


def _write_derivative(
    student_logits: Tensor,  # (rows, classes)
    teacher_logits: Tensor,  # (rows, classes)
    inverse_temperature: Tensor,  # (rows, 1)
    derivative: Tensor,  # (rows, 1), written with 2 KL + T d KL / dT
    *,
    scratch: Tensor,  # (4, at least rows, classes)
) -> None:
    student, teacher, probs, products = scratch[:, : derivative.shape[0]]
    for logits, softened in ((student_logits, student), (teacher_logits, teacher)):
        subtract_maximum(logits, out=softened)
        # Finite, so that a class without probability contributes 0 and not 0 * inf.
        softened.mul_(inverse_temperature).clamp_min_(torch.finfo(softened.dtype).min)
    torch.softmax(student, -1, out=probs)
    # The largest shifted logit is 0, so log-sum-exp is minus the log of the largest probability.
    torch.log(probs.amax(-1, keepdim=True), out=derivative).mul_(-2)
    derivative.sub_(_mean(student, probs, out=products))
    torch.softmax(teacher, -1, out=probs)
    derivative.add_(probs.amax(-1, keepdim=True).log_(), alpha=2)
    derivative.add_(_mean(student, probs, out=products))
    gap = torch.sub(teacher, student, out=student)
    mean = _mean(gap, probs, out=products)
    derivative.add_(mean, alpha=2)
    teacher.sub_(_mean(teacher, probs, out=products))
    derivative.sub_(_mean(teacher, gap.sub_(mean).mul_(probs), out=products))


def _mean(values: Tensor, weights: Tensor, *, out: Tensor) -> Tensor:
    """(rows, 1) sum of values times weights."""
    return torch.mul(values, weights, out=out).sum(-1, keepdim=True)


class _TemperatureGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, temperature: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        ctx.temperature = temperature.shape, temperature.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, values_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("This loss has no second derivative. Call backward without create_graph=True.")
        (derivative,) = ctx.saved_tensors
        shape, dtype = ctx.temperature
        gradient = torch.where(values_gradient == 0, 0.0, values_gradient * derivative)
        return values_gradient, gradient.sum_to_size(shape).to(dtype), None
