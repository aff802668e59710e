"""What a training's matches need: checked on one small batch before the first step, then trusted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.config import MatchTerm, Projection
from hf_distill.features import Feature
from hf_distill.matching.masks import BATCH_MASK, real_positions
from hf_distill.matching.resolve import Match, Pair, StackMatch, projection_name
from hf_distill.models.capture import AttentionRecord
from hf_distill.models.heads import task_model
from hf_distill.models.positions import pool, regroup_heads, resample_positions, stretch_frames

Recorded = Mapping[Feature, Any]  # source -> hidden states (batch, length, width) or AttentionRecord


@dataclass(frozen=True)
class Unit:
    """What a match's sum over one stack is divided by.

    Attributes:
        kind: `tokens`, `pairs` (of tokens), `causal_pairs` or `sequences`.
        mask: which tokens, as in `MatchTerm.mask`.
        stack: the student's stack.
    """

    kind: str
    mask: str
    stack: str | None

    @property
    def per_sequence(self) -> bool:
        """Whether a sequence's values are averaged before the sequences are."""
        return self.kind == "sequences"


# A student's feature, its projection, and the mask by which it is pooled: matches that share all three share a tensor.
StudentKey = tuple[Feature, str | None, str | None]


def student_key(pair: Pair, unit: Unit) -> StudentKey:
    """Where the student's side of a pair is found among the features of a forward."""
    return (pair.student, pair.projection, unit.mask if pair.student.pooling is not None else None)


@dataclass(frozen=True)
class ProjectionShape:
    """One projection to be made: from a student's width to a teacher's."""

    student_width: int
    teacher_width: int
    settings: Projection


@dataclass(frozen=True)
class Plan:
    """The matches of one student and one teacher, with their units and projections.

    Attributes:
        matches: with projections named where their widths ask for one.
        units: for every match one unit a stack.
        projections: by name.
    """

    matches: tuple[Match, ...]
    units: tuple[tuple[Unit, ...], ...]
    projections: Mapping[str, ProjectionShape]

    @property
    def distinct_units(self) -> tuple[Unit, ...]:
        """Each unit once, in the order in which they are counted."""
        return tuple(dict.fromkeys(unit for units in self.units for unit in units))

    @property
    def student_sources(self) -> tuple[Feature, ...]:
        """What is recorded in the student."""
        return tuple(dict.fromkeys(source for match in self.matches for source in match.student_sources))

    @property
    def teacher_sources(self) -> tuple[Feature, ...]:
        """What is recorded in the teacher."""
        return tuple(dict.fromkeys(source for match in self.matches for source in match.teacher_sources))


# The plan of a training without matches.
NOTHING = Plan((), (), {})


def batch_columns(terms: tuple[MatchTerm, ...]) -> frozenset[str]:
    """The batch's columns that matches name; a model may read them too."""
    masks = {term.mask.removeprefix(BATCH_MASK) for term in terms if term.mask and term.mask.startswith(BATCH_MASK)}
    return frozenset(masks | {term.domain for term in terms if term.domain})


def as_sequence(features: Tensor) -> Tensor:
    """(batch, length, width) of hidden states, those of convolutions, (batch, channels, height, width), included."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def is_image(model: nn.Module) -> bool:
    """Whether a model's positions are those of a grid."""
    return getattr(task_model(model), "main_input_name", "") == "pixel_values"


