"""Signals of student and teacher -> summed terms. Nothing here is read back to the host."""

import math

import torch
from torch import Tensor

from hf_distill.batches import Batch
from hf_distill.config import LogitTerm
from hf_distill.losses.base import LOSSES, masked_sum
from hf_distill.signals import Task

# Heads whose classes are no distribution take the forward KL's counterpart.
_COUNTERPARTS = {
    ("forward_kl", "multi_label_classification"): "binary_forward_kl",
    ("forward_kl", "regression"): "logit_mse",
}


def loss_name(term: LogitTerm, task: Task, problem_type: str) -> str:
    """The registered loss that `term.loss` means for this head."""
    if task is not Task.SEQUENCE_CLASSIFICATION:
        return term.loss
    return _COUNTERPARTS.get((term.loss, problem_type), term.loss)


def kd_sum(
    pairs: list[tuple[Tensor, Tensor]], batch: Batch, term: LogitTerm, *, task: Task, problem_type: str
) -> Tensor:
    """The logit term summed over the batch's KD items: scalar float32.

    Args:
        pairs: student and teacher logits, (batch, classes) or (batch, length, classes); for question answering two
            pairs of (batch, length), whose classes are the real positions, and whose mean is one item's value.
        batch: the batch.
        term: the loss and its temperature.
        task: what the heads predict.
        problem_type: Transformers' name of the kind of sequence classification.

    Raises:
        ValueError: the logits have other positions than the batch, as with prompt tuning's virtual tokens.
    """
    spec = LOSSES.get(loss_name(term, task, problem_type))
    options = {"temperature": term.temperature} if spec.takes_temperature else {}
    if task is Task.QUESTION_ANSWERING:
        pairs = [(_real_positions(student, batch), _real_positions(teacher, batch)) for student, teacher in pairs]
    values = [spec.function(student, teacher, **options) for student, teacher in pairs]
    for value in values:
        if value.shape != batch.items.kd.shape:
            raise ValueError(
                f"The logits have {tuple(value.shape)} items, the batch {tuple(batch.items.kd.shape)}. A model that "
                "adds or drops positions (prompt tuning, patch merging) cannot be distilled position by position."
            )
    return torch.stack([masked_sum(value, batch.items.kd) for value in values]).mean()


def agreement_sum(pairs: list[tuple[Tensor, Tensor]], batch: Batch, *, task: Task, problem_type: str) -> Tensor | None:
    """On how many KD items student and teacher choose alike: scalar; None for regression, which chooses nothing."""
    if task is Task.SEQUENCE_CLASSIFICATION and problem_type == "regression":
        return None
    if task is Task.SEQUENCE_CLASSIFICATION and problem_type == "multi_label_classification":
        ((student, teacher),) = pairs
        return masked_sum(((student > 0) == (teacher > 0)).float().mean(-1), batch.items.kd)
    if task is Task.QUESTION_ANSWERING:
        pairs = [(_real_positions(student, batch), _real_positions(teacher, batch)) for student, teacher in pairs]
    same = [student.argmax(-1) == teacher.argmax(-1) for student, teacher in pairs]
    return masked_sum(torch.stack(same).all(0).float(), batch.items.kd)


def _real_positions(logits: Tensor, batch: Batch) -> Tensor:
    mask = batch.student.get("attention_mask")
    return logits if mask is None else logits.masked_fill(~mask.bool(), -math.inf)
