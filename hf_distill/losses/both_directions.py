"""Forward and reverse KL together, weighted alike for every item or by where the student is wrong."""

import functools

import torch
from torch import Tensor

from hf_distill.losses.base import register_loss
from hf_distill.losses.divergence import (
    Softened,
    forward_kl,
    log_of_sums,
    reverse_kl,
    reverse_kl_of,
    softened_divergence,
    sum_of_possible,
)


@register_loss(
    "symmetric_kl", feature="logits", item="position", paper="Liang et al. 2021, arXiv:2106.14448", min_classes=2
)
def symmetric_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, share: float = 0.5
) -> Tensor:
    """KL(teacher || student) weighted by `share` and KL(student || teacher) by the rest, times temperature², in nats.

    Memory, rounding and NaN are as in `forward_kl`. Classes at -inf are as in `forward_kl` and in `reverse_kl`: where
    the reverse KL is +inf, its part of the gradient is 0.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        share: in [0, 1], of the forward KL.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Liang et al. 2021 (R-Drop), arXiv:2106.14448, eq. 2, the half of which is share 0.5.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1].")
    if share == 1:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if share == 0:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    formula = functools.partial(_both, forward_weight=share, reverse_weight=1 - share)
    return softened_divergence(student_logits, teacher_logits, temperature, formula)


@register_loss(
    "adaptive_kl", feature="logits", item="position", paper="Wu et al. 2024, arXiv:2404.02657", min_classes=2
)
def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, head: float = 0.5
) -> Tensor:
    """Forward and reverse KL, weighted by the student's error in head and tail, times temperature², in nats per item.

    The head are the teacher's most likely classes while their probabilities sum to at most `head`, and always the most
    likely one. The weight of the forward KL is the head's part of the sum of |p_t - p_s|, that of the reverse KL the
    tail's. The weights carry no gradient, so the gradient is not the derivative of the value. Memory, rounding and NaN
    are as in `forward_kl`, classes at -inf as in `symmetric_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        head: in (0, 1), the teacher's probability that is the head's.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Wu et al. 2024, arXiv:2404.02657, section 4, with the head as in their code; there is no
        temperature there.
    """
    if not 0 < head < 1:
        raise ValueError(f"head is {head}; expected a number above 0 and below 1.")
    return softened_divergence(student_logits, teacher_logits, temperature, functools.partial(_adaptive, head=head))


def _adaptive(block: Softened, *, head: float) -> Tensor | None:
    likely, order = block.teacher_probs.sort(-1, descending=True)
    gaps = likely.sub(block.student_probs.gather(-1, order)).abs_()
    in_head = likely.cumsum(-1) <= head
    in_head[:, 0] = True
    head_gap = gaps.where(in_head, 0.0).sum(-1, keepdim=True)
    tail_gap = gaps.masked_fill_(in_head, 0.0).sum(-1, keepdim=True)
    smallest = torch.finfo(gaps.dtype).tiny
    # Without a gap both KL are 0, and so is their gradient, whatever the weights; 0 * inf would be NaN.
    gap = (head_gap + tail_gap).clamp_(min=smallest)
    weights = [part.div_(gap).clamp_(min=smallest) for part in (head_gap, tail_gap)]
    return _both(block, forward_weight=weights[0], reverse_weight=weights[1])


def _both(block: Softened, *, forward_weight: float | Tensor, reverse_weight: float | Tensor) -> Tensor | None:
    """The formula; each weight is above 0, a number or (rows, 1)."""
    student_probs, teacher_probs = block.student_probs, block.teacher_probs
    ratio = block.student.sub_(block.teacher)
    reverse, gradient = reverse_kl_of(ratio, block, out=block.teacher)
    forward = sum_of_possible(ratio.mul_(teacher_probs).neg_()).add_(log_of_sums(student_probs, teacher_probs))
    block.value.copy_(forward_weight * forward + reverse_weight * reverse)
    if gradient is None:
        return None
    return gradient.mul_(reverse_weight).add_(student_probs.sub_(teacher_probs).mul_(forward_weight))
