"""Losses on logits that are not a distribution over classes: one label each, or plain regression."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.row_gradient import attach_gradient


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
        kl = torch.zeros_like(teacher)
        for sign in (1, -1):
            # A side without the teacher's probability contributes 0, also where its log-probabilities are -inf.
            probs = torch.sigmoid(sign * teacher)
            contributions = probs * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
            kl += contributions.masked_fill(probs == 0, 0.0)
        values = kl.sum(-1) * temperature.squeeze(-1).square()
    if not (torch.is_grad_enabled() and student_logits.requires_grad):
        return values
    direction = (torch.sigmoid(student) - torch.sigmoid(teacher)).to(student_logits.dtype)
    return attach_gradient(values, student_logits, direction=direction, scale=temperature)


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
