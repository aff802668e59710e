"""Cross-entropies against the teacher's softened probabilities: a divergence and the teacher's own entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.losses.base import compute_dtype, item_temperature, register_loss
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.logits import binary_forward_kl
from hf_distill.losses.row_gradient import row_blocks, rows_per_block


@register_loss(
    "soft_cross_entropy",
    feature="logits",
    item="position",
    paper="TinyBERT, Jiao et al. 2020, arXiv:1909.10351; Hinton et al. 2015, arXiv:1503.02531",
    min_classes=2,
)
def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, class_mean: bool = False
) -> Tensor:
    """-sum of p_t log p_s of the softened distributions, times temperature²: `forward_kl` and the teacher's entropy.

    The gradient is that of `forward_kl`, the value is not 0 where the distributions agree.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        class_mean: whether value and gradient are divided by the number of classes, those at -inf included.

    Returns: (...,) float32, >= 0.
    Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 10; its code takes the mean over the classes and
        multiplies by no temperature². Hinton et al. 2015, arXiv:1503.02531, have the sum and temperature².
    """
    values = forward_kl(student_logits, teacher_logits, temperature=temperature)
    with torch.no_grad():
        softening = item_temperature(temperature, student_logits, values.dtype)
        entropy = torch.empty_like(softening)
        rows = rows_per_block(teacher_logits, buffers=5, dtype=values.dtype)
        for logits, divisor, out in row_blocks([teacher_logits, softening, entropy], rows):
            logits = logits.to(values.dtype)
            log_probs = torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / divisor, -1)
            probs = log_probs.exp()
            out.copy_(torch.where(probs == 0, 0.0, -probs * log_probs).sum(-1, keepdim=True))
        entropy = entropy.mul_(softening.square()).squeeze(-1)
    return (values + entropy) / (student_logits.shape[-1] if class_mean else 1)


@register_loss(
    "soft_bce",
    feature="logits",
    item="position",
    paper="Yang et al. 2023, arXiv:2308.06453; Hinton et al. 2015, arXiv:1503.02531",
    compares="labels",
)
def soft_bce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Binary cross-entropy of each label against the teacher's sigmoid(z / temperature), summed, times temperature².

    It is `binary_forward_kl` and the teacher's own entropy: the gradient is the same, the value is not 0 where the two
    agree.

    Args:
        student_logits: (..., labels), any float dtype; computed in float32 (float64 if given float64).
        teacher_logits: (..., labels); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, >= 0.
    Source: one binary problem per label as in Yang et al. 2023, arXiv:2308.06453, with soft targets and the
        temperature of Hinton et al. 2015, arXiv:1503.02531.
    """
    values = binary_forward_kl(student_logits, teacher_logits, temperature=temperature)
    with torch.no_grad():
        dtype = compute_dtype(student_logits, teacher_logits)
        softening = item_temperature(temperature, student_logits, dtype)
        teacher = teacher_logits / softening
        # Of a certain label, 0 * inf is 0.
        sides = [
            torch.where(torch.sigmoid(side) == 0, 0.0, torch.sigmoid(side) * F.logsigmoid(side))
            for side in (teacher, -teacher)
        ]
        entropy = -(sides[0] + sides[1]).sum(-1) * softening.squeeze(-1).square()
    return values + entropy
