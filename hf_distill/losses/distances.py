"""Distances of the softened distributions that stay finite whatever either side holds impossible."""

import math

import torch
from torch import Tensor

from hf_distill.losses.base import register_loss
from hf_distill.losses.divergence import Softened, softened_divergence


@register_loss("tvd", feature="logits", item="position", paper="Wen et al. 2023, arXiv:2307.15190", min_classes=2)
def tvd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Total variation distance of the softened distributions, half the sum of |p_s - p_t|, times temperature².

    It has a kink where p_s = p_t in a class; the gradient takes the slope 0 there. Memory and NaN are as in
    `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, in [0, temperature²].
    Source: Wen et al. 2023 (f-DISTILL), arXiv:2307.15190, the TVD variant.
    """
    return softened_divergence(student_logits, teacher_logits, temperature, _tvd)


def _tvd(block: Softened) -> Tensor | None:
    difference = torch.sub(block.student_probs, block.teacher_probs, out=block.student)
    torch.sum(torch.abs(difference, out=block.teacher), -1, keepdim=True, out=block.value)
    block.value.div_(2)
    if not block.needs_gradient:
        return None
    gradient = difference.sign_().mul_(block.student_probs)
    # The sign of NaN is 0.
    expected = gradient.sum(-1, keepdim=True).masked_fill_(block.value.isnan(), math.nan)
    return gradient.addcmul_(block.student_probs, expected, value=-1).div_(2)


@register_loss(
    "squared_hellinger",
    feature="logits",
    item="position",
    paper="Nowozin et al. 2016, arXiv:1606.00709",
    min_classes=2,
)
def squared_hellinger(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Squared Hellinger distance, half the sum of (sqrt(p_s) - sqrt(p_t))² when softened, times temperature².

    Memory and NaN are as in `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, in [0, temperature²].
    Source: the f-divergence of Nowozin et al. 2016 (f-GAN), arXiv:1606.00709, table 1, which has no half.
    """
    return softened_divergence(student_logits, teacher_logits, temperature, _squared_hellinger)


def _squared_hellinger(block: Softened) -> Tensor | None:
    root = torch.sqrt(block.student_probs, out=block.student)
    difference = torch.sub(root, block.teacher_probs.sqrt_(), out=block.teacher)
    torch.sum(torch.mul(difference, difference, out=block.teacher_probs), -1, keepdim=True, out=block.value)
    block.value.div_(2)
    if not block.needs_gradient:
        return None
    # sqrt(p_s) sqrt(p_t) written as p_s - sqrt(p_s) difference keeps the gradient exact near equality.
    return root.mul_(difference).addcmul_(block.student_probs, block.value, value=-1).div_(2)
