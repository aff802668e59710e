"""Divergences from a mixture of the softened distributions of teacher and student."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import register_loss
from hf_distill.losses.divergence import Softened, forward_kl, reverse_kl, softened_divergence

# A share as small as this is none: the mixture would differ from its other part in probabilities below 1e-30 alone.
_NO_SHARE = 1e-30


@register_loss("jsd", feature="logits", item="position", paper="Nielsen 2020, arXiv:1912.00610", min_classes=2)
def jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, beta: float = 0.5
) -> Tensor:
    """Skewed Jensen-Shannon divergence that is a KL at either end, times temperature², in nats per item.

    [beta KL(teacher || m) + (1 - beta) KL(student || m)] / (beta (1 - beta)), with m = beta teacher + (1 - beta)
    student: forward KL at beta 0, reverse KL at 1, and continuous in between, in value and gradient. At 0.5 it is four
    times the usual Jensen-Shannon divergence. Strictly between the ends it is finite whatever classes are at -inf.
    Memory, rounding and NaN are as in `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        beta: in [0, 1], the teacher's share of the mixture.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: the skewed divergence of Nielsen 2020, arXiv:1912.00610, divided by beta (1 - beta). Agarwal et al. 2024,
        arXiv:2306.13649, eq. 1, do not divide: see `generalized_jsd`.
    """
    return mixture_divergence(student_logits, teacher_logits, temperature, mixture_of("jsd", beta=beta))


@register_loss(
    "generalized_jsd", feature="logits", item="position", paper="Agarwal et al. 2024, arXiv:2306.13649", min_classes=2
)
def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, beta: float = 0.5
) -> Tensor:
    """Generalized Jensen-Shannon divergence as in GKD and in TRL, times temperature², in nats per item.

    beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student. At the ends, where
    that is 0, it is forward KL (beta 0) or reverse KL (beta 1). There lies a cliff: near an end the value is about
    beta (1 - beta) of that KL, a hundredth at 0.01. `jsd` has none. Memory, rounding, NaN and classes at -inf are as
    in `jsd`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        beta: in [0, 1], the teacher's share of the mixture.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, eq. 1; the ends are TRL's.
    """
    return mixture_divergence(student_logits, teacher_logits, temperature, mixture_of("generalized_jsd", beta=beta))


@register_loss("skewed_kl", feature="logits", item="position", paper="Ko et al. 2024, arXiv:2402.03898", min_classes=2)
def skewed_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(teacher || skew teacher + (1 - skew) student) of the softened distributions, times temperature², in nats.

    Forward KL at skew 0; above it the value is finite whatever classes are at -inf, at most -log(skew) *
    temperature². Memory, rounding and NaN are as in `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        skew: in [0, 1), the teacher's share of the mixture.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    return mixture_divergence(student_logits, teacher_logits, temperature, mixture_of("skewed_kl", skew=skew))


