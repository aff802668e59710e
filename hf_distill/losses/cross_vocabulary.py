"""Losses of logits over vocabularies that have nothing in common but the text they spell."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.base import compute_dtype, item_temperature, register_loss
from hf_distill.losses.row_gradient import may_read
from hf_distill.losses.row_values import values_by_rows

_BUFFERS = 8


@register_loss(
    "uld",
    feature="logits",
    item="position",
    paper="Boizard et al. 2024, arXiv:2402.12030",
    min_classes=2,
    any_classes=True,
)
def uld(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """The sum of |p_s - p_t| over the ranks of the softened probabilities, each side sorted, times temperature².

    The largest probability is compared with the largest, the second with the second, and so on; what the classes stand
    for plays no part. So it is 0 between distributions that are permutations of each other, and the shorter side
    counts as followed by zeros. It has a kink where two probabilities of a rank are equal; the gradient takes the
    slope 0 there. A class at -inf has probability 0. A row that holds NaN or +inf, or only -inf, has the value NaN.

    Args:
        student_logits: (..., student's classes), any float dtype and strides; computed in float32 (float64 if given
            float64).
        teacher_logits: (..., teacher's classes), of the same items; carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, in [0, 2 * temperature²].

    Raises:
        ValueError: the items differ, or a side has no class.

    Source: universal logit distillation, Boizard et al. 2024, arXiv:2402.12030, section 3: the closed form of the
        Wasserstein distance between them where all classes are equally far apart. The paper has no temperature².
    """
    _check_items(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    temperature = item_temperature(temperature, student_logits, dtype)
    padding = teacher_logits.shape[-1] - student_logits.shape[-1]

    def block(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        probs = _softened(student, temperature)
        order = _descending(probs)
        ranked, taught = probs.gather(-1, order), _softened(teacher, temperature)
        taught = taught.gather(-1, _descending(taught))
        difference = F.pad(ranked, (0, max(padding, 0))) - F.pad(taught, (0, max(-padding, 0)))
        value = difference.abs().sum(-1, keepdim=True)
        slope = torch.empty_like(probs).scatter_(-1, order, difference[..., : probs.shape[-1]].sign_())
        slope.mul_(probs)
        # The sign of NaN is 0.
        expected = slope.sum(-1, keepdim=True).masked_fill_(value.isnan(), torch.nan)
        return value * temperature.square(), slope.addcmul_(probs, expected, value=-1).mul_(temperature)

    return values_by_rows(block, student_logits, teacher_logits, temperature, buffers=_BUFFERS)


def _softened(logits: Tensor, temperature: Tensor) -> Tensor:
    """(rows, classes) probabilities."""
    # Less the maximum: a quotient of 1e4 would carry an error of 5e-4.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)


def _descending(probs: Tensor) -> Tensor:
    """(rows, classes) int64: the classes of each row from the most to the least likely."""
    if not may_read(probs):
        return probs.argsort(-1, descending=True)
    # On a CPU, NumPy (2.4) sorts five times as fast as torch (2.13).
    return torch.from_numpy(np.argsort(probs.neg().numpy(), -1))


def _check_items(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuses logits of other items, or without a class."""
    shapes = f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits {tuple(teacher_logits.shape)}"
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(f"{shapes}; all but the classes must be equal. Align the positions first.")
    if 0 in (student_logits.dim(), teacher_logits.dim(), *student_logits.shape[-1:], *teacher_logits.shape[-1:]):
        raise ValueError(f"{shapes}; expected (..., classes) with at least one class each.")
