"""Batches with a teacher's own inputs and with rows that have no label, on top of any collator."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from hf_distill.items import IGNORE_INDEX, LABEL_MASK
from hf_distill.row_weights import RowWeights
from hf_distill.signals import Task

TEACHER_PREFIX = "teacher_"
# (batch, length) int64: for each of the student's tokens the teacher's position that has read the same text, or -1.
TEACHER_POSITIONS = f"{TEACHER_PREFIX}positions"
LABEL_COLUMNS = ("label", "labels", "label_ids")
SPAN_COLUMNS = ("start_positions", "end_positions")


def _gaps(label: Any) -> np.ndarray:
    """Which entries of a label say that there is none."""
    try:
        values = np.asarray(np.nan if label is None else label, dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"The label {label!r} is neither a number nor a list of numbers. Map names to the numbers of the "
            "student's config.label2id, e.g. with Dataset.class_encode_column or Dataset.map."
        ) from error
    return np.isnan(values) | (values == IGNORE_INDEX)


def is_missing(label: Any) -> bool:
    """Whether a label is None, NaN, -100, empty, or a sequence of nothing else."""
    return bool(_gaps(label).all())


def is_incomplete(label: Any) -> bool:
    """Whether a label is missing or, being a sequence, partly so."""
    gaps = _gaps(label)
    return gaps.size == 0 or bool(gaps.any())


class DistillationCollator:
    """Calls a collator on the student's columns, pads the `teacher_*` columns apart, and fills missing labels.

    A label is missing where its column is absent, None, NaN or -100; many labels are, where one of them is. It is
    filled so that the collator can make a tensor of it; `label_mask` (batch,) then tells such rows, and is in a batch
    only if it has one. A batch in which no row has a label column is passed on as it is. `DistillationTrainer` puts
    this around its collator by itself.

    The columns that items are weighed by are taken off the rows before the collator sees them; the batch then holds
    the weights as `item_weight`, and `item_group` where they are to follow the loss of each group.

    Args:
        collator: what makes a batch of the student's columns. Attributes not found here are looked up in it.
        task: the task of the student's head. Language models' labels are the collator's own affair and not touched.
        filler: what stands for a missing label: -100 for a class, NaN for a number, a list of NaN for many labels.
        teacher_processing_class: the teacher's tokenizer or feature extractor, whose `pad` pads the `teacher_*`
            columns; without it they must have equal shapes.
        always_mask: whether batches without a missing label hold `label_mask` too, since something will join them
            with others, key by key.
        row_weights: what makes the items' weights; None weighs all alike.
    """

    def __init__(
        self,
        collator: Any,
        *,
        task: Task,
        filler: Any = IGNORE_INDEX,
        teacher_processing_class: Any | None = None,
        always_mask: bool = False,
        row_weights: RowWeights | None = None,
    ) -> None:
        self.collator = collator
        self.task = task
        self.filler = filler
        self.teacher_processing_class = teacher_processing_class
        self.always_mask = always_mask
        self.row_weights = row_weights

    def __getattr__(self, name: str) -> Any:
        # `collator` and dunder names must fail here, or unpickling in a data-loader worker would recurse for ever.
        if name == "collator" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Any]) -> Any:
        """The batch, with the student's keys first."""
        if not isinstance(features[0], Mapping):
            return self.collator(features)
        weighed = features
        if self.row_weights is not None:
            features = self.row_weights.without_columns(features)
        students = [{k: v for k, v in row.items() if not k.startswith(TEACHER_PREFIX)} for row in features]
        teachers = [
            {k.removeprefix(TEACHER_PREFIX): v for k, v in row.items() if k.startswith(TEACHER_PREFIX)}
            for row in features
        ]
        students, labelled = self._fill_labels(students)
        batch = self.collator(students)
        if isinstance(batch, MutableMapping) and "labels" in batch and batch["labels"] is None:
            del batch["labels"]  # of DataCollatorForSeq2Seq, where rows have none
        if labelled is not None and (self.always_mask or not all(labelled)):
            batch[LABEL_MASK] = torch.tensor(labelled)
        if self.row_weights is not None:
            batch.update(self.row_weights(weighed, batch))
        positions = [row.pop("positions") for row in teachers if "positions" in row]
        if teachers[0]:
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in self._pad_teachers(teachers).items()})
        if positions:
            batch[TEACHER_POSITIONS] = _pad_positions(positions, batch, teachers)
        return batch

    def _pad_teachers(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        if self.teacher_processing_class is not None:
            return self.teacher_processing_class.pad(rows, return_tensors="pt")
        try:
            return default_data_collator(rows)
        except (ValueError, RuntimeError) as error:  # lists that are ragged, or tensors
            raise ValueError(
                f"The columns {', '.join(TEACHER_PREFIX + name for name in rows[0])} have rows of different lengths. "
                "Pass teacher_processing_class= to DistillationTrainer: its `pad` makes them equal."
            ) from error

    def _fill_labels(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[bool] | None]:
        """The rows with labels to make tensors of, and which had one; None where the labels say so themselves."""
        names = SPAN_COLUMNS if self.task is Task.QUESTION_ANSWERING else LABEL_COLUMNS
        columns = [name for name in names if any(name in row for row in rows)]
        if not columns or (self.task.is_language_model and self.task is not Task.CTC):
            return rows, None
        if self.task is Task.TOKEN_CLASSIFICATION:  # its labels say by themselves which tokens have one
            return [self._with_token_labels(row, columns[0], rows) for row in rows], None
        gap_in = is_incomplete if self.task is Task.SEQUENCE_CLASSIFICATION else is_missing
        missing = [any(gap_in(row.get(name)) for name in columns) for row in rows]
        present = [row[name] for row in rows for name in columns if row.get(name) is not None]
        filler = self.filler
        if present and self.task is Task.CTC:  # as long as its neighbours, for collators that stack
            filler = [IGNORE_INDEX] * max(1, *map(len, present))
        filler = _like(present[0], filler) if present else filler
        filled = [
            {**row, **{name: filler if gap else self._class_index(row[name]) for name in columns}}
            for row, gap in zip(rows, missing, strict=True)
        ]
        return filled, [not gap for gap in missing]

    def _with_token_labels(self, row: dict[str, Any], column: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if row.get(column) is not None:
            return row
        like = next((other[column] for other in rows if other.get(column) is not None), None)
        return {**row, column: _like(like, [IGNORE_INDEX] * len(row["input_ids"]))}

    def _class_index(self, label: Any) -> Any:
        # A column of integers with gaps comes out of pandas, CSV files and torch formatting as one of floats.
        is_scalar_float = np.ndim(label) == 0 and np.asarray(label).dtype.kind == "f"
        if not isinstance(self.filler, int) or not is_scalar_float or not float(label).is_integer():
            return label
        return label.long() if isinstance(label, torch.Tensor) else int(label)


def _pad_positions(positions: list[Any], batch: Mapping[str, Any], teachers: list[dict[str, Any]]) -> torch.Tensor:
    """(batch, length) the teacher's positions beside the padded tokens of both models."""
    tokens = batch["input_ids"]
    if len(tokens) != len(positions):
        raise ValueError(
            f"The collator makes {len(tokens)} rows of {len(positions)}, whose {TEACHER_POSITIONS} it does not join. "
            "With token_alignment='offsets' turn packing and padding_free off."
        )
    padded = torch.full(tokens.shape, -1, dtype=torch.int64)
    for number, (row, teacher) in enumerate(zip(positions, teachers, strict=True)):
        values, teacher_length = torch.as_tensor(row, dtype=torch.int64), len(teacher.get("input_ids", ()))
        if len(values) > tokens.shape[-1] or (values >= teacher_length).any():
            raise ValueError(
                f"{TEACHER_POSITIONS} has {len(values)} places up to {int(values.max())}, beside {tokens.shape[-1]} "
                f"tokens of the student and {teacher_length} of the teacher. Cut texts by tokenize_for_teacher alone "
                "(max_length, teacher_max_length): its columns belong together."
            )
        start, teacher_start = (
            _padding_before(batch, prefix, number, length)
            for prefix, length in (("", len(values)), (TEACHER_PREFIX, teacher_length))
        )
        padded[number, start : start + len(values)] = torch.where(values < 0, values, values + teacher_start)
    return padded


def _padding_before(batch: Mapping[str, Any], prefix: str, number: int, length: int) -> int:
    """How many places of padding precede a row of that many tokens."""
    mask = batch.get(f"{prefix}attention_mask")
    width = batch[f"{prefix}input_ids"].shape[-1]
    return width - length if mask is not None and width > length and not mask[number, : width - length].any() else 0


def _like(label: Any, filler: Any) -> Any:
    """The filler as the kind of array that `label` is: collators stack tensors with tensors only."""
    if isinstance(label, torch.Tensor):
        return torch.tensor(filler)
    return np.asarray(filler) if isinstance(label, np.ndarray) else filler
