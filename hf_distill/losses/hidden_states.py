"""Losses between vectors: the hidden states of tokens, or pooled ones. The widths agree; projections see to that."""

import torch
from torch import Tensor

from hf_distill.losses.base import Reference, compute_dtype, register_loss
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.row_gradient import attach_gradient


@register_loss(
    "hidden_mse",
    feature="hidden",
    item="token",
    paper="TinyBERT, Jiao et al. 2020, arXiv:1909.10351; MobileBERT, Sun et al. 2020, arXiv:2004.02984",
)
def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of the vectors, as a mean over their features.

    Args:
        student: (..., width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (..., width); carries no gradient.

    Returns: (...,) float32, >= 0.
    Source: TinyBERT, arXiv:1909.10351, eq. 8, and MobileBERT, arXiv:2004.02984, eq. 1. TinyBERT's code also averages
        over the padding.
    """
    return _squared_difference(student, teacher, factor=1 / max(student.shape[-1], 1))


@register_loss("hidden_hint", feature="hidden", item="token", paper="FitNets, Romero et al. 2015, arXiv:1412.6550")
def hidden_hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared difference of the vectors, as a sum over their features: width / 2 times `hidden_mse`.

    Args:
        student: (..., width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (..., width); carries no gradient.

    Returns: (...,) float32, >= 0.
    Source: FitNets, arXiv:1412.6550, eq. 3.
    """
    return _squared_difference(student, teacher, factor=0.5)


@register_loss("hidden_cosine", feature="hidden", item="token", paper="DistilBERT, Sanh et al. 2019, arXiv:1910.01108")
def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the angle between the vectors.

    It is computed as half the squared distance of the vectors on the unit sphere, which is exact near 0. A vector of
    zeros has no direction: its cosine is taken as 0, without a gradient.

    Args:
        student: (..., width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (..., width); carries no gradient.

    Returns: (...,) float32, from 0 to 2.
    Source: DistilBERT, arXiv:1910.01108, section 2; its code takes `torch.nn.CosineEmbeddingLoss`.
    """
    squared_distance, direction, inverse_length, have_direction = on_the_sphere(student, teacher)
    values = torch.where(have_direction, squared_distance / 2, 1.0)
    return _with_gradient(values, student, direction, inverse_length)


@register_loss(
    "hidden_normalized_mse",
    feature="hidden",
    item="token",
    paper="Patient KD, Sun et al. 2019, arXiv:1908.09355",
    reference=Reference(pairs="mean"),
)
def hidden_normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared distance of the vectors divided by their lengths, as a mean over their features.

    A vector of zeros stays one, without a gradient.

    Args:
        student: (..., width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (..., width); carries no gradient.

    Returns: (...,) float32, from 0 to 4 / width.
    Source: Patient KD, arXiv:1908.09355, eq. 7, which sums over features and layers; the authors' code, and the
        weights that they publish with it, take the mean over both.
    """
    squared_distance, direction, inverse_length, _ = on_the_sphere(student, teacher)
    width = student.shape[-1]
    return _with_gradient(squared_distance / width, student, direction, inverse_length * (2 / width))


@register_loss("hidden_kl", feature="hidden", item="token", paper="Hinton et al. 2015, arXiv:1503.02531")
def hidden_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(vector / temperature) over the features, times temperature².

    Which features stand out is compared, and nothing else: a constant added to all features of a vector changes
    nothing. It is meant for vectors whose features are comparable, such as embeddings of sentences. Vectors of length
    1 are nearly uniform at temperature 1; a temperature below 1 tells them apart.

    Args:
        student: (..., width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (..., width); carries no gradient.
        temperature: > 0.

    Returns: (...,) float32, 0 where the vectors are equal.
    Source: the distillation loss of Hinton et al. 2015, arXiv:1503.02531, with features in place of classes.
    """
    _check_vectors(student, teacher)
    return forward_kl(student, teacher, temperature=temperature)


def _squared_difference(student: Tensor, teacher: Tensor, *, factor: float) -> Tensor:
    _check_vectors(student, teacher)
    with torch.no_grad():
        difference = student.to(compute_dtype(student, teacher)) - teacher
        values = torch.linalg.vector_norm(difference, dim=-1).square_().mul_(factor)
    return _with_gradient(values, student, difference, torch.full_like(values, 2 * factor))


@torch.no_grad()
def on_the_sphere(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comparing directions takes.

    Returns: (...,) the squared distance of the unit vectors; (..., width) the gradient of its half by the student's
        unit vector, along the sphere; (...,) 1 / the student's length; (...,) whether both have a length.
    """
    _check_vectors(student, teacher)
    dtype = compute_dtype(student, teacher)
    lengths = [torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype) for vectors in (student, teacher)]
    have_direction = (lengths[0] != 0) & (lengths[1] != 0)
    lengths = [torch.where(length == 0, 1.0, length) for length in lengths]
    unit, teacher_unit = student / lengths[0], teacher / lengths[1]
    difference = unit - teacher_unit
    squared_distance = torch.linalg.vector_norm(difference, dim=-1, keepdim=True).square_()
    # The cosine is 1 - squared_distance / 2: what is left of `difference` is exactly 0 where the two are equal.
    direction = difference.sub_(unit.mul_(squared_distance / 2)).masked_fill_(~have_direction, 0.0)
    # A vector that holds NaN has it in its direction; as a factor it would also reach items that nobody asks for.
    inverse_length = lengths[0].reciprocal().nan_to_num(nan=1.0).squeeze(-1)
    return squared_distance.squeeze(-1), direction, inverse_length, have_direction.squeeze(-1)


def _with_gradient(values: Tensor, student: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and student.requires_grad):
        return values
    return attach_gradient(values, student, direction=direction.to(student.dtype), scale=scale.unsqueeze(-1))


def _check_vectors(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's vectors have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; they "
            "must be equal. Project the student's to the teacher's width, and give both the same positions."
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(
            f"Vectors have shape {tuple(student.shape)}; expected (..., width) with at least one feature."
        )