def resampled(
    teacher: Tensor, length: int, *, grid: bool, frames: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    """(batch, length, width): the teacher's positions interpolated to the student's number.

    Args:
        teacher: (batch, other length, width).
        length: of the student's.
        grid: whether positions are those of images.
        frames: (batch, other length) bool, the teacher's real positions of sound; None where all are.
        wanted: (batch, length) bool, the student's.
    """
    if teacher.shape[1] == length:
        return teacher
    if not grid:
        if frames is None or wanted is None:
            return resample_positions(teacher, length, grid=False)
        return stretch_frames(teacher, frames, wanted)
    prefix, others = (number - isqrt(number) ** 2 for number in (length, teacher.shape[1]))
    if prefix != others:
        raise ValueError(
            f"{length} positions of the student are a square of patches and {prefix} special tokens, the teacher's "
            f"{teacher.shape[1]} a square and {others}. Pool them, or choose models with as many special tokens."
        )
    return resample_positions(teacher, length, prefix=prefix, grid=True)


def make_plan(
    matches: list[Match],
    student: nn.Module,
    student_recorded: Recorded,
    teacher_recorded: Recorded,
    inputs: Mapping[str, Any],
) -> Plan:
    """The plan of a training, checked on what one small batch left behind in both models.

    Args:
        matches: the matches with their layers.
        student: the student.
        student_recorded: what was recorded in it.
        teacher_recorded: what was recorded in the teacher.
        inputs: what the student read, labels included.

    Raises:
        ValueError: features that cannot be compared, with what differs and the ways out.
    """
    checked, units = [], []
    projections: dict[str, ProjectionShape] = {}
    for match in matches:
        try:
            stacks = tuple(
                StackMatch(
                    stack.stack,
                    tuple(
                        _checked(match, pair, student, student_recorded, teacher_recorded, inputs, projections)
                        for pair in stack.pairs
                    ),
                )
                for stack in match.stacks
            )
            units.append(tuple(_unit(match, stack, student, student_recorded, inputs) for stack in stacks))
        except ValueError as error:
            raise ValueError(f"Match {match.term.name!r}: {error}") from error
        checked.append(Match(match.term, match.spec, stacks))
    return Plan(tuple(checked), tuple(units), projections)


def _checked(
    match: Match,
    pair: Pair,
    student: nn.Module,
    student_recorded: Recorded,
    teacher_recorded: Recorded,
    inputs: Mapping[str, Any],
    projections: dict[str, ProjectionShape],
) -> Pair:
    """The pair with what its recorded features say of it; its projection is entered into `projections`."""
    shape = _check_pair(match, pair, student, student_recorded, teacher_recorded)
    if shape is not None:
        pair = replace(pair, projection=projection_name(match.term, pair, dynamic=match.is_dynamic))
        known = projections.setdefault(pair.projection or "", shape)
        if known != shape:
            raise ValueError(
                f"share: all asks one projection for widths {shape.student_width} -> {shape.teacher_width} and "
                f"{known.student_width} -> {known.teacher_width}. Use share: pair."
            )
    if match.spec.feature != "attention" or pair.teacher is None:
        return pair
    own, other = student_recorded[pair.student.source], teacher_recorded[pair.teacher.source]
    mask = inputs.get("attention_mask")
    if "position_ids" in inputs or (isinstance(mask, Tensor) and mask.dim() > 2):
        return pair  # rows packed of several texts, which the first ones need not be
    records = own, other.to(own.query.device)
    return replace(pair, sees_all=_sees_all(records, real_positions(student, inputs, pair.student.stack)))


def _check_pair(
    match: Match, pair: Pair, student: nn.Module, student_recorded: Recorded, teacher_recorded: Recorded
) -> ProjectionShape | None:
    """Refuses a pair that cannot be compared; the shape of its projection, if it needs one."""
    own = student_recorded[pair.student.source]
    if pair.teacher is None:
        return None
    other = teacher_recorded[pair.teacher.source]
    if pair.student.is_attention:
        _check_attention(match, pair, own, other)
        return None
    own, other = as_sequence(own), as_sequence(other)
    if pair.student.pooling is None and own.dim() == other.dim() == 3 and own.shape[1] != other.shape[1]:
        if match.term.length != "interpolate":
            raise ValueError(
                f"{pair.student} has {own.shape[1]} positions, the teacher's {pair.teacher} {other.shape[1]}. Pool "
                f"them (pooled(mean)@{pair.student}), or, for images and sound, set length: interpolate. Texts must "
                "be cut into the same tokens."
            )
        resampled(other, own.shape[1], grid=is_image(student))
    settings, widths = match.term.projection, (own.shape[-1], other.shape[-1])
    if match.spec.feature != "hidden" and settings.when != "always":
        return None
    if widths[0] == widths[1] and settings.when == "mismatch":
        return None
    if settings.kind == "identity" and widths[0] != widths[1]:
        raise ValueError(
            f"{pair.student} is {widths[0]} wide, the teacher's {pair.teacher} {widths[1]}, and the identity maps no "
            "width to another. Use projection: {kind: linear}, or a loss that compares relations."
        )
    return ProjectionShape(*widths, settings)


def _check_attention(match: Match, pair: Pair, own: AttentionRecord, other: AttentionRecord) -> None:
    term = match.term
    names = (pair.student, pair.teacher)
    lengths = own.query.shape[2], other.query.shape[2]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"{names[0]} has {lengths[0]} positions, the teacher's {names[1]} {lengths[1]}, and maps of two sizes "
            "share no entries. Compare hidden states with length: interpolate, or pooled(mean)@hidden[*]."
        )
    if match.spec.feature == "relation":
        heads = relation_heads(term, own, other)
        if heads is not None:
            for record in (own, other):
                regroup_heads(getattr(record, pair.student.kind), heads)
            return
        counts = [getattr(record, pair.student.kind).shape[1] for record in (own, other)]
    else:
        scores = own.scores(), other.scores()
        if scores[0].causal != scores[1].causal:
            raise ValueError(
                f"{names[0]} and {names[1]} differ in whether a position sees those after it. Compare hidden states."
            )
        counts = [one.heads for one in scores]
        if term.heads == "mean" and match.spec.item != "pair":
            raise ValueError(
                f"heads: mean averages scores, but {term.loss} compares distributions, whose mean over heads is "
                "another thing. Use attention_mse, or heads: relation."
            )
        if term.heads == "mean" and any(one.softcap is not None for one in scores):
            raise ValueError("heads: mean cannot average soft-capped scores. Use heads: relation.")
        if term.heads == "relation":
            for record in (own, other):
                regroup_heads(record.query, regrouped_heads(term, own, other))
            return
    if counts[0] != counts[1] and term.heads == "strict":
        raise ValueError(
            f"{names[0]} has {counts[0]} heads, the teacher's {names[1]} {counts[1]}, and head by head they have no "
            "partners. Set heads: mean (scores averaged over the heads) or heads: relation (regrouped), or use the "
            "loss minilmv2_relations."
        )


