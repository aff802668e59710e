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
from hf_distill.signals import Task, read_logits
from hf_distill.targets import class_targets


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
    if task is Task.QUESTION_ANSWERING:
        return _span_task_loss(outputs, batch, counts)
    ctc_sum = is_sum(task, config)
    if not batch.all_labelled and (values := _row_losses(outputs, batch, task, problem_type, config)) is not None:
        return masked_sum(values, batch.items.task[0]) / (1 if ctc_sum else counts.task[0].clamp(min=1))
    if outputs.get("loss") is None:
        raise ValueError(
            f"The student returned no loss for {', '.join(batch.labels)}. Its forward must take `labels` and return "
            "their loss; pass compute_loss_func for a head without one, or set task_weight=0."
        )
    present = batch.items.task[0].sum()
    share = 1 if counts.single or ctc_sum else present / counts.task[0].clamp(min=1)
    # A micro-batch without labels has the mean 0/0; its parameters' gradients are 0 all the same.
    return torch.where(present > 0, outputs["loss"] * share, 0.0)


def span_sums(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropies of the start and of the end positions, each summed over the rows that have one."""
    sides = (("start_logits", "start_positions"), ("end_logits", "end_positions"))
    sums = [
        masked_sum(_span_loss(outputs[logits], batch.student[positions]), mask)
        for (logits, positions), mask in zip(sides, batch.items.task, strict=True)
    ]
    return sums[0], sums[1]


def item_losses(
    outputs: Any, batch: Batch, *, task: Task, problem_type: str, config: Any
) -> list[tuple[Tensor, Tensor]]:
    """The task loss item by item: float32 values and the bool mask of those that count, for each of its targets.

    Args:
        outputs: the student's output.
        batch: the batch, with labels.
        task: what the head predicts.
        problem_type: Transformers' name of the kind of sequence classification.
        config: the student's config.
    """
    if (values := _row_losses(outputs, batch, task, problem_type, config)) is not None:
        return [(values, batch.items.task[0])]
    logits = read_logits(task, outputs)
    targets = class_targets(batch, task, classes=logits[0].shape[-1])
    return [
        (F.cross_entropy(each.float().flatten(0, -2), label.flatten(), reduction="none").view(label.shape), mask)
        for each, label, mask in zip(logits, targets, batch.items.task, strict=True)
    ]


def _span_task_loss(outputs: Any, batch: Batch, counts: StepCounts) -> Tensor:
    """The mean of two means, of the starts and of the ends: rows may have been cut off between the two."""
    means = [total / count.clamp(min=1) for total, count in zip(span_sums(outputs, batch), counts.task, strict=True)]
    loss = torch.stack(means).mean()
    if not (counts.single and batch.all_labelled):
        return loss
    # The head's own, to the bit, but where a side without any position makes it NaN.
    starts, ends = counts.task
    return torch.where((starts > 0) & (ends > 0), outputs["loss"], loss)


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


def _row_losses(outputs: Any, batch: Batch, task: Task, problem_type: str, config: Any) -> Tensor | None:
    """(batch,) a value per row; None where the model's own mean leaves unlabelled items out by itself."""
    if task is Task.CTC:
        return _ctc_loss(outputs["logits"], batch, config)
    if task is not Task.SEQUENCE_CLASSIFICATION or problem_type == "single_label_classification":
        return None
    labels = batch.student["labels"]
    logits = outputs["logits"].reshape(len(labels), -1).float()
    # What stands for a missing label (NaN) must not reach the difference: its gradient would survive the mask.
    labels = torch.where(batch.items.labelled[:, None], labels.reshape(len(labels), -1).float(), 0.0)
    if problem_type == "regression":
        return (logits - labels).square().mean(-1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


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
