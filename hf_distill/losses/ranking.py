"""Losses on the order of candidates: the last dimension of the logits holds a score for each.

Candidates at -inf in the teacher, such as padding in both, are left out.
"""

import math

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.decoupled import target_column
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.logits import bernoulli_kl
from hf_distill.losses.row_gradient import rows_per_block
from hf_distill.losses.row_values import values_by_rows

# How many tensors of the size of its logits, or of its pairs, a block holds at once.
_BUFFERS, _PAIR_BUFFERS = 8, 10


@register_loss(
    "listnet",
    feature="logits",
    item="position",
    paper="ListNet, Cao et al. 2007, in distillation Qin et al. 2022, arXiv:2109.15285",
    min_classes=2,
)
def listnet(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(teacher || student) of the probabilities that a candidate is the top one, times temperature².

    ListNet's top-one probabilities are a softmax over the candidates' scores, so this is `forward_kl` over candidates,
    number for number: ListNet's cross-entropy less the teacher's entropy, which has no gradient.

    Args:
        student_logits: (..., candidates), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., candidates); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, 0 where the scores differ by a constant.
    Source: the top-one probabilities of Cao et al. 2007, "Learning to rank: from pairwise approach to listwise
        approach"; a teacher's scores take the place of the labels in Qin et al. 2022, arXiv:2109.15285.
    """
    return forward_kl(student_logits, teacher_logits, temperature=temperature)


@register_loss(
    "pairwise_ranking",
    feature="logits",
    item="position",
    paper="RankNet, Burges et al. 2005, in distillation Qin et al. 2023, arXiv:2306.04455",
    min_classes=2,
)
def pairwise_ranking(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(teacher || student) of which candidate of a pair comes first, as a mean over all pairs, times temperature².

    The probability that i comes before j is the sigmoid of (z_i - z_j) / temperature. Time grows with candidates²;
    memory does not, as pairs are formed for a block of candidates at a time.

    Args:
        student_logits: (..., candidates), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., candidates); carries no gradient. Those at -inf are in no pair.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).

    Returns: (...,) float32, 0 where the scores differ by a constant, and where there is no pair.
    Source: RankNet, Burges et al. 2005, with the teacher's probabilities as targets, less their entropy;
        pairwise losses of a teacher's scores are compared by Qin et al. 2023, arXiv:2306.04455.
    """
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    candidates = student_logits.shape[-1]
    pairs = student_logits.unsqueeze(-1).expand(*student_logits.shape, candidates)
    step = min(candidates, rows_per_block(pairs, buffers=_PAIR_BUFFERS, dtype=dtype))

    def block(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        kept = teacher != -math.inf
        total, gradient = torch.zeros_like(temperature), torch.zeros_like(student)
        for start in range(0, candidates, step):
            first = slice(start, start + step)
            own, taught = (
                (scores[:, first, None] - scores[:, None]) / temperature[..., None] for scores in (student, teacher)
            )
            is_pair = kept[:, first, None] & kept[:, None]
            total += torch.where(is_pair, bernoulli_kl(own, taught), 0.0).sum((-1, -2)).unsqueeze(-1)
            gradient[:, first] = torch.where(is_pair, torch.sigmoid(own) - torch.sigmoid(taught), 0.0).sum(-1)
        count = kept.sum(-1, keepdim=True)
        # A candidate is in a pair twice, as the first and as the second.
        weight = temperature / (count * (count - 1)).clamp(min=1)
        return total * weight * temperature, gradient * (2 * weight)

    column = item_temperature(temperature, student_logits, dtype)
    return values_by_rows(block, student_logits, teacher_logits, column, buffers=_PAIR_BUFFERS * step)


@register_loss(
    "margin_mse",
    feature="logits",
    item="position",
    paper="Margin-MSE, Hofstätter et al. 2020, arXiv:2010.02666",
    compares="outputs",
    min_classes=2,
)
def margin_mse(student_logits: Tensor, teacher_logits: Tensor, *, targets: Tensor | None = None) -> Tensor:
    """The squared difference of the margins by which the positive candidate leads, as a mean over the others.

    Adding a constant to all scores of an item changes nothing. A positive candidate at -inf has no margin to learn:
    its value is inf or NaN.

    Args:
        student_logits: (..., candidates), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., candidates); carries no gradient. Those at -inf are left out.
        targets: (...,) int64, the place of the positive candidate. At -100, or without labels, the candidate that the
            teacher scores highest stands in.

    Returns: (...,) float32, >= 0, and 0 where there is no other candidate.
    Source: Hofstätter et al. 2020, arXiv:2010.02666, section 3, which has one negative per positive.
    """
    check_logits(student_logits, teacher_logits)

    def block(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        others = (teacher != -math.inf).scatter(-1, target, False)
        gain = student - teacher
        difference = torch.where(others, gain.gather(-1, target) - gain, 0.0)
        count = others.sum(-1, keepdim=True).clamp(min=1)
        gradient = (-difference).scatter(-1, target, difference.sum(-1, keepdim=True))
        return difference.square().sum(-1, keepdim=True) / count, gradient * (2 / count)

    column = target_column(targets, teacher_logits)
    return values_by_rows(block, student_logits, teacher_logits, column, buffers=_BUFFERS)
