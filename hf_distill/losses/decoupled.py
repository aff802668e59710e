"""Losses on logits that set the class of the label apart from the others."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype, item_temperature, register_loss
from hf_distill.losses.divergence import write_forward_kl
from hf_distill.losses.logits import bernoulli_kl
from hf_distill.losses.row_values import values_by_rows

_BUFFERS = 10
_NO_LABEL = -100


@register_loss(
    "dkd", feature="logits", item="position", paper="DKD, Zhao et al. 2022, arXiv:2203.08679", min_classes=3
)
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    targets: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled KD, alpha * TCKD + beta * NCKD: forward KL with the other classes in a term of their own.

    Value and gradient are multiplied by temperature². TCKD is the KL between the choices "the target or another", and
    NCKD that between the distributions of the other classes among themselves. With alpha 1 and beta the probability
    that the teacher gives the others, their sum is forward KL. A constant beta keeps what the others say from
    vanishing where the teacher is sure. With two classes NCKD is 0, and alpha times forward KL is left.

    A class at -inf has no probability; where all others have none in the teacher, NCKD is 0.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        targets: (...,) int64, the class of each item's label. At -100, or without labels, the class that the teacher
            finds most likely stands in.
        alpha: >= 0, the weight of TCKD.
        beta: >= 0, the weight of NCKD.

    Returns: (...,) float32, 0 where the distributions agree.
    Source: Zhao et al. 2022, arXiv:2203.08679, eq. 5-7 and algorithm 1. The paper has beta from 1 to 10, and 0.5 at
        temperature 1 on ImageNet. Its code subtracts 1000 from the target's logit and takes logarithms of
        probabilities; here both are exact.
    """
    check_logits(student_logits, teacher_logits)
    check_factors("dkd", alpha=alpha, beta=beta)

    def block(student: Tensor, teacher: Tensor, temperature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        own, taught = (_set_apart(logits, target, temperature) for logits in (student, teacher))
        binary = torch.sigmoid(own.odds) - torch.sigmoid(taught.odds)
        others, has_others = torch.empty_like(temperature), _has_others(taught)
        write_forward_kl(own.rest, taught.rest, own.probs, taught.probs, out=others)
        values = alpha * bernoulli_kl(own.odds, taught.odds) + beta * torch.where(has_others, others, 0.0)
        gradient = beta * torch.where(has_others, own.probs - taught.probs, 0.0) - alpha * binary * own.probs
        gradient.scatter_(-1, target, alpha * binary)
        return values * temperature.square(), gradient * temperature

    columns = _columns(student_logits, teacher_logits, temperature, targets)
    return values_by_rows(block, student_logits, teacher_logits, *columns, buffers=_BUFFERS)


@register_loss(
    "nkd", feature="logits", item="position", paper="NKD, Yang et al. 2023, arXiv:2303.13005", min_classes=3
)
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    targets: Tensor | None = None,
    gamma: float = 1.5,
) -> Tensor:
    """The cross-entropy of the target, weighed by the teacher's belief, and that of the other classes on their own.

    -p_t(target) log p_s(target) - gamma * temperature² * sum of q_t log q_s, where p are the distributions at
    temperature 1, and q those of the other classes among themselves at `temperature`. So the first term does not
    change with the temperature, and the value as a whole is not temperature² times that of divided logits. It is not 0
    where the distributions agree, and its first term goes on pushing the target up there.

    A class at -inf has no probability; where all others have none in the teacher, the second term is 0.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0, of the other classes; a number, a scalar tensor or one value per item, (...,).
        targets: (...,) int64, the class of each item's label. At -100, or without labels, the class that the teacher
            finds most likely stands in.
        gamma: >= 0, the weight of the other classes.

    Returns: (...,) float32, >= 0.
    Source: Yang et al. 2023, arXiv:2303.13005, the NKD loss and the authors' code, whose temperature is 1 by default.
    """
    check_logits(student_logits, teacher_logits)
    check_factors("nkd", gamma=gamma, may_vanish=True)

    def block(student: Tensor, teacher: Tensor, temperature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(temperature)
        own, belief = _set_apart(student, target, one), torch.sigmoid(_set_apart(teacher, target, one).odds)
        values = torch.where(belief == 0, 0.0, -belief * F.logsigmoid(own.odds))
        missing = belief * torch.sigmoid(-own.odds)
        gradient = missing * own.probs

        own, taught = (_set_apart(logits, target, temperature) for logits in (student, teacher))
        expected = torch.where(taught.probs == 0, 0.0, taught.probs * own.rest).sum(-1, keepdim=True)
        has_others = _has_others(taught)
        # The largest is 0, so the sum is 1 at least, but where the student has no others.
        surprise = torch.where(has_others, own.log_total.clamp(min=0) - expected, 0.0)
        gradient += gamma * temperature * torch.where(has_others, own.probs - taught.probs, 0.0)
        gradient.scatter_(-1, target, -missing)
        return values + gamma * temperature.square() * surprise, gradient

    columns = _columns(student_logits, teacher_logits, temperature, targets)
    return values_by_rows(block, student_logits, teacher_logits, *columns, buffers=_BUFFERS)


def target_column(targets: Tensor | None, teacher_logits: Tensor) -> Tensor:
    """(..., 1) int64: each item's class, with the teacher's most likely one where there is no label.

    Args:
        targets: (...,) int64, -100 for none; None for no labels at all.
        teacher_logits: (..., classes).
    """
    if targets is None:
        return teacher_logits.argmax(-1, keepdim=True)
    if targets.dtype != torch.int64 or targets.shape != teacher_logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype} beside logits "
            f"{tuple(teacher_logits.shape)}; expected one class per item, {tuple(teacher_logits.shape[:-1])}, in "
            "torch.int64."
        )
    targets = targets.unsqueeze(-1)
    return torch.where(targets == _NO_LABEL, teacher_logits.argmax(-1, keepdim=True), targets)


def check_factors(loss: str, *, may_vanish: bool = False, **factors: float) -> None:
    """Refuses weights within a loss that are negative or not finite, and all of them at 0 unless they may vanish."""
    for name, value in factors.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but it is a weight within {loss}: expected a finite number >= 0.")
    if not may_vanish and not any(factors.values()):
        raise ValueError(f"{' and '.join(factors)} of {loss} are 0, which leaves nothing. Give one a value above 0.")


def _columns(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student_logits, teacher_logits)
    return item_temperature(temperature, student_logits, dtype), target_column(targets, teacher_logits)


class _Apart(NamedTuple):
    odds: Tensor  # (rows, 1) log-odds of the target against all others
    rest: Tensor  # (rows, classes) softened logits of the others, the largest of each row 0; -inf for the target
    log_total: Tensor  # (rows, 1) log-sum-exp of `rest`
    probs: Tensor  # (rows, classes) of the others among themselves; 0 where no other has a probability


def _set_apart(logits: Tensor, target: Tensor, temperature: Tensor) -> _Apart:
    rest = logits.scatter(-1, target, -math.inf)
    # Less their maximum, large logits are exact where they matter.
    largest = rest.amax(-1, keepdim=True)
    is_alone = largest == -math.inf
    largest = torch.where(is_alone, 0.0, largest)
    rest = (rest - largest) / temperature
    log_total = rest.logsumexp(-1, keepdim=True)
    odds = (logits.gather(-1, target) - largest) / temperature - log_total
    return _Apart(odds, rest, log_total, torch.where(is_alone, 0.0, torch.softmax(rest, -1)))


def _has_others(parts: _Apart) -> Tensor:
    """(rows, 1) whether a class beside the target has a probability; also where that is NaN."""
    return parts.log_total != -math.inf
