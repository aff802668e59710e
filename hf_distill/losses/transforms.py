"""What may be done to the logits of both models before a loss compares them."""

import math

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype

_EPSILON = 1e-7


def standardize(logits: Tensor) -> Tensor:
    """Each item's logits less their mean, divided by their standard deviation.

    Adding a constant to an item's logits, or multiplying them by one above 0, changes nothing. So a loss of the result
    leaves the student its own scale, and does not teach how certain to be: with two classes nothing is left but which
    one is larger. Classes at -inf stay there and do not count. Logits that are all equal become 0, without a gradient,
    as they have no spread to divide by.

    Args:
        logits: (..., classes), any float dtype; computed in float32 (float64 if given float64).

    Returns: (..., classes) float32.
    Source: Sun et al. 2024, arXiv:2403.01427, algorithm 1, and its code: 1e-7 is added to the deviation, whose
        variance is divided by the number of classes less 1. The temperature of the paper is that of the loss.
    """
    logits = logits.to(compute_dtype(logits))
    counts = logits != -math.inf
    number = counts.sum(-1, keepdim=True)
    # Less their maximum, equal logits are exactly 0, and their mean has no rounding to be scaled up.
    shifted = torch.where(counts, logits - logits.detach().amax(-1, keepdim=True), 0.0)
    centred = torch.where(counts, shifted - shifted.sum(-1, keepdim=True) / number, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)
    has_spread = variance != 0
    deviation = torch.where(has_spread, variance, 1.0).sqrt()
    scores = torch.where(has_spread, centred / (_EPSILON + deviation), 0.0)
    return torch.where(counts, scores, -math.inf)
