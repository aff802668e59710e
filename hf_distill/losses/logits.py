"""Losses on logits as plain numbers, and on those of labels that are each a choice of their own."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.hidden_states import on_the_sphere
from hf_distill.losses.row_gradient import attach_gradient
from hf_distill.losses.row_values import values_by_rows

_BUFFERS = 8


@register_loss(
    "binary_forward_kl",
    feature="logits",
    item="position",
    paper="Yang et al. 2023, arXiv:2308.06453; Hinton et al. 2015, arXiv:1503.02531",
    compares="labels",
)
def binary_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(teacher || student) of each label's softened Bernoulli distribution, summed over labels, times temperature².

    This is binary cross-entropy against the teacher's sigmoid(z / temperature), less the teacher's own entropy: the
    gradient is that of the cross-entropy, the value is 0 where the two agree. -inf (+inf) is a label of probability
    0 (1); where only the student is that certain, the value is +inf.

    Args:
        student_logits: (..., labels), any float dtype; computed in float32 (float64 if given float64).
        teacher_logits: (..., labels); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, >= 0 up to rounding.
    Source: the multi-label logits distillation of Yang et al. 2023, arXiv:2308.06453 (one binary problem per
        label), with the temperature of Hinton et al. 2015, arXiv:1503.02531.
    """
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    temperature = item_temperature(temperature, student_logits, dtype)
    with torch.no_grad():
        student, teacher = student_logits / temperature, teacher_logits / temperature
        values = bernoulli_kl(student, teacher).sum(-1) * temperature.squeeze(-1).square()
    if not (torch.is_grad_enabled() and student_logits.requires_grad):
        return values
    direction = (torch.sigmoid(student) - torch.sigmoid(teacher)).to(student_logits.dtype)
    return attach_gradient(values, student_logits, direction=direction, scale=temperature)


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of choices with the log-odds `student` and `teacher`, entry by entry."""
    kl = torch.zeros_like(teacher)
    for sign in (1, -1):
        # A side without the teacher's probability contributes 0, also where its log-probabilities are -inf.
        probs = torch.sigmoid(sign * teacher)
        contributions = probs * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
        kl += contributions.masked_fill_(probs == 0, 0.0)
    return kl


@register_loss(
    "logit_mse",
    feature="logits",
    item="position",
    paper="Ba and Caruana 2014, arXiv:1312.6184",
    compares="outputs",
)
def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The squared difference of the logits, as a mean over the classes or outputs.

    It has no temperature: dividing both logits by one and multiplying by its square changes nothing. Classes at the
    same infinity in both, such as a padded vocabulary, agree and still count in the mean.

    Args:
        student_logits: (..., classes), any float dtype; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.

    Returns: (...,) float32, >= 0.
    Source: Ba and Caruana 2014, arXiv:1312.6184, eq. 1, which has half the sum over the classes, not their mean.
    """
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    with torch.no_grad():
        difference = student_logits.to(dtype) - teacher_logits
        difference.masked_fill_(student_logits == teacher_logits, 0.0)
        values = difference.square().mean(-1)
    if not (torch.is_grad_enabled() and student_logits.requires_grad):
        return values
    scale = torch.full((), 2 / student_logits.shape[-1], dtype=dtype, device=values.device).expand(*values.shape, 1)
    return attach_gradient(values, student_logits, direction=difference.to(student_logits.dtype), scale=scale)


@register_loss(
    "centered_logit_mse",
    feature="logits",
    item="position",
    paper="Ba and Caruana 2014, arXiv:1312.6184",
    min_classes=2,
)
def centered_logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The squared difference of the logits, each item's less their mean, as a mean over the classes.

    A constant added to all logits of an item changes no probability, and here no value. It has no temperature, as
    `logit_mse` has none. Classes at -inf in the teacher, such as a padded vocabulary, are left out of all means.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.

    Returns: (...,) float32, >= 0.
    Source: Ba and Caruana 2014, arXiv:1312.6184, eq. 1, without the part of the difference that a softmax ignores.
    """
    check_logits(student_logits, teacher_logits)

    def block(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        kept = teacher != -math.inf
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        difference = torch.where(kept, student - teacher, 0.0)
        centred = torch.where(kept, difference - difference.sum(-1, keepdim=True) / count, 0.0)
        return centred.square().sum(-1, keepdim=True) / count, centred * (2 / count)

    return values_by_rows(block, student_logits, teacher_logits, buffers=_BUFFERS)


@register_loss(
    "logit_cosine",
    feature="logits",
    item="position",
    paper="DistilBERT, Sanh et al. 2019, arXiv:1910.01108",
    compares="outputs",
    min_classes=2,
)
def logit_cosine(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 - cosine of the angle between the logits.

    How large the student's logits are does not matter, and so not how certain it is; a constant added to them does
    matter. It has no temperature. Classes at -inf in the teacher, such as a padded vocabulary, are left out. Logits
    that are all 0 have no direction: their cosine is taken as 0, without a gradient.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.

    Returns: (...,) float32, from 0 to 2.
    Source: the cosine loss of DistilBERT, Sanh et al. 2019, arXiv:1910.01108, section 2, on logits in place of hidden
        states.
    """
    check_logits(student_logits, teacher_logits)

    def block(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        kept = teacher != -math.inf
        own, taught = (torch.where(kept, logits, 0.0) for logits in (student, teacher))
        squared_distance, direction, inverse_length, have_direction = on_the_sphere(own, taught)
        values = torch.where(have_direction, squared_distance / 2, 1.0)
        return values.unsqueeze(-1), direction * inverse_length.unsqueeze(-1)

    return values_by_rows(block, student_logits, teacher_logits, buffers=_BUFFERS)
