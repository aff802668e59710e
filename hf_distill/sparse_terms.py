"""The logit term with a teacher that names its most likely classes alone."""

from typing import Any

from torch import Tensor

from hf_distill.config import LogitTerm
from hf_distill.item_weights import ItemWeights
from hf_distill.losses.base import LossSpec
from hf_distill.losses.sparse import SPARSE_LOSSES
from hf_distill.pairing import ModelPair
from hf_distill.signals import SparseLogits, Task
from hf_distill.temperature import TemperaturePolicy

_REMEDY = "or take a teacher that gives all logits, as a model does"


def are_all_classes(k: int, classes: int | None, spec: LossSpec) -> bool:
    """Whether a teacher's k most likely classes are as good as its logits to a loss: all of one distribution.

    Args:
        k: how many it names.
        classes: how many are compared; None where the input decides.
        spec: the loss.
    """
    return classes is not None and k >= classes and spec.compares == "classes"


def fits_buckets(term: LogitTerm, spec: LossSpec, temperature: float) -> bool:
    """Whether the term can be formed of a teacher's most likely classes and one bucket of all others."""
    is_plain = term.transform == "none" and term.teacher_scale == 1
    return spec.name in SPARSE_LOSSES and is_plain and term.temperature == temperature


def check_sparse_term(term: LogitTerm, spec: LossSpec, *, k: int, temperature: float) -> None:
    """Refuses a logit term that needs more of the teacher than its most likely classes.

    Args:
        term: the term; one of weight 0 is not looked at.
        spec: the loss that it means for the head.
        k: how many classes the teacher names.
        temperature: of its log-probabilities.

    Raises:
        ValueError: with what would work.
    """
    if term.weight == 0:
        return
    if spec.name not in SPARSE_LOSSES:
        meant = "" if spec.name == term.loss else f", which kd_loss={term.loss!r} means for this head,"
        raise ValueError(
            f"{spec.name}{meant} needs every class of the teacher, and this one names its {k} most likely. Take one "
            f"of {', '.join(SPARSE_LOSSES)}, {_REMEDY}."
        )
    if isinstance(term.temperature, TemperaturePolicy) or term.temperature != temperature:
        raise ValueError(
            f"The teacher's log-probabilities are of temperature {temperature}, and the term's temperature is "
            f"{term.temperature}. What all classes but its {k} most likely have in sum is not known at another one. "
            f"Set temperature={temperature}, have the teacher asked anew at yours, {_REMEDY}."
        )
    if term.transform != "none" or term.teacher_scale != 1:
        name = "transform (logit_transform)" if term.transform != "none" else "teacher_scale"
        raise ValueError(
            f"{name} changes all logits of the teacher, and this one names its {k} most likely classes. Drop it, "
            f"{_REMEDY}."
        )


def check_sparse_weights(weights: ItemWeights | None) -> None:
    """Refuses weights of items that are made of the teacher's logits.

    Raises:
        ValueError: with what would work.
    """
    if weights is not None and weights.needs_teacher:
        raise ValueError(
            "Item weights by the teacher's confidence or correctness read its logits, and this teacher names its most "
            f"likely classes alone. Weigh by a column, {_REMEDY}."
        )


def align_sparse(student_logits: tuple[Tensor, ...], teacher: SparseLogits, pair: ModelPair) -> tuple[Tensor, Any]:
    """The student's logits, cut to the classes that both have, beside the teacher's `SparseLogits`.

    Raises:
        ValueError: the positions differ.
    """
    (student,) = student_logits
    if teacher.indices.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"The student's logits have shape {tuple(student.shape)}, the teacher's classes "
            f"{tuple(teacher.indices.shape)}. Item by item they must mean the same: give both the same tokens."
        )
    return student if pair.classes is None else student[..., : pair.classes], teacher


def check_sparse_pair(pair: ModelPair) -> None:
    """Refuses heads and vocabularies in which an index is no class of the student.

    Raises:
        ValueError: with what would work.
    """
    if pair.task in (Task.QUESTION_ANSWERING, Task.EMBEDDING):
        raise ValueError(
            f"The teacher names the most likely classes of an item, and a head for {pair.task} has no single "
            "distribution per item. Take a teacher that gives all logits, as a model does."
        )
    if getattr(pair, "shared_tokens", None) is not None:
        raise ValueError(
            "The teacher names its most likely classes by the numbers of its own vocabulary, and the student's is "
            f"another. Take a teacher with the student's tokenizer, {_REMEDY}."
        )
