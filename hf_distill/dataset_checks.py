"""What a data set must hold for the terms asked for, looked up before the first step."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from hf_distill.batches import TARGETS
from hf_distill.collator import LABEL_COLUMNS, SPAN_COLUMNS, is_missing
from hf_distill.items import IGNORE_INDEX
from hf_distill.objective_checks import check_head
from hf_distill.signals import Task

ROWS_LOOKED_AT = 1000
_ROWS_WITHOUT_COLUMN = 16  # after which no later row is expected to have it


def label_columns(task: Task) -> tuple[str, ...]:
    """The names a data set's labels may have.

    None for language models, whose collator makes the labels, and for models without a head.
    """
    if task is Task.QUESTION_ANSWERING:
        return SPAN_COLUMNS
    learns_none = task is Task.EMBEDDING or (task.is_language_model and task is not Task.CTC)
    return () if learns_none else LABEL_COLUMNS


def find_label(dataset: Any, task: Task, *, required: bool) -> Any | None:
    """The first label that is not missing among a data set's first rows, or None.

    Raises:
        ValueError: one is required, but there is no label column at all; the message lists the columns there are.
    """
    columns = label_columns(task)
    if dataset is None or not columns:
        return None
    with random_states_kept():
        return _find_label(dataset, columns, required=required)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """A data set that augments its rows draws random numbers; looking at some must not change the training's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _find_label(dataset: Any, columns: tuple[str, ...], *, required: bool) -> Any | None:
    found: set[str] = set()
    for number, row in enumerate(first_rows(dataset, columns)):
        if not isinstance(row, Mapping):
            return None
        found |= {*row}
        if number >= _ROWS_WITHOUT_COLUMN and found.isdisjoint(columns):
            break
        label = next((row[name] for name in columns if name in row and not is_missing(row[name])), None)
        if label is not None:
            return label
    if required and found and found.isdisjoint(columns):
        raise ValueError(
            f"task_weight > 0, but the training data has no column named {' or '.join(columns)} (it has "
            f"{', '.join(sorted(found))}). Rename the label column, or set task_weight=0 to learn from the "
            "teacher alone."
        )
    return None


def is_indexed(dataset: Any) -> bool:
    """Whether a data set's rows can be had by their number."""
    # torch's IterableDataset has a __getitem__ too, which only raises, and may have a length.
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def first_rows(dataset: Any, columns: tuple[str, ...]) -> Iterable[Any]:
    """Up to a thousand rows with these columns, if there are such; none of rows that can be read but once."""
    names = getattr(dataset, "column_names", None) or []
    present = [name for name in columns if name in names]
    if present and hasattr(dataset, "select_columns"):
        # Decodes no image or sound, and runs no transform, which would look for the other columns.
        dataset = dataset.select_columns(present).with_format(None)
    if is_indexed(dataset):
        return (dataset[i] for i in range(min(len(dataset), ROWS_LOOKED_AT)))
    rows = iter(dataset)
    # Rows that can be read but once are for training.
    return () if iter(dataset) is rows else islice(rows, ROWS_LOOKED_AT)


def label_filler(task: Task, config: Any, label: Any | None) -> Any:
    """What stands for a missing label, so that a collator can make a tensor of it.

    Args:
        task: what the student's head predicts.
        config: the student's config.
        label: some label of the data set, or None if there is none to look at.
    """
    if task is Task.CTC:  # an empty target would leave nothing to pad
        return [IGNORE_INDEX]
    if task is Task.EMBEDDING:  # scores for the user's own metrics, which nothing here reads
        return np.nan
    values = np.asarray(0 if label is None else label)
    kind = kind_of_label(task, config, label)
    if kind == "single_label_classification":  # of any dtype: gaps make pandas store classes as floats
        return np.full(values.shape, IGNORE_INDEX).tolist()
    if label is None and kind == "multi_label_classification":
        values = np.zeros(config.num_labels)
    is_int = label is not None and values.dtype.kind != "f"
    return np.full(values.shape, IGNORE_INDEX if is_int else np.nan).tolist()


def kind_of_label(task: Task, config: Any, label: Any | None) -> str:
    """Transformers' name of the kind of sequence classification, by the config or by a label."""
    if task is not Task.SEQUENCE_CLASSIFICATION:
        return "single_label_classification"
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if np.asarray(label).size > 1 else "single_label_classification"


def check_batch(inputs: Mapping[str, Any], task: Task, task_weight: float) -> None:
    """Refuses a first batch without the labels that the task loss needs, where `find_label` found none either.

    And a task loss, however it was turned on, of a model without a head.

    Raises:
        ValueError: with what makes them.
    """
    check_head(task, task_weight=task_weight)
    if task_weight > 0 and not {*TARGETS} & {*inputs}:
        remedy = {
            Task.CAUSAL_LM: "DataCollatorForLanguageModeling(tokenizer, mlm=False)",
            Task.MASKED_LM: "DataCollatorForLanguageModeling(tokenizer)",
            Task.SEQ2SEQ_LM: "a labels column and DataCollatorForSeq2Seq(tokenizer, model)",
            Task.QUESTION_ANSWERING: "columns start_positions and end_positions",
        }.get(task, "a label column")
        raise ValueError(
            f"task_weight={task_weight}, but the batches hold no labels (they hold {', '.join(inputs)}). "
            f"Use {remedy}, or set task_weight=0 to learn from the teacher alone."
        )
