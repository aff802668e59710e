"""Losses between the attention maps of one layer of the student and one of the teacher, all pairs in memory.

`factored` has the same values, summed over each sequence, without them.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.base import compute_dtype, register_loss
from hf_distill.signals import Scores

# Stands for -inf: its exponential is 0, differences stay finite, and the softmax of a row that sees no key is the same
# for student and teacher.
NO_SCORE = -1e30


@register_loss("attention_mse", feature="attention", item="pair", paper="TinyBERT, Jiao et al. 2020, arXiv:1909.10351")
def attention_mse(student: Scores, teacher: Scores, *, keys: Tensor) -> Tensor:
    """The squared difference of the scores before the softmax, as a mean over the heads.

    Args:
        student: scores of any float dtype; computed in float32 (float64 if given float64).
        teacher: scores of the same batch, heads, queries and keys; carries no gradient.
        keys: (batch, keys) bool, the real ones.

    Returns: (batch, queries, keys) float32, >= 0, and 0 for keys that the query does not see (`visible_pairs`). Where
        queries and keys are the same positions, masked ones are 0 as queries too.
    Source: TinyBERT, arXiv:1909.10351, eq. 7. The authors' code also counts the padding, as pairs without difference.
    """
    student_scores, teacher_scores, visible = _dense(student, teacher, keys)
    squares = torch.where(visible, student_scores - teacher_scores, 0.0).square().mean(1)
    return squares if (queries := _real_queries(student, keys)) is None else torch.where(queries, squares, 0.0)


@register_loss(
    "attention_kl",
    feature="attention",
    item="row",
    paper="MobileBERT, Sun et al. 2020, arXiv:2004.02984; MiniLM, Wang et al. 2020, arXiv:2002.10957",
)
def attention_kl(student: Scores, teacher: Scores, *, keys: Tensor) -> Tensor:
    """KL(teacher || student) of each query's attention probabilities, in nats, as a mean over the heads.

    Args:
        student: scores of any float dtype; computed in float32 (float64 if given float64).
        teacher: scores of the same batch, heads, queries and keys; carries no gradient.
        keys: (batch, keys) bool, the real ones. Probability is shared among those that both sides see
            (`visible_pairs`), and the sinks where both have them.

    Returns: (batch, queries) float32, >= 0, and 0 for queries that see no key.
    Source: MobileBERT, arXiv:2004.02984, eq. 2; MiniLM, arXiv:2002.10957, eq. 5.
    """
    return kl_of_rows(*_with_sinks(student, teacher, *_dense(student, teacher, keys))).mean(1)


@register_loss(
    "attention_probs_mse",
    feature="attention",
    item="row",
    paper="TextBrewer, Yang et al. 2020, arXiv:2002.12620",
)
def attention_probs_mse(student: Scores, teacher: Scores, *, keys: Tensor) -> Tensor:
    """The squared difference of each query's attention probabilities, summed over the keys, as a mean over the heads.

    The sum is the Brier score of a row, whose size does not depend on the length of the text.

    Args:
        student: scores of any float dtype; computed in float32 (float64 if given float64).
        teacher: scores of the same batch, heads, queries and keys; carries no gradient.
        keys: (batch, keys) bool, as in `attention_kl`.

    Returns: (batch, queries) float32, from 0 to 2, and 0 for queries that see no key.
    Source: TextBrewer, arXiv:2002.12620, `attention_mse` of maps after the softmax; there it is a mean over the keys.
    """
    student_scores, teacher_scores, visible = _with_sinks(student, teacher, *_dense(student, teacher, keys))
    student_probs, teacher_probs = (
        torch.where(visible, scores, NO_SCORE).softmax(-1) for scores in (student_scores, teacher_scores)
    )
    return (student_probs - teacher_probs).square().sum(-1).mean(1)


def visible_pairs(student: Scores, teacher: Scores, keys: Tensor) -> Tensor:
    """Which keys both sides' queries see: real, not later where either side is causal, and allowed by both.

    Args:
        student: scores.
        teacher: scores of the same queries and keys.
        keys: (batch, keys) bool, the real ones.

    Returns: bool, broadcastable to (batch, heads, queries, keys); its last dimension is that of the keys.
    """
    visible = keys[:, None, None, :]
    if student.causal or teacher.causal:
        queries = torch.arange(student.left.shape[2], device=keys.device).unsqueeze(-1)
        visible = visible & (torch.arange(keys.shape[1], device=keys.device) <= queries)
    for allowed in (student.allowed, teacher.allowed):
        visible = visible if allowed is None else visible & allowed
    return visible


def kl_of_rows(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over the last dimension.

    Args:
        student: (..., keys).
        teacher: (..., keys).
        visible: bool, broadcastable to the two: the entries that get probability.

    Returns: (...,), 0 where nothing is visible.
    """
    student, teacher = (torch.where(visible, scores, NO_SCORE).log_softmax(-1) for scores in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(-1)


def check_scores(student: Scores, teacher: Scores, keys: Tensor) -> None:
    """Refuses scores of another batch, number of heads, of queries or of keys."""
    shapes = [(*scores.left.shape[:3], scores.right.shape[2]) for scores in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The student's scores are (batch, heads, queries, keys) = {shapes[0]}, the teacher's {shapes[1]}; they "
            "must be equal. Where only the heads differ, compare their mean or relations between positions "
            "(minilmv2_relations)."
        )
    if keys.dtype != torch.bool or keys.shape != (shapes[0][0], shapes[0][3]):
        raise ValueError(
            f"keys has dtype {keys.dtype} and shape {tuple(keys.shape)}; expected torch.bool and (batch, keys) = "
            f"{(shapes[0][0], shapes[0][3])}."
        )


def _dense(student: Scores, teacher: Scores, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, heads, queries, keys) scores of student and teacher, and which of them both sides see."""
    check_scores(student, teacher, keys)
    dtype = compute_dtype(student.left, student.right, teacher.left, teacher.right)
    with torch.autocast(keys.device.type, enabled=False):
        student_scores = _precise(student, keys, dtype).dense()
        with torch.no_grad():
            teacher_scores = _precise(teacher, keys, dtype).dense()
    return student_scores, teacher_scores, visible_pairs(student, teacher, keys)


def _with_sinks(
    student: Scores, teacher: Scores, student_scores: Tensor, teacher_scores: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if student.sinks is None or teacher.sinks is None:
        return student_scores, teacher_scores, visible
    student_scores, teacher_scores = (
        torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], -1)
        for scores, sinks in ((student_scores, student.sinks), (teacher_scores, teacher.sinks.detach()))
    )
    return student_scores, teacher_scores, F.pad(visible, (0, 1), value=True)


def _precise(scores: Scores, keys: Tensor, dtype: torch.dtype) -> Scores:
    # Zeros in place of what stands at padding: a NaN there would reach every gradient through the products.
    queries = _real_queries(scores, keys)
    left, right = scores.left.to(dtype), torch.where(keys[:, None, :, None], scores.right.to(dtype), 0.0)
    left = left if queries is None else torch.where(queries.unsqueeze(1), left, 0.0)
    return replace(scores, left=left, right=right, bias=None if scores.bias is None else scores.bias.to(dtype))


def _real_queries(scores: Scores, keys: Tensor) -> Tensor | None:
    """(batch, queries, 1), where the queries are the positions that the keys are."""
    return keys.unsqueeze(-1) if scores.left.shape[2] == keys.shape[1] else None
