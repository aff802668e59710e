"""Divergences from a teacher that names its most likely classes alone: over those and one bucket of all others."""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import LOSSES, compute_dtype
from hf_distill.losses.head_rows import Divergence
from hf_distill.losses.row_values import values_by_rows
from hf_distill.losses.top_k import top_k_kl
from hf_distill.signals import SparseLogits

# Of two distributions whose classes are merged they say less, and never more.
SPARSE_LOSSES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "generalized_jsd",
    "skewed_kl",
    "skewed_reverse_kl",
    "tvd",
    "squared_hellinger",
    "top_k_kl",
)
_BUFFERS = 4


class Buckets(NamedTuple):
    """A teacher's classes and its tail.

    Attributes:
        classes: (..., k) int64 in [0, classes), any of them for an entry that is empty.
        is_given: (..., k) bool, whether the entry holds a class.
        logits: (..., k + 1) of the entries and, as the last, the tail: temperature * log-probability, -inf of none.
    """

    classes: Tensor
    is_given: Tensor
    logits: Tensor


def sparse_divergence(student_logits: Tensor, teacher: SparseLogits, divergence: Divergence | None = None) -> Tensor:
    """A divergence over the teacher's k classes and one bucket of all others, at the teacher's temperature.

    The student's bucket holds its probability of all other classes, and its gradient reaches each of them in
    proportion to theirs. With all classes given it is the divergence itself; with fewer it is at most that.

    Classes that the student does not have are left out, and what else the teacher holds possible, its tail included,
    sums to 1 again. Where all of the student's classes are given, nothing is left for a tail. The tail is taken for at
    least the rounding error of a sum of probabilities.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher: (..., k) of the same items.
        divergence: one of `SPARSE_LOSSES` with its options; None for `forward_kl`. The k of `top_k_kl` is that of the
            teacher if it has fewer.

    Returns: (...,) float32, times temperature², as the loss itself.
    Source: Anshumann et al. 2025, arXiv:2503.16870, the top-k baseline with a ghost token for the missing probability.

    Raises:
        ValueError: other items, or a loss that merging classes makes another one.
    """
    divergence, teacher = sparse_form(divergence or Divergence(), teacher)
    if teacher.indices.shape[:-1] != student_logits.shape[:-1] or not student_logits.shape[-1]:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, the teacher's classes "
            f"{tuple(teacher.indices.shape)}; expected (*items, classes) and (*items, k). Align positions first."
        )
    with torch.no_grad():
        buckets = teacher_buckets(teacher, student_logits.shape[-1], compute_dtype(student_logits))
    block = functools.partial(_rows, divergence=divergence, temperature=teacher.temperature)
    return values_by_rows(block, student_logits, buckets.logits, buckets.classes, buckets.is_given, buffers=_BUFFERS)


def sparse_form(divergence: Divergence, teacher: SparseLogits) -> tuple[Divergence, SparseLogits]:
    """The loss over buckets that a loss means, and the classes that it is about.

    Raises:
        ValueError: the loss changes where classes are merged, or changes the logits first.
    """
    name = divergence.spec.name
    if name not in SPARSE_LOSSES:
        raise ValueError(
            f"{name} needs every class of the teacher, and this one gives its {teacher.k} most likely ones. Take "
            f"forward_kl or another one of {', '.join(SPARSE_LOSSES)}, or a teacher that gives all logits."
        )
    if divergence.transform is not None or divergence.teacher_scale != 1:
        raise ValueError(
            "A transform, or a scale, of the teacher's logits needs all of them, and this teacher gives its "
            f"{teacher.k} most likely classes. Drop it, or take a teacher that gives all logits."
        )
    if name == "top_k_kl":
        default = (top_k_kl.__kwdefaults__ or {})["k"]
        teacher = teacher.narrowed(divergence.options.get("k", default))
        divergence = replace(divergence, spec=LOSSES.get("forward_kl"), options={})
    return divergence, teacher


def teacher_buckets(teacher: SparseLogits, classes: int, dtype: torch.dtype) -> Buckets:
    """The teacher's classes among the student's leading ones, and its tail; no gradient."""
    log_probs = teacher.log_probs.detach().to(dtype).masked_fill(teacher.indices < 0, -torch.inf)
    # Of all that it gives, what the student does not have included.
    given = log_probs.logsumexp(-1, keepdim=True)
    # 16-bit logarithms may well sum to more than 1.
    tail = given.clamp(max=-torch.finfo(dtype).eps).expm1().neg().log()
    is_given = (log_probs != -torch.inf) & (teacher.indices < classes)
    tail = tail.masked_fill(is_given.sum(-1, keepdim=True) >= classes, -torch.inf)
    log_probs = log_probs.masked_fill(~is_given, -torch.inf)
    logits = torch.cat([log_probs, tail], -1).mul_(teacher.temperature)
    return Buckets(torch.where(is_given, teacher.indices, 0), is_given, logits)


def bucket_divergence(
    student: Tensor, teacher: Tensor, divergence: Divergence, temperature: float, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(rows, 1) values and, where weights are given, (rows, k + 1) their gradient by the student's buckets.

    Args:
        student: (rows, k + 1) logits of the buckets: temperature * log of what is proportional to a probability.
        teacher: as `student`.
        divergence: over all buckets.
        temperature: of both.
        weights: (rows, 1), multiply the gradient, which is 0 where they are, whatever the row holds.
    """
    with torch.set_grad_enabled(weights is not None):
        leaf = student.detach().requires_grad_(weights is not None)
        values = divergence.spec.function(leaf, teacher, temperature=temperature, **divergence.options)
        if not divergence.temperature_squared:
            values = values / temperature**2
    if weights is None:
        return values.unsqueeze(-1), None
    (gradient,) = torch.autograd.grad(values, leaf, weights.squeeze(-1).to(values.dtype))
    return values.detach().unsqueeze(-1), gradient


def _rows(
    student: Tensor, teacher: Tensor, classes: Tensor, is_given: Tensor, *, divergence: Divergence, temperature: float
) -> tuple[Tensor, Tensor]:
    """(rows, 1) values of (rows, classes) logits, and their gradient."""
    named = student.gather(-1, classes).masked_fill_(~is_given, -torch.inf)
    rest = without_classes(student.clone(), classes, is_given).div_(temperature)
    tail = rest.logsumexp(-1, keepdim=True).mul_(temperature)
    buckets = torch.cat([named, tail], -1)
    values, parts = bucket_divergence(buckets, teacher, divergence, temperature, torch.ones_like(tail))
    assert parts is not None
    # Where nothing is left for the tail, there is nothing that could move.
    gradient = rest.softmax(-1).masked_fill_(tail == -torch.inf, 0.0).mul_(parts[:, -1:])
    # An entry that is empty is impossible on both sides, and so its part is 0.
    return values, gradient.scatter_add_(-1, classes, parts[:, :-1])


def without_classes(logits: Tensor, classes: Tensor, is_given: Tensor) -> Tensor:
    """Sets the teacher's classes to -inf in (rows, classes) logits, in place."""
    # Adding, as an empty entry stands for a class that another one may name.
    taken = torch.where(is_given, -torch.inf, 0.0).to(logits.dtype)
    return logits.scatter_add_(-1, classes, taken)
