"""One batch, taken apart: what the student reads, what the teacher reads, and which items count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.collator import TEACHER_POSITIONS, TEACHER_PREFIX
from hf_distill.items import IGNORE_INDEX, LABEL_MASK, ROW_LENGTHS, ROW_MASK, Items, find_items
from hf_distill.pairing import ModelPair
from hf_distill.signals import Task

# What the teacher says about a batch, where it had to be asked before the step: a TeacherOutput among the inputs.
TEACHER_OUTPUT = f"{TEACHER_PREFIX}output"
# True in a batch whose answers the student wrote: its labels are what the teacher scores, and no target of the task.
ON_POLICY = "on_policy"
TARGETS = ("labels", "shift_labels", "start_positions", "end_positions")


@dataclass(frozen=True)
class Batch:
    """A batch as both models take it.

    Attributes:
        student: the student's inputs and labels, nothing of the teacher's or of ours.
        teacher: the teacher's inputs: its own columns where there are any, else the student's and what only it takes.
        items: what enters the terms.
        all_labelled: whether, as the host knows, no row is left out of the task loss.
        extras: the columns that neither model reads: masks and domains of matches, weights and groups of items.
        is_on_policy: whether the student wrote what the labels say.
        teacher_positions: (batch, length) int64 the teacher's position for each of the student's, below 0 for none;
            None where both read the same tokens.
    """

    student: dict[str, Any]
    teacher: dict[str, Any]
    items: Items
    all_labelled: bool
    extras: dict[str, Any] = field(default_factory=dict)
    is_on_policy: bool = False
    teacher_positions: Tensor | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """Those of the student's inputs that are targets."""
        return {name: value for name, value in self.student.items() if name in TARGETS}

    @property
    def has_targets(self) -> bool:
        """Whether the task loss may be formed: the batch has labels, and they are not the student's own text."""
        return bool(self.labels) and not self.is_on_policy

    @property
    def unlabelled_student(self) -> dict[str, Any]:
        """The student's inputs without the targets."""
        return {name: value for name, value in self.student.items() if name not in TARGETS}


def student_inputs(
    inputs: Mapping[str, Any], pair: ModelPair, extra_columns: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Those of a batch's entries that the student's forward gets: nothing of the teacher's or of ours."""
    no_targets = TARGETS if pair.task is Task.EMBEDDING else ()  # a model without a head may have rows with scores
    apart = (*pair.teacher_only_inputs, *extra_columns, *no_targets, LABEL_MASK, ROW_MASK, ROW_LENGTHS, ON_POLICY)
    return {name: value for name, value in inputs.items() if not name.startswith(TEACHER_PREFIX) and name not in apart}


def split_batch(
    inputs: Mapping[str, Any],
    pair: ModelPair,
    *,
    frames: Callable[[dict[str, Any]], Tensor],
    special_tokens: Tensor | None = None,
    extra_columns: frozenset[str] = frozenset(),
) -> Batch:
    """Takes a collated batch apart.

    Args:
        inputs: the batch, on the device; rows where its `ROW_MASK` is False are left out of every term.
        pair: how the student and the teacher fit together.
        frames: makes the mask of a CTC model's output frames of its inputs; called for CTC only.
        special_tokens: (any,) ids that no label-free position may have.
        extra_columns: columns that neither model reads.

    Raises:
        ValueError: the teacher has other tokens, and the batch no `teacher_*` columns for it to read, or none that
            says which positions belong together.
    """
    extras = {name: inputs[name] for name in sorted(extra_columns) if name in inputs}
    inputs = {name: value for name, value in inputs.items() if name not in extras and name != ROW_LENGTHS}
    own = {name: value for name, value in inputs.items() if not name.startswith(TEACHER_PREFIX)}
    # A column like teacher_id, kept by remove_unused_columns=False, is no input.
    teacher_columns = {
        name: inputs[TEACHER_PREFIX + name] for name in sorted(pair.teacher_inputs) if TEACHER_PREFIX + name in inputs
    }
    positions = None if pair.shared_tokens is None else _positions(inputs)
    if pair.needs_teacher_inputs and not teacher_columns:
        raise ValueError(
            "The teacher's tokenizer gives its ids to other tokens than the student's, and the batch has no columns "
            f"for the teacher (it has {', '.join(own)}). Tokenize the text with the teacher's tokenizer too, into "
            "teacher_input_ids, teacher_attention_mask, ..., and pass teacher_processing_class to pad them."
        )
    is_on_policy = own.pop(ON_POLICY, False) is True  # a data set may have a column of that name
    rows = own.pop(ROW_MASK, None)
    if rows is not None:
        own = {**_without_labels(own, rows), LABEL_MASK: own.get(LABEL_MASK, rows) & rows}
    mask = {name: own.pop(name) for name in (LABEL_MASK,) if name in own}
    student = student_inputs(own, pair)
    items = find_items(
        pair.task,
        {**student, **mask},
        frames=frames(student) if pair.task is Task.CTC else None,
        special_tokens=special_tokens,
    )
    if pair.task is Task.QUESTION_ANSWERING:
        student = _ignored_spans(student)
    labels = {"labels": own["labels"]} if "labels" in own else {}
    return Batch(
        student=student,
        teacher={**teacher_columns, **labels} if teacher_columns else own,
        items=_paired(items if rows is None else items.of_rows(rows), positions),
        all_labelled=not mask,
        extras=extras,
        is_on_policy=is_on_policy,
        teacher_positions=positions,
    )


def _paired(items: Items, positions: Tensor | None) -> Items:
    """The items with those KD items alone that have a position of the teacher's."""
    return items if positions is None else replace(items, kd=items.kd & (positions >= 0))


def _positions(inputs: Mapping[str, Any]) -> Tensor:
    """(batch, length) the teacher's positions."""
    if TEACHER_POSITIONS not in inputs:
        raise ValueError(
            f"token_alignment='offsets' reads {TEACHER_POSITIONS}, which the batch does not have (it has "
            f"{', '.join(inputs)}). Make the columns of both data sets with "
            "hf_distill.token_alignment.tokenize_for_teacher, and keep those that begin with teacher_ in what follows."
        )
    return inputs[TEACHER_POSITIONS]


def _without_labels(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The inputs with integer labels of the other rows set to -100, so that a model's own mean leaves them out."""
    filled = dict(inputs)
    for name in TARGETS:
        value = inputs.get(name)
        if isinstance(value, Tensor) and not value.is_floating_point():
            filled[name] = torch.where(rows.view(-1, *[1] * (value.dim() - 1)), value, IGNORE_INDEX)
    return filled


def _ignored_spans(inputs: dict[str, Any]) -> dict[str, Any]:
    # Transformers' heads clamp positions into [0, length] and ignore `length`: a negative one would become 0.
    length = inputs["input_ids"].shape[-1] if "input_ids" in inputs else inputs["inputs_embeds"].shape[1]
    return {
        name: torch.where(value < 0, length, value) if name in ("start_positions", "end_positions") else value
        for name, value in inputs.items()
    }
