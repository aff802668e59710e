"""The plan of a training's matches, from its first rows: what cannot be compared is refused before the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.batches import Batch
from hf_distill.config import MatchTerm
from hf_distill.features import MODULE, Feature
from hf_distill.matching.batch_masks import BatchMasks
from hf_distill.matching.masks import real_positions
from hf_distill.matching.plan import Plan, Recorded, Unit, as_sequence, make_plan
from hf_distill.matching.resolve import Match, resolve
from hf_distill.models.capture import Capture
from hf_distill.teachers import RecordingTeacher, in_eval_mode


def plan_layers(
    terms: tuple[MatchTerm, ...],
    student: nn.Module,
    teacher: RecordingTeacher | None,
    batch: Batch,
    student_arguments: Mapping[str, Any],
    *,
    special_tokens: Tensor | None = None,
    other_tokens: bool = False,
) -> Plan:
    """The plan of a training's matches, from one small batch through both models.

    Args:
        terms: the matches.
        student: the student.
        teacher: the teacher, or None.
        batch: a batch, such as the first row.
        student_arguments: what the student's forward takes of it.
        special_tokens: as in `LayerTerms`.
        other_tokens: whether the teacher is known to cut texts into other tokens.

    Raises:
        ValueError: a match that cannot work, with its name, the reason and the remedy.
    """
    model = None if teacher is None else teacher.model
    matches = [resolve(term, student, model) for term in terms]
    teacher_sources = tuple(dict.fromkeys(source for match in matches for source in match.teacher_sources))
    teacher_recorded: Mapping[Feature, Any] = {}
    if teacher is not None and teacher_sources:
        teacher.prepare_recording(teacher_sources)
        try:
            teacher_recorded = teacher(batch.teacher, record=True).features
        finally:
            teacher.prepare_recording(())
    capture = Capture(student, tuple(dict.fromkeys(s for match in matches for s in match.student_sources)))
    try:
        with in_eval_mode(student), torch.no_grad(), capture.recording():
            outputs = student(**student_arguments, **capture.forward_arguments)
            student_recorded = capture.collect(outputs)
    finally:
        capture.close()
    inputs = batch.student
    for match in matches:
        if model is not None and (other_tokens or _cut_apart(match, student, inputs, model, batch.teacher)):
            _check_pooled(match)
    plan = make_plan(matches, student, student_recorded, teacher_recorded, inputs)
    masks = BatchMasks(student, inputs, batch.items, batch.extras, special_tokens)
    for match, units in zip(plan.matches, plan.units, strict=True):
        _try_masks(match, units, masks, student_recorded, teacher_recorded)
    return plan


def _cut_apart(
    match: Match, student: nn.Module, inputs: Mapping[str, Any], teacher: nn.Module, teacher_inputs: Mapping[str, Any]
) -> bool:
    """Whether the teacher reads texts of its own whose tokens are not as many as the student's."""
    own, other = inputs.get("input_ids"), teacher_inputs.get("input_ids")
    if own is None or other is None or own is other:
        return False
    for pair in (pair for stack in match.stacks for pair in stack.pairs if pair.teacher is not None):
        assert pair.teacher is not None
        ours = real_positions(student, inputs, pair.student.stack)
        theirs = real_positions(teacher, teacher_inputs, pair.teacher.stack)
        if ours is not None and theirs is not None and not torch.equal(ours, theirs):
            return True
    return False


def _check_pooled(match: Match) -> None:
    """Refuses a match that needs both models to read the same tokens."""
    term = match.term
    if not term.asks_teacher or term.student.kind == MODULE:
        return
    if term.student.pooling is None:
        raise ValueError(
            f"Match {term.name!r} compares {term.student} token by token, but the teacher reads other tokens than the "
            "student (its teacher_* columns, or its tokenizer). Compare one vector a text, as in "
            "pooled(mean)@hidden[*], or give both models the same tokens."
        )
    if term.mask not in (None, "tokens"):
        raise ValueError(
            f"Match {term.name!r}: mask: {term.mask!r} chooses among the student's tokens, and the teacher reads "
            "others (its teacher_* columns, or its tokenizer). Pool all of them: leave out mask."
        )


def _try_masks(
    match: Match, units: tuple[Unit, ...], masks: BatchMasks, student_recorded: Recorded, teacher_recorded: Recorded
) -> None:
    """Makes the masks of a match once, so that what cannot be masked as asked is refused before the first step."""
    try:
        for stack, unit in zip(match.stacks, units, strict=True):
            for pair in stack.pairs:
                own = _length(student_recorded[pair.student.source])
                masks.tokens(unit, own)
                other = own if pair.teacher is None else _length(teacher_recorded[pair.teacher.source])
                if pair.student.pooling is not None and unit.mask != "tokens" and own != other:
                    raise ValueError(
                        f"mask: {unit.mask!r} chooses among the student's {own} positions, and the teacher's "
                        f"{pair.teacher} has {other}. Pool all of them: leave out mask."
                    )
            if match.term.domain is not None:
                masks.domain(match.term.domain, len(masks.sequences(unit)))
    except ValueError as error:
        raise ValueError(f"Match {match.term.name!r}: {error}") from error


def _length(record: Any) -> int | None:
    """How many positions a recorded feature has; None where it is one vector a sequence."""
    if not isinstance(record, Tensor):
        return record.query.shape[2]
    return as_sequence(record).shape[1] if record.dim() > 2 else None
