"""Narrower layers: the sizes a student may have, and the weights cut to them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.models.student.axes import Axes, Block, Kind, Widths, read_widths, set_widths


@dataclass(frozen=True)
class WidthCut:
    """How every weight of a teacher becomes narrower.

    Attributes:
        axes: name of a tensor -> what its axes run over.
        kept: (kind, group) of a block -> (kept,) which of its things stay; a missing entry keeps all.
        inside_head: group -> (new head size,) which features of every head stay; a missing entry keeps all.
        rotation: (hidden, new hidden) float32 with orthonormal columns, instead of kept residual features; or None.
        gains: name of each weight that scales residual features one by one -> the factor that a 0 in it stands for.
    """

    axes: Mapping[str, Axes]
    kept: Mapping[tuple[Kind, str], Tensor]
    inside_head: Mapping[str, Tensor]
    rotation: Tensor | None = None
    gains: Mapping[str, float] | None = None

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that name, cut along every axis that becomes shorter."""
        for axis, blocks in enumerate(self.axes.get(name, ())):
            if self.rotation is not None and blocks and blocks[0].kind is Kind.HIDDEN:
                tensor = self._rotated(name, tensor, axis, self.rotation.to(tensor.device))
            elif any((block.kind, block.group) in self.kept for block in blocks):
                tensor = tensor.index_select(axis, self._index(blocks).to(tensor.device))
        return tensor

    def _index(self, blocks: tuple[Block, ...]) -> Tensor:
        index, start = [], 0
        for block in blocks:
            things = self.kept.get((block.kind, block.group), torch.arange(block.size // block.unit))
            inside = self.inside_head.get(block.group) if block.unit > 1 else None
            inside = torch.arange(block.unit) if inside is None else inside
            index.append((start + things[:, None] * block.unit + inside).flatten())
            start += block.size
        return torch.cat(index)

    def _rotated(self, name: str, tensor: Tensor, axis: int, rotation: Tensor) -> Tensor:
        hidden, new = rotation.shape
        rows = tensor.float().movedim(axis, -1).unflatten(-1, (-1, hidden))
        if self.gains is not None and name in self.gains:
            # The diagonal of R' diag(gain) R. What the rotation keeps of the stream has nearly all its length, so that
            # a norm over fewer features would make it shorter by the root of the ratio.
            offset = self.gains[name]
            rows = (rows + offset) @ rotation.square() * (hidden / new) ** 0.5 - offset
        else:
            rows = rows @ rotation
        return rows.flatten(-2).movedim(-1, axis).to(tensor.dtype)


def new_widths(
    teacher: Widths, *, hidden_size: int | None, heads: int | None, intermediate_size: int | None, fixed_head: bool
) -> Widths:
    """The student's widths; what is not given stays, except where another width decides it.

    Args:
        teacher: the teacher's widths.
        hidden_size: width of the residual stream.
        heads: number of query heads; key heads follow.
        intermediate_size: width of the feed-forward layers.
        fixed_head: whether the head size must stay, as rotary positions ask.

    Raises:
        ValueError: a width larger than the teacher's, or widths that do not fit each other; says which would.
    """
    given: dict[str, tuple[int | None, int | None]] = {
        "hidden_size": (hidden_size, teacher.hidden),
        "heads": (heads, teacher.heads),
        "intermediate_size": (intermediate_size, teacher.inner),
    }
    for name, (new, old) in given.items():
        if new is not None and old is None:
            raise ValueError(f"{name}={new}: the teacher's config has no single {name}. Leave it out.")
        if new is not None and not 1 <= new <= (old or 0):
            raise ValueError(f"{name}={new}: the teacher has {old}, and a student is cut from it. Choose 1 to {old}.")
    hidden = hidden_size or teacher.hidden
    if teacher.is_tied:
        heads = heads or _heads_for(hidden, teacher, fixed_head)
        if hidden % heads:
            raise ValueError(
                f"hidden_size={hidden} does not divide into {heads} heads. This model has hidden_size = heads x head "
                f"size; with the teacher's head size of {teacher.head_size} that is {heads * teacher.head_size}."
            )
    heads = heads or teacher.heads
    head_size = hidden // heads if teacher.is_tied else teacher.head_size
    if head_size > teacher.head_size or (fixed_head and head_size != teacher.head_size):
        reason = "rotary positions or norms inside the heads fix it" if fixed_head else "the teacher's is smaller"
        raise ValueError(
            f"hidden_size={hidden} with {heads} heads makes heads of {head_size}, the teacher's are of "
            f"{teacher.head_size} and {reason}. Use heads={hidden // teacher.head_size} with hidden_size="
            f"{hidden // teacher.head_size * teacher.head_size}, or hidden_size={heads * teacher.head_size}."
        )
    return replace(
        teacher,
        hidden=hidden,
        heads=heads,
        key_value_heads=_key_heads(heads, teacher),
        head_size=head_size,
        inner=intermediate_size or teacher.inner,
    )


def _heads_for(hidden: int, teacher: Widths, fixed_head: bool) -> int:
    if hidden % teacher.head_size == 0:
        return hidden // teacher.head_size
    if hidden % teacher.heads == 0 and not fixed_head:
        return teacher.heads
    below = hidden // teacher.head_size * teacher.head_size
    raise ValueError(
        f"hidden_size={hidden} holds no whole number of heads of {teacher.head_size}. Choose a multiple of it, "
        f"such as {below or teacher.head_size} or {below + teacher.head_size}"
        + ("." if fixed_head else f", or give heads: a divisor of {hidden}, at most {teacher.heads}.")
    )


def _key_heads(heads: int, teacher: Widths) -> int:
    if heads % teacher.queries_per_key == 0:
        return heads // teacher.queries_per_key
    if heads % teacher.key_value_heads == 0:
        return teacher.key_value_heads
    fitting = [
        n for n in range(1, teacher.heads + 1) if not n % teacher.queries_per_key or not n % teacher.key_value_heads
    ]
    raise ValueError(
        f"heads={heads}: the teacher shares each of its {teacher.key_value_heads} key heads among "
        f"{teacher.queries_per_key} query heads. Whole groups, or equally many of each, stay with heads in {fitting}."
    )


def cut_config(config: Any, student: Widths) -> Any:
    """A copy of the config with the student's widths."""
    cut = copy.deepcopy(config)
    teacher = read_widths(config)
    set_widths(
        cut,
        hidden=student.hidden if student.hidden != teacher.hidden else None,
        heads=student.heads if student.heads != teacher.heads else None,
        key_value_heads=student.key_value_heads if student.key_value_heads != teacher.key_value_heads else None,
        inner=student.inner,
    )
    return cut


def has_fixed_head(model: PreTrainedModel, axes: Mapping[str, Axes]) -> bool:
    """Whether the size of a head must stay: positions rotate in it, weights run over it, or q, k, v interleave."""
    blocks = [block for tensor in axes.values() for axis in tensor for block in axis]
    size = read_widths(model.config).head_size
    return any("rotary" in type(module).__name__.lower() for module in model.modules()) or any(
        block.kind is Kind.HEAD_SIZE or (block.kind is Kind.HEADS and block.unit not in (1, size)) for block in blocks
    )


def residual_gains(model: nn.Module, axes: Mapping[str, Axes]) -> dict[str, float]:
    """Name of each residual norm's weight -> the factor that a 0 in it stands for: 1 where the norm adds 1 (Gemma)."""
    found = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_residual = any(block.kind is Kind.HIDDEN for blocks in axes.get(f"{path}.weight", ()) for block in blocks)
        if is_residual and type(module).__name__.endswith("Norm") and isinstance(weight, Tensor):
            silent = copy.deepcopy(module)
            with torch.no_grad():
                for parameter in silent.parameters():
                    parameter.zero_()
                probe = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)
                found[f"{path}.weight"] = 1.0 if silent(probe[None, None]).any() else 0.0
    return found
