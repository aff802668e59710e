"""Losses between the relations of a sequence's positions: attention of values, keys or queries to themselves.

Student and teacher may differ in width, and in heads where these are regrouped.
"""

from torch import Tensor

from hf_distill.losses.attentions import attention_kl
from hf_distill.losses.base import Reference, register_loss
from hf_distill.signals import Scores

_MEAN_OF_SEQUENCES = Reference(items="sample_mean")


@register_loss(
    "minilm_values",
    feature="relation",
    item="row",
    paper="MiniLM, Wang et al. 2020, arXiv:2002.10957",
    reference=_MEAN_OF_SEQUENCES,
)
def minilm_values(student: Scores, teacher: Scores, *, keys: Tensor) -> Tensor:
    """KL(teacher || student) of the value relations softmax(V V^T / sqrt(width)) of the model's heads, in nats.

    Args:
        student: scores whose left and right are both the values, by head; any float dtype, computed in float32
            (float64 if given float64).
        teacher: likewise, with as many heads, of any width; carries no gradient.
        keys: (batch, keys) bool, the real positions.

    Returns: (batch, queries) float32, >= 0, the mean over the heads.
    Source: MiniLM, arXiv:2002.10957, eq. 6-8; its mean runs over the rows of one sequence, then over the sequences.
    """
    return attention_kl(student, teacher, keys=keys)


@register_loss(
    "minilmv2_relations",
    feature="relation",
    item="row",
    paper="MiniLMv2, Wang et al. 2021, arXiv:2012.15828",
    reference=_MEAN_OF_SEQUENCES,
)
def minilmv2_relations(student: Scores, teacher: Scores, *, keys: Tensor) -> Tensor:
    """KL(teacher || student) of the relations softmax(X X^T / sqrt(width)) of relation heads, in nats.

    Args:
        student: scores whose left and right are both X: queries, keys or values, all heads side by side and split
            anew into relation heads; any float dtype, computed in float32 (float64 if given float64).
        teacher: likewise, with as many relation heads, of any width; carries no gradient.
        keys: (batch, keys) bool, the real positions.

    Returns: (batch, queries) float32, >= 0, the mean over the relation heads.
    Source: MiniLMv2, arXiv:2012.15828, eq. 4-6; its mean runs over the rows of one sequence, then over the sequences.
    """
    return attention_kl(student, teacher, keys=keys)
