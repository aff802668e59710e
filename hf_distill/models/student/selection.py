"""Which features, heads and neurons a narrower student keeps: the first, the heaviest, or a rotation of them."""

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.models.student.axes import Axes, Block, Kind, Widths
from hf_distill.models.student.width import WidthCut, residual_gains

Init: TypeAlias = Literal["slice", "importance", "svd", "random"]
INITS: tuple[str, ...] = get_args(Init)


def select(model: PreTrainedModel, axes: Mapping[str, Axes], teacher: Widths, student: Widths, init: str) -> WidthCut:
    """The cut of a teacher's weights to the student's widths.

    The residual stream keeps one selection through the whole model; each layer keeps inner neurons of its own and each
    attention whole heads of its own, with the query heads of one key head together.

    Args:
        model: the teacher.
        axes: what its tensors run over.
        teacher: its widths.
        student: the widths to cut to.
        init: `slice` keeps the first; `importance` those with the largest share of the squared weights that read and
            write them, every matrix counted as one; `svd` projects the residual stream on its strongest directions
            (the singular vectors of all matrices that read or write it, each scaled to norm one, stacked) and keeps
            heads and neurons by importance, for nonlinearities allow no mixture of them.
    """
    weights = _importance(model, axes, teacher.head_size) if init != "slice" else {}
    kept: dict[tuple[Kind, str], Tensor] = {}
    inside: dict[str, Tensor] = {}
    for kind, group in sorted({(block.kind, block.group) for block in _blocks(axes)}):
        if kind is Kind.INNER and student.inner != teacher.inner:
            kept[kind, group] = _top(weights.get((kind, group)), student.inner or 0)
        elif kind is Kind.HIDDEN and student.hidden != teacher.hidden and init != "svd":
            kept[kind, group] = _top(weights.get((kind, group)), student.hidden)
        elif kind is Kind.HEADS and (student.heads, student.head_size) != (teacher.heads, teacher.head_size):
            query, key = weights.get((kind, group)), weights.get((Kind.KEY_VALUE_HEADS, group))
            kept[Kind.HEADS, group], kept[Kind.KEY_VALUE_HEADS, group] = _heads(query, key, teacher, student)
            if student.head_size != teacher.head_size:
                within = None if query is None else query.view(-1, teacher.head_size).sum(0)
                inside[group] = _top(within, student.head_size)
    if init != "svd" or student.hidden == teacher.hidden:
        return WidthCut(axes, kept, inside)
    return WidthCut(
        axes, kept, inside, rotation=_directions(model, axes, student.hidden), gains=residual_gains(model, axes)
    )


def _blocks(axes: Mapping[str, Axes]) -> Iterator[Block]:
    return (block for tensor in axes.values() for blocks in tensor for block in blocks)


def _top(weights: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if weights is None else weights.topk(count).indices.sort().values


def _heads(query: Tensor | None, key: Tensor | None, teacher: Widths, student: Widths) -> tuple[Tensor, Tensor]:
    """The query heads and the key heads that stay."""
    shared = teacher.queries_per_key
    each = student.heads // student.key_value_heads
    if query is None:
        keys = torch.arange(student.key_value_heads)
        return (keys[:, None] * shared + torch.arange(each)).flatten(), keys
    by_head = query.view(teacher.heads, -1).sum(-1).view(teacher.key_value_heads, shared)
    by_key = by_head.sum(-1) + (0 if key is None else key.view(teacher.key_value_heads, -1).sum(-1))
    keys = _top(by_key, student.key_value_heads)
    queries = by_head[keys].topk(each, dim=-1).indices.sort(-1).values
    return (keys[:, None] * shared + queries).flatten(), keys


def _importance(model: PreTrainedModel, axes: Mapping[str, Axes], head_size: int) -> dict[tuple[Kind, str], Tensor]:
    """(kind, group) -> the share of the squared weights at every place along a block, summed over the matrices."""
    shares: dict[tuple[Kind, str], Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        for axis, blocks in enumerate(axes.get(name, ())):
            if not blocks:
                continue
            square = parameter.detach().float().square().movedim(axis, 0).flatten(1).sum(1).cpu()
            pieces = (square / square.sum().clamp_min(1e-30)).split([block.size for block in blocks])
            for block, piece in zip(blocks, pieces, strict=True):
                if block.unit > 1:  # q, k and v of a head may stand together
                    piece = piece.view(-1, block.unit // head_size, head_size).sum(1).flatten()
                if block.unit > 1 or block.kind in (Kind.HIDDEN, Kind.INNER):
                    entry = (block.kind, block.group)
                    shares[entry] = shares[entry] + piece if entry in shares else piece
    return shares


def _directions(model: PreTrainedModel, axes: Mapping[str, Axes], count: int) -> Tensor:
    """(hidden, count) float32: the strongest directions of the residual stream, orthonormal."""
    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        for axis, blocks in enumerate(axes.get(name, ()) if parameter.dim() > 1 else ()):
            if blocks and blocks[0].kind is Kind.HIDDEN:
                rows = parameter.detach().float().movedim(axis, -1).reshape(-1, blocks[0].size)
                gram = rows.T @ rows
                total = total + (gram / gram.trace().clamp_min(1e-30)).cpu()
    # eigh sorts ascending; the eigenvectors of the sum of the Gram matrices are the stack's right singular vectors.
    return torch.linalg.eigh(total).eigenvectors.flip(-1)[:, :count].contiguous()
