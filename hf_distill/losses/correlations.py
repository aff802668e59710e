"""Losses on correlations between the probabilities of teacher and student."""

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.batch_relations import valid_rows
from hf_distill.losses.decoupled import check_factors

# Deviations from the mean that are this small beside the probabilities themselves are rounding, in steps of its dtype.
_LEAST_STEPS = 1e4
# What is below counts as 0.
_LEAST_PROBABILITY = {torch.float64: 1e-150, torch.float32: 1e-18}


@register_loss(
    "dist", feature="logits", item="position", paper="DIST, Huang et al. 2022, arXiv:2205.10536", min_classes=3
)
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    valid: Tensor | None = None,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """1 - the Pearson correlations of softened probabilities, within items and within classes, times temperature².

    `inter` weighs 1 - the correlation of an item's probabilities over the classes, `intra` 1 - the correlation of a
    class's probabilities over the valid items, as a mean over the classes and the same for each item. Unlike with KL,
    the student may be less certain than the teacher as long as it prefers the same. With two classes the former is 0
    or 2, and without a gradient.

    Each term is formed as half the squared distance of unit vectors, which is exact near 0. Probabilities that are all
    equal, but for rounding, have no correlation: beside some that are not, the term is 1 without a gradient, and 0
    where both are. So a student that starts with equal logits, as with a head of zeros, needs another term to begin.
    Classes at -inf in both models are left out. Only valid items get a gradient, or reach the others.

    Args:
        student_logits: (items, classes), any float dtype; computed in float64 where the device has it.
        teacher_logits: (items, classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (items,).
        valid: (items,) bool, the items that count; None counts all. With fewer than 2 `intra` adds nothing.
        inter: >= 0.
        intra: >= 0. Where it is above 0, a valid item that holds NaN has all of them as NaN.

    Returns: (items,) float32 (float64 if given float64), 0 where the probabilities agree and where not valid.
    Source: Huang et al. 2022, arXiv:2205.10536, section 3, with the temperature² of the authors' code, which adds 1e-8
        to the product of the norms and so fades out classes that are improbable in every item.
    """
    check_logits(student_logits, teacher_logits)
    check_factors("dist", inter=inter, intra=intra)
    if student_logits.dim() != 2:
        raise ValueError(
            f"Logits have shape {tuple(student_logits.shape)}; dist compares items with each other and expects "
            "(items, classes)."
        )
    valid = valid_rows(valid, student_logits).unsqueeze(-1)
    # Deviations of probabilities from 1 / classes are small beside these. float32 would leave noise of them.
    exact = torch.float32 if student_logits.device.type == "mps" else torch.float64
    temperature = item_temperature(temperature, student_logits, exact)
    absent = valid & (student_logits == -torch.inf) & (teacher_logits == -torch.inf)
    student, teacher = (
        _probabilities(torch.where(valid, logits.to(exact), 0.0) / temperature)
        for logits in (student_logits, teacher_logits.detach())
    )
    values = torch.zeros((), dtype=exact, device=student.device)
    if inter:
        values = values + inter * _decorrelation(student, teacher, ~absent, dim=-1)
    if intra:
        present = (valid & ~absent).any(0)
        per_class = _decorrelation(student, teacher, valid, dim=0)
        values = values + intra * torch.where(present, per_class, 0.0).sum() / present.sum().clamp(min=1)
    values = torch.where(valid, values.unsqueeze(-1) * temperature.square(), 0.0).squeeze(-1)
    return values.to(compute_dtype(student_logits, teacher_logits))


def _probabilities(logits: Tensor) -> Tensor:
    """The softmax, without what is so small that its square would vanish."""
    probs = torch.softmax(logits, -1)
    return torch.where(probs < _LEAST_PROBABILITY[probs.dtype], 0.0, probs)


def _decorrelation(student: Tensor, teacher: Tensor, members: Tensor, *, dim: int) -> Tensor:
    """1 - the Pearson correlation along a dimension, over its members."""
    (own, own_varies), (taught, taught_varies) = (
        _direction_from_mean(probs, members, dim=dim) for probs in (student, teacher)
    )
    return torch.where(own_varies == taught_varies, (own - taught).square().sum(dim) / 2, 1.0)


def _direction_from_mean(probs: Tensor, members: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors along a dimension, and whether they have a direction; those without are 0."""
    count = members.expand_as(probs).sum(dim, keepdim=True).clamp(min=1)
    mean = torch.where(members, probs, 0.0).sum(dim, keepdim=True) / count
    centred = torch.where(members, probs - mean, 0.0)
    norm, size = (
        torch.linalg.vector_norm(values, dim=dim, keepdim=True)
        for values in (centred, torch.where(members, probs, 0.0))
    )
    varies = ~(norm <= size * torch.finfo(norm.dtype).eps * _LEAST_STEPS)  # NaN is passed on
    return torch.where(varies, centred / torch.where(varies, norm, 1.0), 0.0), varies.squeeze(dim)