def _sees_all(records: tuple[AttentionRecord, AttentionRecord], tokens: Tensor | None) -> bool:
    """Whether what the layers allow is what the tokens tell: no window, no block, no mask of the user's own."""
    for record in records:
        kinds = {*(getattr(record.module.config, "layer_types", None) or ())}
        # A window wider than these rows does not show in their masks.
        if record.options.get("sliding_window") is not None or not kinds <= {"full_attention"}:
            return False
        scores = record.scores()
        if scores.allowed is None:
            continue
        queries, keys = scores.left.shape[2], scores.right.shape[2]
        if tokens is None or (queries, keys) != (tokens.shape[1], tokens.shape[1]) or scores.allowed.shape[1] != 1:
            return False
        expected = tokens[:, None, None, :].expand(-1, 1, queries, -1)
        expected = expected.tril() if scores.causal else expected
        real = tokens[:, None, :, None]
        if not torch.equal((scores.allowed & real).expand_as(expected), expected & real):
            return False
    return True


def regrouped_heads(term: MatchTerm, own: AttentionRecord, other: AttentionRecord) -> int:
    """Into how many heads queries and keys are regrouped: those of the model with fewer, unless the options say."""
    heads = term.options.get("relation_heads")
    return min(own.query.shape[1], other.query.shape[1]) if heads is None else heads


def relation_heads(term: MatchTerm, own: AttentionRecord, other: AttentionRecord) -> int | None:
    """Into how many heads the vectors are regrouped; None to leave them in the heads they have."""
    if term.loss == "minilm_values" and term.heads != "relation":
        return None
    return regrouped_heads(term, own, other)


def _unit(match: Match, stack: StackMatch, student: nn.Module, recorded: Recorded, inputs: Mapping[str, Any]) -> Unit:
    term, spec = match.term, match.spec
    name = "tokens" if term.mask in (None, "pairs") else term.mask
    first = stack.pairs[0].student
    record = recorded[first.source]
    tokens = real_positions(student, inputs, stack.stack)
    length = record.query.shape[2] if first.is_attention else as_sequence(record).shape[1]
    pooled = first.pooling is not None or (not first.is_attention and record.dim() == 2)
    if tokens is not None and tokens.shape[1] != length and record_is_positional(record):
        raise ValueError(
            f"the inputs have {tokens.shape[1]} positions, {first} has {length}: which of them are padding cannot be "
            "told. Models that add or drop positions (prompt tuning, patch merging) need pooled features."
        )
    reference = spec.reference.items if term.reduction == "reference" else term.reduction
    kind = {"pair": "pairs", "sequence": "sequences"}.get(spec.item, "tokens")
    if kind == "pairs" and record.scores().causal:
        kind = "causal_pairs"
    if pooled or tokens is None or reference == "sample_mean":
        kind = "sequences"
    return Unit(kind, name, stack.stack)


def record_is_positional(record: Any) -> bool:
    """Whether a recorded feature has one vector a position, and not one a sequence."""
    return not isinstance(record, Tensor) or record.dim() > 2


def pooled(features: Tensor, tokens: Tensor | None, feature: Feature) -> Tensor:
    """The features as a match compares them: (batch, width) if it pools, else (batch, length, width)."""
    features = as_sequence(features)
    if feature.pooling is None or features.dim() == 2:
        return features
    return pool(features, tokens, feature.pooling)
