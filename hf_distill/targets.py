"""The class that each item should have by its label, in the layout of the logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.batches import Batch
from hf_distill.items import IGNORE_INDEX
from hf_distill.signals import Task


def next_tokens(batch: Batch, task: Task) -> Tensor:
    """(batch, length) the class that each position of a language model should predict; -100 for none."""
    if "shift_labels" in batch.labels:
        return batch.labels["shift_labels"]
    labels = batch.labels["labels"]
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if task is Task.CAUSAL_LM else labels


def has_class_targets(task: Task, problem_type: str) -> bool:
    """Whether an item's label is one class."""
    is_row = task is Task.SEQUENCE_CLASSIFICATION
    return task is not Task.CTC and (not is_row or problem_type == "single_label_classification")


def class_targets(batch: Batch, task: Task, *, classes: int) -> tuple[Tensor, ...]:
    """The labels as classes: one int64 tensor in the shape of the items; for question answering starts and ends.

    Args:
        batch: the batch; without labels every item's is -100.
        task: a task with `has_class_targets`.
        classes: how many both models share. A label beyond them is none, as -100 is.
    """
    labels = batch.labels
    if task is Task.QUESTION_ANSWERING:
        found = [labels.get(name) for name in ("start_positions", "end_positions")]
    elif task in (Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM):
        found = [next_tokens(batch, task) if labels else None]
    else:
        found = [labels.get("labels")]
    shape = batch.items.kd.shape
    none = torch.full(shape, IGNORE_INDEX, device=batch.items.kd.device)
    targets = [none if label is None else label.reshape(shape).long() for label in found]
    return tuple(torch.where((label >= 0) & (label < classes), label, IGNORE_INDEX) for label in targets)
