"""What is compared: each divergence of ours and its composition from torch's functions under autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_distill import losses
from hf_distill.losses.fused import cross_entropy_and_forward_kl

TASK_WEIGHT = KD_WEIGHT = 0.5
SKEW = 0.1
HEAD = 0.5
TOP_K = 64


class Inputs(NamedTuple):
    """What a loss is given."""

    student_logits: Tensor  # (items, classes), with gradient
    teacher_logits: Tensor  # (items, classes)
    targets: Tensor  # (items,)


# A mean over the items. The naive ones compute in float32, or in float64 if given float64.
Contender = Callable[[Inputs, float], Tensor]


def softened(
    inputs: Inputs,
    temperature: float,
    of_student: Callable[..., Tensor],
    of_teacher: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """A function, or one for each, of both logits divided by the temperature, in float32 or better."""

    def of(logits: Tensor, function: Callable[..., Tensor]) -> Tensor:
        return function(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)

    return of(inputs.student_logits, of_student), of(inputs.teacher_logits, of_teacher or of_student)


def naive_forward_kl(inputs: Inputs, temperature: float) -> Tensor:
    """The composition that tutorials show."""
    log_probs, teacher_probs = softened(inputs, temperature, torch.log_softmax, torch.softmax)
    return functional.kl_div(log_probs, teacher_probs, reduction="batchmean") * temperature**2


def naive_reverse_kl(inputs: Inputs, temperature: float) -> Tensor:
    """The same with the sides exchanged."""
    student, teacher = softened(inputs, temperature, torch.log_softmax)
    return functional.kl_div(teacher, student, reduction="batchmean", log_target=True) * temperature**2


def naive_symmetric_kl(inputs: Inputs, temperature: float) -> Tensor:
    """The mean of both directions."""
    student, teacher = softened(inputs, temperature, torch.log_softmax)
    onward = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    backward = functional.kl_div(teacher, student, reduction="batchmean", log_target=True)
    return (onward + backward) / 2 * temperature**2


def naive_generalized_jsd(inputs: Inputs, temperature: float) -> Tensor:
    """The mean KL to the mean of the probabilities."""
    student, teacher = softened(inputs, temperature, torch.softmax)
    mixture = ((student + teacher) / 2).log()
    onward = functional.kl_div(mixture, teacher, reduction="batchmean")
    backward = functional.kl_div(mixture, student, reduction="batchmean")
    return (onward + backward) / 2 * temperature**2


def naive_jsd(inputs: Inputs, temperature: float) -> Tensor:
    """As the other, over 1/4."""
    return 4 * naive_generalized_jsd(inputs, temperature)


def naive_skewed_kl(inputs: Inputs, temperature: float) -> Tensor:
    """DistiLLM's, from probabilities."""
    student, teacher = softened(inputs, temperature, torch.softmax)
    mixture = (SKEW * teacher + (1 - SKEW) * student).log()
    return functional.kl_div(mixture, teacher, reduction="batchmean") * temperature**2


def naive_skewed_reverse_kl(inputs: Inputs, temperature: float) -> Tensor:
    """DistiLLM's, from probabilities."""
    student, teacher = softened(inputs, temperature, torch.softmax)
    mixture = (SKEW * student + (1 - SKEW) * teacher).log()
    return functional.kl_div(mixture, student, reduction="batchmean") * temperature**2


def naive_adaptive_kl(inputs: Inputs, temperature: float) -> Tensor:
    """Both directions, weighted as in the authors' description."""
    student, teacher = softened(inputs, temperature, torch.log_softmax)
    likely, order = teacher.exp().sort(-1, descending=True)
    gaps = (likely - student.detach().exp().gather(-1, order)).abs()
    in_head = likely.cumsum(-1) <= HEAD
    in_head[:, 0] = True
    share = (gaps * in_head).sum(-1) / gaps.sum(-1)
    onward = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    backward = functional.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    return (share * onward + (1 - share) * backward).mean() * temperature**2


def naive_tvd(inputs: Inputs, temperature: float) -> Tensor:
    """Half the summed absolute difference."""
    student, teacher = softened(inputs, temperature, torch.softmax)
    return (student - teacher).abs().sum(-1).mean() / 2 * temperature**2


