"""The student's loss on the labels, normalised over the whole accumulation window and all ranks.

Most heads return a mean over their own labelled items and know nothing of the window: that mean times its share of the
items is exact. Where a mean cannot be re-weighted so (rows to leave out that the head would count; two means in one),
the loss is formed here, item by item, from the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.accounting import StepCounts
from hf_distill.batches import Batch
from hf_distill.losses.base import masked_sum
from hf_distill.signals import Task


def task_loss(outputs: Any, batch: Batch, counts: StepCounts, *, task: Task, problem_type: str, config: Any) -> Tensor:
    """This batch's share of the mean task loss: scalar, 0 with a graph where the batch has no labelled item.

    Args:
        outputs: the student's output for `batch.student`, its own `loss` included.
        batch: the batch.
        counts: the divisors.
        task: what the head predicts.
        problem_type: Transformers' name of the kind of sequence classification.
        config: the student's config, for CTC's blank, reduction and treatment of impossible targets.
    """
    ctc_sum = is_sum(task, config)
    own_mean = batch.all_labelled and (counts.single or ctc_sum or task is not Task.QUESTION_ANSWERING)
    if not own_mean and (values := _item_losses(outputs, batch, task, problem_type, config)) is not None:
        divisors: tuple[Tensor | int, ...] = (1, 1) if ctc_sum else counts.task
        parts = [
            masked_sum(value, mask) / _at_least_one(divisor)
            for value, mask, divisor in zip(values, batch.items.task, divisors, strict=False)
        ]
        return torch.stack(parts).mean()
    present = batch.items.task[0].sum()
    share = 1 if counts.single or ctc_sum else present / _at_least_one(counts.task[0])
    # A micro-batch without labels has the mean 0/0; its parameters' gradients are 0 all the same.
    return torch.where(present > 0, outputs["loss"] * share, 0.0)


def check_smoothing(task: Task, problem_type: str, labels: Tensor | None) -> None:
    """Refuses label smoothing where an item has no single class to smooth.

    `Trainer` ignores the option for question answering and forms a meaningless loss for CTC.

    Raises:
        ValueError: the head is not trained on one class per item, or the batch has no `labels`.
    """
    is_class = task is not Task.SEQUENCE_CLASSIFICATION or problem_type == "single_label_classification"
    if labels is None or not is_class or task in (Task.QUESTION_ANSWERING, Task.CTC):
        raise ValueError(
            f"label_smoothing_factor > 0 needs `labels` with one class per item, which {task} has not here "
            f"(problem_type: {problem_type}). Set label_smoothing_factor=0: the teacher's soft labels smooth already."
        )


def is_sum(task: Task, config: Any) -> bool:
    """Whether the head adds its rows' losses up instead of averaging them, as CTC does by default."""
    return task is Task.CTC and config.ctc_loss_reduction == "sum"


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else count


def _item_losses(outputs: Any, batch: Batch, task: Task, problem_type: str, config: Any) -> tuple[Tensor, ...] | None:
    """One value per row, for each target; None where the model's own mean leaves unlabelled items out by itself."""
    if task is Task.QUESTION_ANSWERING:
        sides = (("start_logits", "start_positions"), ("end_logits", "end_positions"))
        return tuple(_span_loss(outputs[logits], batch.student[positions]) for logits, positions in sides)
    if task is Task.CTC:
        return (_ctc_loss(outputs["logits"], batch, config),)
    if task is not Task.SEQUENCE_CLASSIFICATION or problem_type == "single_label_classification":
        return None
    labels = batch.student["labels"]
    logits = outputs["logits"].reshape(len(labels), -1).float()
    # What stands for a missing label (NaN) must not reach the difference: its gradient would survive the mask.
    labels = torch.where(batch.items.labelled[:, None], labels.reshape(len(labels), -1).float(), 0.0)
    if problem_type == "regression":
        return ((logits - labels).square().mean(-1),)
    return (F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1),)


def _span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    length = logits.shape[-1]
    return F.cross_entropy(logits, positions.flatten().clamp(0, length), ignore_index=length, reduction="none")


def _ctc_loss(logits: Tensor, batch: Batch, config: Any) -> Tensor:
    labels = batch.student["labels"]
    target_lengths = (labels >= 0).sum(-1)
    values = F.ctc_loss(
        F.log_softmax(logits.float(), dim=-1).transpose(0, 1),
        labels.clamp(min=0),
        batch.items.kd.sum(-1),
        target_lengths,
        blank=config.pad_token_id,
        reduction="none",
        zero_infinity=config.ctc_zero_infinity,
    )
    return values if config.ctc_loss_reduction == "sum" else values / target_lengths.clamp(min=1)
