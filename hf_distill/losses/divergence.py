"""Divergences between the softened distributions of teacher and student."""

import math

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.row_gradient import attach_gradient, row_blocks, rows_per_block

_SCRATCH_BUFFERS = 4

# p_s - p_t is about 1 / vocabulary. In float16 that is subnormal at 32,000 classes, so it is stored multiplied by a
# power of two, which backward takes out again in float32.
FLOAT16_HEADROOM = 2.0**15


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
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    temperature = item_temperature(temperature, student_logits, dtype)
    headroom = FLOAT16_HEADROOM if student_logits.dtype == torch.float16 else 1.0
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        kl = torch.empty(temperature.shape, dtype=dtype, device=student_logits.device)
        tensors = [student_logits, teacher_logits, temperature.reciprocal(), kl]
        if needs_gradient:
            tensors.append(torch.empty(student_logits.shape, dtype=student_logits.dtype, device=kl.device))
        rows = rows_per_block(student_logits, buffers=_SCRATCH_BUFFERS, dtype=dtype)
        scratch = torch.empty(_SCRATCH_BUFFERS, rows, student_logits.shape[-1], dtype=dtype, device=kl.device)
        for block in row_blocks(tensors, rows):
            _forward_kl_block(*block, scratch=scratch, headroom=headroom)
        values = kl.mul_(temperature.square()).squeeze(-1)
    if not needs_gradient:
        return values
    return attach_gradient(values, student_logits, direction=tensors[-1], scale=temperature / headroom)


def _forward_kl_block(
    student_logits: Tensor,  # (rows, classes)
    teacher_logits: Tensor,  # (rows, classes)
    inverse_temperature: Tensor,  # (rows, 1)
    kl: Tensor,  # (rows, 1), written
    direction: Tensor | None = None,  # (rows, classes), written with headroom * (p_s - p_t)
    *,
    scratch: Tensor,  # (4, at least rows, classes)
    headroom: float,
) -> None:
    student, teacher, student_probs, teacher_probs = scratch[:, : kl.shape[0]]
    for logits, shifted, probs in (
        (student_logits, student, student_probs),
        (teacher_logits, teacher, teacher_probs),
    ):
        subtract_maximum(logits, out=shifted)
        torch.softmax(shifted.mul_(inverse_temperature), -1, out=probs)
    write_forward_kl(student, teacher, student_probs, teacher_probs, out=kl)
    if direction is not None:
        torch.mul(student_probs.sub_(teacher_probs), headroom, out=direction)


def subtract_maximum(logits: Tensor, *, out: Tensor) -> None:
    """Writes (rows, classes) logits less the maximum of their row.

    Logits of 1e4 carry an error of 5e-4; less their maximum, those that matter are near 0 and exact.
    """
    torch.sub(logits, logits.amax(-1, keepdim=True).to(out.dtype), out=out)


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
    # 0 * inf and 0 * (inf - inf) are NaN here, but a class without the teacher's probability contributes 0. A NaN
    # among the logits is not lost: the maxima below carry it.
    contributions = teacher.sub_(student).mul_(teacher_probs)
    contributions.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    torch.sum(contributions, -1, keepdim=True, out=out)
    # The largest shifted logit is 0, so log-sum-exp is minus the log of the largest probability.
    out.add_(teacher_probs.amax(-1, keepdim=True).div_(student_probs.amax(-1, keepdim=True)).log_())
