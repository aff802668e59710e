"""The rows of a report, in batches that are the same for every model."""

import random
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    SequenceFeatureExtractor,
    default_data_collator,
)

from hf_distill.collator import LABEL_COLUMNS, SPAN_COLUMNS, TEACHER_PREFIX, DistillationCollator
from hf_distill.dataset_checks import find_label, is_indexed, label_filler, random_states_kept
from hf_distill.items import LABEL_MASK
from hf_distill.models.heads import input_names, task_model
from hf_distill.signals import Task
from hf_distill.text.arguments import TextArguments
from hf_distill.text.collation import make_collator


class Rows:
    """Rows that are read once for each model, in the same batches.

    What is drawn at random on the way (masks, augmentations) is drawn alike every time, and whoever draws next outside
    finds the random states as they were.

    Args:
        dataset: rows by number, or a stream that can be read again.
        collator: makes a batch of rows.
        batch_size: >= 1.
        columns: those that the collator gets; None for all.
        seed: of what is drawn.

    Raises:
        ValueError: as of `check_rows`.
    """

    def __init__(
        self, dataset: Any, collator: Any, *, batch_size: int, columns: frozenset[str] | None = None, seed: int = 0
    ) -> None:
        check_rows(dataset)
        names = None if _is_made_when_read(dataset) else getattr(dataset, "column_names", None)
        if columns is not None and names and hasattr(dataset, "remove_columns"):  # before images are decoded in vain
            dataset = dataset.remove_columns([name for name in names if name not in columns])
        self._dataset, self._collator, self._columns = dataset, collator, columns
        self.batch_size, self._seed = batch_size, seed

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches, in the order of the rows."""
        # A collator that has a generator of its own goes on with it from one reading to the next.
        collator = _from_the_start(self._collator)
        with random_states_kept():
            random.seed(self._seed)
            np.random.seed(self._seed)
            torch.default_generator.manual_seed(self._seed)
            rows = iter(self._read())
            while chunk := [*islice(rows, self.batch_size)]:
                yield dict(collator(chunk))

    def _read(self) -> Iterable[Any]:
        data = self._dataset
        rows = (data[i] for i in range(len(data))) if is_indexed(data) else iter(data)
        return rows if self._columns is None else map(self._kept, rows)

    def _kept(self, row: Any) -> Any:
        columns = self._columns or frozenset()
        return {name: row[name] for name in row if name in columns} if isinstance(row, Mapping) else row


def check_rows(dataset: Any) -> None:
    """Refuses what cannot be measured on.

    Raises:
        ValueError: there is no row, a dict of data sets, or a stream that can be read but once.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset is a dict of {', '.join(map(str, dataset))}. Pass one of them.")
    if not is_indexed(dataset) and iter(dataset) is dataset:
        raise ValueError("These rows can be read but once, and each model reads them. Pass list(rows).")
    is_empty = len(dataset) == 0 if is_indexed(dataset) else next(iter(dataset), None) is None
    if is_empty:
        raise ValueError("The data set has no row to measure on.")


def make_rows(
    dataset: Any,
    *,
    task: Task,
    student: nn.Module,
    teacher: nn.Module,
    processing_class: Any | None,
    teacher_processing_class: Any | None,
    data_collator: Any | None,
    batch_size: int,
) -> Rows:
    """The rows as the trainer would batch them: labels may be missing, `teacher_*` columns are padded apart.

    Args:
        dataset: tokenised rows.
        task: what the heads predict.
        student: takes its columns by their names.
        teacher: likewise.
        processing_class: the student's tokenizer or feature extractor, which pads.
        teacher_processing_class: pads the `teacher_*` columns.
        data_collator: makes the student's batch; None takes the usual one. One that is none of Transformers' gets all
            columns, as it may read some that no model names.
        batch_size: >= 1.

    Raises:
        ValueError: the rows have no column that the student reads.
    """
    if isinstance(data_collator, DistillationCollator):  # of a trainer, whose columns are chosen already
        collator = copy(data_collator)
        collator.row_weights, collator.always_mask = None, False
        return Rows(dataset, collator, batch_size=batch_size)
    label = find_label(dataset, task, required=False)
    inner = data_collator or _usual_collator(task, processing_class, has_labels="labels" in _column_names(dataset))
    collator = DistillationCollator(
        inner,
        task=task,
        filler=label_filler(task, task_model(student).config, label),
        teacher_processing_class=teacher_processing_class,
    )
    columns = None
    if (getattr(inner, "__module__", None) or "").startswith(("transformers.", "hf_distill.")):
        _check_inputs(dataset, student)
        own = input_names(student) | input_names(teacher) | {*LABEL_COLUMNS, *SPAN_COLUMNS, LABEL_MASK}
        columns = own | {f"{TEACHER_PREFIX}{name}" for name in (*input_names(teacher), "positions")}
    return Rows(dataset, collator, batch_size=batch_size, columns=columns)


def _is_made_when_read(dataset: Any) -> bool:
    """Whether a transform (`with_transform`) makes the rows of columns that are not theirs."""
    made_by = getattr(dataset, "format", None)
    return isinstance(made_by, Mapping) and made_by.get("type") == "custom"


def _column_names(dataset: Any) -> list[str]:
    names = None if _is_made_when_read(dataset) else getattr(dataset, "column_names", None)
    if names is None:
        with random_states_kept():
            row = next(iter(dataset), None)
        names = row if isinstance(row, Mapping) else ()
    return [*names]


def _check_inputs(dataset: Any, model: nn.Module) -> None:
    names = _column_names(dataset)
    inputs = input_names(model) - {*LABEL_COLUMNS, *SPAN_COLUMNS}
    if names and inputs.isdisjoint(names):
        raise ValueError(
            f"The rows have {', '.join(names)}, and {type(task_model(model)).__name__} reads none of them. Tokenise "
            "them first, as for a training; `hf-distill report` does it by itself."
        )


def _usual_collator(task: Task, processing_class: Any | None, *, has_labels: bool) -> Any:
    is_sound = isinstance(processing_class, SequenceFeatureExtractor)
    if not is_sound and not hasattr(getattr(processing_class, "tokenizer", processing_class), "get_vocab"):
        return default_data_collator  # images, which are stacked
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    if task is Task.CAUSAL_LM:
        return make_collator(TextArguments(), tokenizer, training=False)
    if task is Task.SEQ2SEQ_LM:
        return DataCollatorForSeq2Seq(tokenizer)
    if task is Task.MASKED_LM and not has_labels:
        return DataCollatorForLanguageModeling(tokenizer)
    if task in (Task.TOKEN_CLASSIFICATION, Task.MASKED_LM) and has_labels:
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def _from_the_start(collator: Any) -> Any:
    """The collator, or a copy that draws as it did in the beginning, where it or one inside has a generator."""
    own = getattr(collator, "__dict__", {})
    if own.get("generator") is not None:
        return _with(collator, "generator", None)
    for name in ("collator", "data_collator"):
        if (inner := own.get(name)) is not None and (fresh := _from_the_start(inner)) is not inner:
            return _with(collator, name, fresh)
    return collator


def _with(value: Any, name: str, part: Any) -> Any:
    changed = copy(value)
    setattr(changed, name, part)
    return changed