@register_loss(
    "skewed_reverse_kl", feature="logits", item="position", paper="Ko et al. 2024, arXiv:2402.03898", min_classes=2
)
def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(student || skew student + (1 - skew) teacher) of the softened distributions, times temperature², in nats.

    Reverse KL at skew 0; above it the value is finite whatever classes are at -inf, at most -log(skew) *
    temperature². The gradient goes through the student in the mixture too. Memory, rounding and NaN are as in
    `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        skew: in [0, 1), the student's share of the mixture.

    Returns: (...,) float32, 0 where the logits are equal.
    Source: Ko et al. 2024 (DistiLLM), arXiv:2402.03898, section 3.1.
    """
    return mixture_divergence(student_logits, teacher_logits, temperature, mixture_of("skewed_reverse_kl", skew=skew))


class Mixture(NamedTuple):
    """teacher_weight KL(teacher || m) + student_weight KL(student || m), m the mixture by the shares, which sum to 1.

    Shares come in pairs because 1 - share is not exact in float32 where the share is near 1.
    """

    teacher_share: float
    student_share: float
    teacher_weight: float
    student_weight: float
    # The weight of `_mixture_block`'s spread in the gradient,
    # student_share * (student_weight * teacher_share - teacher_weight * student_share).
    spread_weight: float = 0.0


def mixture_of(name: str, *, beta: float = 0.5, skew: float = 0.1) -> Mixture | str:
    """What a divergence of this file comes down to: a mixture, or at an end of its option the name of that KL.

    Args:
        name: `jsd`, `generalized_jsd`, `skewed_kl` or `skewed_reverse_kl`.
        beta: of the first two.
        skew: of the others.

    Raises:
        ValueError: the option is no share of a mixture.
    """
    option, share = ("skew", skew) if name.startswith("skewed") else ("beta", beta)
    if not (0 <= share < 1 or (share == 1 and option == "beta")):
        raise ValueError(f"{option} is {share}; expected a number in [0, 1{')' if option == 'skew' else ']'}.")
    if share == 1:
        return "reverse_kl"
    if share < _NO_SHARE and not (name == "generalized_jsd" and share > 0):
        return "reverse_kl" if name == "skewed_reverse_kl" else "forward_kl"
    if name == "jsd":
        return Mixture(beta, 1 - beta, teacher_weight=1 / (1 - beta), student_weight=1 / beta)
    if name == "generalized_jsd":
        return Mixture(beta, 1 - beta, teacher_weight=beta, student_weight=1 - beta)
    if name == "skewed_kl":
        return Mixture(skew, 1 - skew, teacher_weight=1, student_weight=0, spread_weight=-((1 - skew) ** 2))
    return Mixture(1 - skew, skew, teacher_weight=0, student_weight=1, spread_weight=skew * (1 - skew))


def mixture_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, mixture: Mixture | str
) -> Tensor:
    """(...,) values of (..., classes) logits by what `mixture_of` gives, times temperature²."""
    if isinstance(mixture, str):
        end = forward_kl if mixture == "forward_kl" else reverse_kl
        return end(student_logits, teacher_logits, temperature=temperature)
    formula = functools.partial(_mixture_block, mixture=mixture)
    return softened_divergence(student_logits, teacher_logits, temperature, formula)


def _mixture_block(block: Softened, *, mixture: Mixture) -> Tensor | None:
    """The formula.

    With v = (p_t - p_s) / m the ratios are p_t / m = 1 + student_share v and p_s / m = 1 - teacher_share v, so that
    their logarithms are exact near equality and near either end, where they are divided by a small share.
    """
    student_probs, teacher_probs = block.student_probs, block.teacher_probs
    if mixture.teacher_share < mixture.student_share:
        m = torch.lerp(student_probs, teacher_probs, mixture.teacher_share, out=block.student)
    else:
        m = torch.lerp(teacher_probs, student_probs, mixture.student_share, out=block.student)
    m.clamp_(min=torch.finfo(m.dtype).tiny)
    v = torch.sub(teacher_probs, student_probs, out=block.teacher).div_(m)
    block.value.zero_()
    gradient = None
    if mixture.teacher_weight:
        terms = _log_of_ratio(v, mixture.student_share, out=block.student).mul_(teacher_probs)
        block.value.add_(terms.sum(-1, keepdim=True), alpha=mixture.teacher_weight)
    if mixture.student_weight:
        terms = _log_of_ratio(v, -mixture.teacher_share, out=block.student).mul_(student_probs)
        expected = terms.sum(-1, keepdim=True)
        block.value.add_(expected, alpha=mixture.student_weight)
        if block.needs_gradient:
            gradient = terms.addcmul_(student_probs, expected, value=-1).mul_(mixture.student_weight)
    if block.needs_gradient and mixture.spread_weight:
        spread = v.mul_(student_probs)
        spread.addcmul_(student_probs, spread.sum(-1, keepdim=True), value=-1).mul_(mixture.spread_weight)
        gradient = spread if gradient is None else gradient.add_(spread)
    return gradient


def _log_of_ratio(v: Tensor, share: float, *, out: Tensor) -> Tensor:
    """log(1 + share * v); finite where the ratio is 0, as it is then multiplied by a probability of 0."""
    smallest = torch.finfo(v.dtype).eps / 2 - 1
    return torch.mul(v, share, out=out).clamp_(min=smallest).log1p_()
