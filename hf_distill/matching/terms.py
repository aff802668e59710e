"""Recorded features -> the matches' shares of the loss. Nothing here is read back to the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_distill.features import Feature
from hf_distill.layer_mapping import attend, ordered_argmin, random_pairs, transport
from hf_distill.losses.factored import scores_kl_rows, scores_mse_rows
from hf_distill.matching.batch_masks import BatchMasks, per_sequence
from hf_distill.matching.plan import (
    StudentKey,
    Unit,
    as_sequence,
    pooled,
    regrouped_heads,
    relation_heads,
    resampled,
    student_key,
)
from hf_distill.matching.resolve import Match, Pair, StackMatch
from hf_distill.models.capture import AttentionRecord
from hf_distill.models.positions import regroup_heads
from hf_distill.signals import Scores

# Losses that have a form without whole maps: one sum a sequence.
_FACTORED = {
    "attention_mse": scores_mse_rows,
    "attention_kl": scores_kl_rows,
    "minilm_values": scores_kl_rows,
    "minilmv2_relations": scores_kl_rows,
}
# A pair's student feature as the loss takes it: pooled, projected.
StudentFeatures = Mapping[StudentKey, Any]


@dataclass(frozen=True)
class MatchContext:
    """What a batch's matches are computed from.

    Attributes:
        masks: the batch's masks.
        student: the student's features, projected.
        teacher: the teacher's, as recorded.
        teacher_tokens: the teacher's own real positions in a stack, for a teacher that reads inputs of its own.
        gather: rows of this rank -> rows of all ranks, in order and with their gradient.
        rank: the place of this rank's rows among them.
        grid: whether positions are those of images.
        epoch: which epoch this is, for maps drawn anew in each.
    """

    masks: BatchMasks
    student: StudentFeatures
    teacher: Mapping[Feature, Any]
    teacher_tokens: Callable[[str | None], Tensor | None]
    gather: Callable[[Tensor], Tensor]
    rank: int
    grid: bool
    epoch: int


def match_share(match: Match, units: tuple[Unit, ...], counts: list[Tensor], context: MatchContext) -> Tensor:
    """This batch's share of a match before its weight: scalar float32.

    Args:
        match: the match.
        units: its unit of each stack.
        counts: how many items of each unit the accumulation window holds on all ranks.
        context: the features.
    """
    shares = []
    for stack, unit, count in zip(match.stacks, units, counts, strict=True):
        if match.is_dynamic:
            rows = _dynamic(match, stack.pairs, unit, context)
        else:
            rows = torch.stack([_pair_rows(match, pair, unit, context) for pair in stack.pairs]).sum(0)
        if match.term.reduction == "reference" and match.spec.reference.pairs == "mean":
            rows = rows / _pairs_summed(match, stack)
        shares.append(rows.sum() / count.clamp(min=1))
    return torch.stack(shares).sum()


def _pair_rows(match: Match, pair: Pair, unit: Unit, context: MatchContext, teacher: Tensor | None = None) -> Tensor:
    """(sequences,) float32: a pair's values summed over each sequence's items, or averaged if the unit says so."""
    student = context.student[student_key(pair, unit)]
    kind = match.spec.feature
    if kind in ("attention", "relation"):
        assert pair.teacher is not None
        teacher_record = context.teacher[pair.teacher.source].to(student.query.device)
        return _score_rows(match, pair, unit, context, student, teacher_record)
    if kind in ("batch", "domain"):
        return _batch_rows(match, pair, unit, context, student)
    if teacher is None:
        teacher = _teacher_feature(match, pair, unit, context, student)
    options = dict(match.term.options)
    if student.dim() == 2:
        values = match.spec.function(student, teacher, **options)
        return torch.where(context.masks.sequences(unit, len(values)), values, 0.0)
    tokens = _tokens(unit, context, student.shape[1])
    if kind == "tokens":
        values = match.spec.function(student, teacher, tokens=tokens, **options)
    else:
        values = match.spec.function(student, teacher, **options)
    return _averaged(torch.where(tokens, values, 0.0).sum(-1), unit, tokens)


def _pairs_summed(match: Match, stack: StackMatch) -> int:
    """How many pairs a term over a stack adds up: of those that it may choose from, a map that changes takes some."""
    students = len({pair.student.layer for pair in stack.pairs})
    candidates = len(stack.pairs) // students
    # A flow's masses add up to 1: it is a mean already.
    return {"random": students, "attention": students, "argmin": candidates, "emd": 1}.get(
        match.term.map.strategy, len(stack.pairs)
    )


def _averaged(sums: Tensor, unit: Unit, tokens: Tensor, *, item: str | None = None, causal: bool = False) -> Tensor:
    if not unit.per_sequence:
        return sums
    return sums / per_sequence(unit, tokens, item=item, causal=causal).clamp(min=1)


def _tokens(unit: Unit, context: MatchContext, length: int) -> Tensor:
    tokens = context.masks.tokens(unit, length)
    if tokens is None or tokens.shape[1] != length:
        raise ValueError(
            f"The student's features have {length} positions, the batch "
            f"{'none that are known' if tokens is None else tokens.shape[1]}: the batch is of another kind than the "
            "first. Give all batches the same columns."
        )
    return tokens


def _teacher_feature(match: Match, pair: Pair, unit: Unit, context: MatchContext, student: Tensor) -> Tensor:
    assert pair.teacher is not None
    recorded = context.teacher[pair.teacher.source].to(student.device)
    if pair.teacher.pooling is not None:
        if unit.mask == "tokens" or recorded.dim() == 2:
            return pooled(recorded, context.teacher_tokens(pair.teacher.stack), pair.teacher)
        return pooled(recorded, context.masks.pooled(unit, as_sequence(recorded).shape[1]), pair.teacher)
    features = pooled(recorded, None, pair.teacher)
    if student.dim() < 3 or features.shape[1] == student.shape[1]:
        return features
    if match.term.length != "interpolate":
        raise ValueError(
            f"Match {match.term.name!r}: in this batch {pair.student} has {student.shape[1]} positions, the teacher's "
            f"{pair.teacher} {features.shape[1]}; in the first rows they had as many. Give both models the same "
            "tokens, or compare pooled(mean)@hidden[*]."
        )
    frames, wanted = context.teacher_tokens(pair.teacher.stack), context.masks.real(pair.student.stack)
    return resampled(features, student.shape[1], grid=context.grid, frames=frames, wanted=wanted)


def _score_rows(
    match: Match, pair: Pair, unit: Unit, context: MatchContext, student: AttentionRecord, teacher: AttentionRecord
) -> Tensor:
    own, other = _scores(match, pair.student.kind, student, teacher)
    if pair.sees_all:
        own, other = replace(own, allowed=None), replace(other, allowed=None)
    tokens = _tokens(unit, context, own.left.shape[2])
    # A mask chooses the rows that count; each is a distribution over all real keys. Of pairs it chooses both ends.
    everything = replace(unit, mask="tokens")
    keys = tokens if match.spec.item == "pair" else _tokens(everything, context, own.left.shape[2])
    factored = _FACTORED.get(match.spec.name)
    if factored is not None:
        sums = factored(own, other, queries=tokens, keys=keys)
    else:
        values = match.spec.function(own, other, keys=keys)
        items = tokens
        if match.spec.item == "pair":
            items = tokens[:, :, None] & tokens[:, None, :]
            items = items.tril() if own.causal else items
        sums = torch.where(items, values, 0.0).flatten(1).sum(-1)
    return _averaged(sums, unit, tokens, item=match.spec.item, causal=own.causal)


def _scores(match: Match, kind: str, student: AttentionRecord, teacher: AttentionRecord) -> tuple[Scores, Scores]:
    term = match.term
    if match.spec.feature == "relation":
        regrouped = relation_heads(term, student, teacher)
        return _relation(getattr(student, kind), regrouped), _relation(getattr(teacher, kind), regrouped)
    own, other = student.scores(), teacher.scores()
    if term.heads == "mean" and own.heads != other.heads:
        return _head_mean(own), _head_mean(other)
    if term.heads == "relation":
        heads = regrouped_heads(term, student, teacher)
        return _regrouped_scores(own, heads), _regrouped_scores(other, heads)
    return own, other


def _relation(vectors: Tensor, heads: int | None) -> Scores:
    vectors = vectors if heads is None else regroup_heads(vectors, heads)
    return Scores(vectors, vectors, vectors.shape[-1] ** -0.5)


def _head_mean(scores: Scores) -> Scores:
    """The mean of all heads' scores: the product of all heads' vectors side by side."""
    right = scores.right.expand(-1, scores.heads, -1, -1)
    bias = scores.bias
    return replace(
        scores,
        left=regroup_heads(scores.left, 1),
        right=regroup_heads(right, 1),
        scale=scores.scale / scores.heads,
        bias=None if bias is None else bias.mean(1, keepdim=True),
        allowed=None,
        sinks=None,
    )


def _regrouped_scores(scores: Scores, heads: int) -> Scores:
    left = regroup_heads(scores.left, heads)
    right = regroup_heads(scores.right.expand(-1, scores.heads, -1, -1), heads)
    return Scores(left, right, left.shape[-1] ** -0.5, causal=scores.causal)


def _batch_rows(match: Match, pair: Pair, unit: Unit, context: MatchContext, student: Tensor) -> Tensor:
    """(rows of this rank,): the values of a loss between rows, seen over all ranks."""
    gather, own_rows = context.gather, len(student)
    valid = context.masks.sequences(unit, own_rows)
    arguments = [gather(student)]
    options: dict[str, Any] = dict(match.term.options)
    if match.spec.feature == "domain":
        assert match.term.domain is not None
        options["target_rows"] = gather(context.masks.domain(match.term.domain, own_rows))
    else:
        arguments.append(gather(_teacher_feature(match, pair, unit, context, student)))
    all_valid = gather(valid)
    values = match.spec.function(*arguments, valid=all_valid, **options)
    values = torch.where(all_valid, values, 0.0)
    return values[context.rank * own_rows : (context.rank + 1) * own_rows]


def _dynamic(match: Match, pairs: tuple[Pair, ...], unit: Unit, context: MatchContext) -> Tensor:
    """(sequences,): the rows of a match whose map changes."""
    term, strategy = match.term, match.term.map.strategy
    by_student: dict[int | None, list[Pair]] = {}
    for pair in pairs:
        by_student.setdefault(pair.student.layer, []).append(pair)
    if strategy == "random":
        layers = [(pair.student.layer or 0, pair.teacher.layer or 0) for pair in pairs if pair.teacher is not None]
        students, candidates = (list(dict.fromkeys(side)) for side in zip(*layers, strict=True))
        chosen = random_pairs(students, candidates, epoch=context.epoch, seed=term.map.seed)
        drawn = [pair for pair, both in zip(pairs, layers, strict=True) if both in chosen]
        return torch.stack([_pair_rows(match, pair, unit, context) for pair in drawn]).sum(0)
    if strategy == "attention":
        return _attended(match, list(by_student.values()), unit, context)
    rows = torch.stack(
        [
            torch.stack([_pair_rows(match, pair, unit, context) for pair in students])
            for students in by_student.values()
        ]
    )  # (student layers, teacher layers, sequences)
    costs = rows.detach().sum(-1)  # whatever the unit: neither choice depends on their scale
    weights = ordered_argmin(costs) if strategy == "argmin" else transport(costs)
    weights = weights[..., None]
    return torch.where(weights > 0, rows * weights, 0.0).sum((0, 1))


def _attended(match: Match, by_student: list[list[Pair]], unit: Unit, context: MatchContext) -> Tensor:
    """Each student layer against its own mixture of the teacher's layers."""
    firsts = [pairs[0] for pairs in by_student]
    students = torch.stack([context.student[student_key(pair, unit)] for pair in firsts])
    teachers = torch.stack([_teacher_feature(match, pair, unit, context, students[0]) for pair in by_student[0]])
    shape = students.shape[:-1]
    mixed = attend(students.flatten(1, -2), teachers.to(students.dtype).flatten(1, -2))
    mixed = mixed.reshape(*shape, mixed.shape[-1])
    rows = []
    for pair, own, other in zip(firsts, students, mixed, strict=True):
        values = _pair_rows(match, pair, unit, context, other)
        # The student chooses the mixture too, and losses give the teacher's side no gradient: these are symmetric.
        mirrored = match.spec.function(other, own.detach(), **match.term.options)
        rows.append(values + torch.where(context.masks.sequences(unit, len(values)), mirrored - mirrored.detach(), 0))
    return torch.stack(rows).sum(0)
