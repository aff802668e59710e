"""What may be done to the logits of both models before a loss compares them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_distill.losses.base import compute_dtype
from hf_distill.losses.row_gradient import row_blocks, rows_per_block

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
    scores: Tensor = _Standardize.apply(logits)
    return scores


class _Standardize(torch.autograd.Function):
    # Composed of torch's operations, it would keep several tensors of the logits' size for its backward.
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        dtype = compute_dtype(logits)
        items = (*logits.shape[:-1], 1)
        scores = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        deviation, number = (torch.empty(items, dtype=dtype, device=logits.device) for _ in range(2))
        rows = rows_per_block(logits, buffers=3, dtype=dtype)
        for block in row_blocks((logits, scores, deviation, number), rows):
            _write_scores(*block)
        ctx.save_for_backward(scores, deviation, number)
        ctx.logits_dtype = logits.dtype
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        scores, deviation, number = ctx.saved_tensors
        result = torch.empty(scores.shape, dtype=ctx.logits_dtype, device=scores.device)
        rows = rows_per_block(scores, buffers=3, dtype=scores.dtype)
        for block in row_blocks((gradient, scores, deviation, number, result), rows):
            _write_gradient(*block)
        return result


def _write_scores(
    logits: Tensor,  # (rows, classes)
    scores: Tensor,  # (rows, classes), written
    deviation: Tensor,  # (rows, 1), written; 0 where the logits have no spread
    number: Tensor,  # (rows, 1), written: classes that count
) -> None:
    counts = logits != -math.inf
    logits = logits.to(scores.dtype)
    number.copy_(counts.sum(-1, keepdim=True))
    # Less their maximum, equal logits are exactly 0, and their mean has no rounding to be scaled up.
    shifted = torch.where(counts, logits - logits.amax(-1, keepdim=True), 0.0)
    centred = torch.where(counts, shifted - shifted.sum(-1, keepdim=True) / number, 0.0)
    torch.sqrt(centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1), out=deviation)
    standardized = torch.where(deviation != 0, centred / (_EPSILON + deviation), 0.0)
    scores.copy_(torch.where(counts, standardized, -math.inf))


def _write_gradient(
    gradient: Tensor,  # (rows, classes) of the scores
    scores: Tensor,  # (rows, classes)
    deviation: Tensor,  # (rows, 1)
    number: Tensor,  # (rows, 1)
    result: Tensor,  # (rows, classes), written with that of the logits
) -> None:
    counts = scores != -math.inf
    gradient, scores = (torch.where(counts, values, 0.0) for values in (gradient, scores))
    spread = torch.where(deviation != 0, deviation, 1.0)
    mean = gradient.sum(-1, keepdim=True) / number
    along = (gradient * scores).sum(-1, keepdim=True) / ((number - 1).clamp(min=1) * spread)
    moved = (gradient - mean) / (_EPSILON + spread) - scores * along
    result.copy_(torch.where(counts & (deviation != 0), moved, 0.0))