def naive_squared_hellinger(inputs: Inputs, temperature: float) -> Tensor:
    """Half the summed squared difference of the roots."""
    student, teacher = softened(inputs, temperature, torch.softmax)
    return (student.sqrt() - teacher.sqrt()).square().sum(-1).mean() / 2 * temperature**2


def naive_top_k_kl(inputs: Inputs, temperature: float) -> Tensor:
    """KL of the k classes and of the log-sum-exp of the others."""
    student, teacher = softened(inputs, temperature, torch.log_softmax)
    top = teacher.topk(TOP_K, -1).indices
    buckets = [
        torch.cat([logits.gather(-1, top), logits.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)], -1)
        for logits in (student, teacher)
    ]
    return functional.kl_div(*buckets, reduction="batchmean", log_target=True) * temperature**2


def mean_of(loss: Callable[..., Tensor], **options: float) -> Contender:
    """One of our losses."""

    def contender(inputs: Inputs, temperature: float) -> Tensor:
        return loss(inputs.student_logits, inputs.teacher_logits, temperature=temperature, **options).mean()

    return contender


def with_cross_entropy(kd: Contender) -> Contender:
    """The loss beside torch's cross-entropy, in float32 as Transformers' own."""

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        student_logits = inputs.student_logits
        precision = torch.promote_types(student_logits.dtype, torch.float32)
        cross_entropy = functional.cross_entropy(student_logits.to(precision), inputs.targets)
        return TASK_WEIGHT * cross_entropy + KD_WEIGHT * kd(inputs, temperature)

    return loss


def fused(inputs: Inputs, temperature: float, *, overwrite_teacher: bool = False) -> Tensor:
    """`hf_distill.losses.fused.cross_entropy_and_forward_kl`."""
    share = torch.full_like(inputs.targets, 1 / len(inputs.targets), dtype=torch.float32)
    loss, _, _ = cross_entropy_and_forward_kl(
        *inputs,
        task_weights=TASK_WEIGHT * share,
        kd_weights=KD_WEIGHT * share,
        temperature=temperature,
        overwrite_teacher=overwrite_teacher,
    )
    return loss


# The first contender of a case is what the others are compared with; in float64 it is what errors are measured by.
CASES: dict[str, dict[str, Contender]] = {
    "forward_kl": {"naive": naive_forward_kl, "forward_kl": mean_of(losses.forward_kl)},
    "reverse_kl": {"naive": naive_reverse_kl, "reverse_kl": mean_of(losses.reverse_kl)},
    "jsd": {"naive": naive_jsd, "jsd": mean_of(losses.jsd)},
    "cross_entropy_and_forward_kl": {
        "naive": with_cross_entropy(naive_forward_kl),
        "cross_entropy + forward_kl": with_cross_entropy(mean_of(losses.forward_kl)),
        "fused": fused,
        "fused, over the teacher": functools.partial(fused, overwrite_teacher=True),
    },
    "symmetric_kl": {"naive": naive_symmetric_kl, "symmetric_kl": mean_of(losses.symmetric_kl)},
    "generalized_jsd": {"naive": naive_generalized_jsd, "generalized_jsd": mean_of(losses.generalized_jsd)},
    "skewed_kl": {"naive": naive_skewed_kl, "skewed_kl": mean_of(losses.skewed_kl, skew=SKEW)},
    "skewed_reverse_kl": {
        "naive": naive_skewed_reverse_kl,
        "skewed_reverse_kl": mean_of(losses.skewed_reverse_kl, skew=SKEW),
    },
    "adaptive_kl": {"naive": naive_adaptive_kl, "adaptive_kl": mean_of(losses.adaptive_kl, head=HEAD)},
    "tvd": {"naive": naive_tvd, "tvd": mean_of(losses.tvd)},
    "squared_hellinger": {"naive": naive_squared_hellinger, "squared_hellinger": mean_of(losses.squared_hellinger)},
    "top_k_kl": {"naive": naive_top_k_kl, "top_k_kl": mean_of(losses.top_k_kl, k=TOP_K)},
}
# With two temperatures and two dtypes the others would take a quarter of an hour.
BY_DEFAULT = ("forward_kl", "reverse_kl", "jsd", "cross_entropy_and_forward_kl")
