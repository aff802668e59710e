"""What each axis of each weight runs over - residual width, heads, inner width, vocabulary - found by experiment.

A model is built without memory from its config with one number doubled; the axes that grow with it run over it. Names
decide one thing only: where the width of the attention is the residual width (BERT, GPT-2: head size = width / heads),
whether an axis of that length belongs to the one or the other.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.models.student.depth import on_meta, text_config

# What configs call the width of the feed-forward layers.
INNER_NAMES = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "n_inner")
HEAD_NAMES = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
# Fields that follow the residual width wherever they equal it.
_WIDTH_FOLLOWERS = ("pooler_hidden_size", "pooler_output_size", "output_hidden_size", "word_embed_proj_dim")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_READS = re.compile(
    r"^(q|k|v|query|key|value|qkv|c_attn|q_attn|Wqkv|query_key_value|in_proj|(q|k|v|qkv|query|key|value|pos_key|pos_query)_(proj|lin))$"
)
_WRITES = re.compile(r"^(o|Wo|dense|c_proj|(o|out|output)_(proj|lin))$")
_HEAD_BY_HEAD = ("query_key_value",)


class Kind(str, Enum):
    """What an axis runs over."""

    HIDDEN = "hidden_size"
    HEADS = "heads"
    KEY_VALUE_HEADS = "key_value_heads"
    INNER = "intermediate_size"
    HEAD_SIZE = "head size"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Block:
    """A stretch of an axis: `size / unit` things of one kind, each `unit` long, that are kept or cut as wholes."""

    kind: Kind
    size: int
    unit: int = 1
    group: str = ""


# One entry an axis: the blocks it is made of, or nothing for an axis whose length stays.
Axes = tuple[tuple[Block, ...], ...]


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that a student may have smaller.

    Attributes:
        hidden: width of the residual stream.
        heads: number of query heads.
        key_value_heads: number of key and value heads.
        head_size: width of a head.
        inner: width of the feed-forward layers, or None where the config has no single one.
        is_tied: whether the head size is hidden / heads and not a number of its own.
    """

    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    inner: int | None
    is_tied: bool

    @property
    def queries_per_key(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.key_value_heads


def read_widths(config: Any) -> Widths:
    """The widths of a config.

    Raises:
        ValueError: it has no single residual width or number of heads.
    """
    inner = text_config(config)
    hidden = getattr(inner, "hidden_size", None)
    count = _single([getattr(inner, name) for name in field_names(inner, HEAD_NAMES)])
    if not isinstance(hidden, int) or not isinstance(count, int):
        raise ValueError(
            f"{type(config).__name__} has no single hidden_size and number of heads (hidden_size={hidden}); a student "
            "narrower than its teacher needs both. Cut its layers instead."
        )
    head_size = getattr(inner, "head_dim", None)
    widths = [getattr(inner, name) for name in field_names(inner, INNER_NAMES)]
    if widths == [None]:  # GPT-2's way to say four times the width
        widths = [4 * hidden]
    return Widths(
        hidden=hidden,
        heads=count,
        key_value_heads=getattr(inner, "num_key_value_heads", None) or count,
        head_size=head_size or hidden // count,
        inner=_single(widths),
        is_tied=head_size is None,
    )


def _single(values: list[Any]) -> int | None:
    return values[0] if values and isinstance(values[0], int) and all(v == values[0] for v in values) else None


def set_widths(
    config: Any,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    inner: int | None = None,
) -> None:
    """Writes widths into a config, whatever it calls them; None leaves a width as it is."""
    config = text_config(config)
    if hidden is not None:
        for name in _WIDTH_FOLLOWERS:
            if getattr(config, name, None) == config.hidden_size:
                setattr(config, name, hidden)
        config.hidden_size = hidden
    for names, value in ((HEAD_NAMES, heads), (("num_key_value_heads",), key_value_heads), (INNER_NAMES, inner)):
        if value is not None:
            for name in field_names(config, names):
                setattr(config, name, value)


def field_names(config: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the names that the config has itself, not by way of another field."""
    own = {config.attribute_map.get(name, name) for name in names}
    return tuple(sorted(name for name in own if name in vars(config)))


def find_axes(model: PreTrainedModel, config: Any, kinds: Collection[Kind]) -> dict[str, Axes]:
    """Name of each tensor in the state dict -> what its axes run over.

    Args:
        model: the model, for its classes and names.
        config: its config, with every width written out.
        kinds: those of hidden_size, heads and intermediate_size to look for.

    Raises:
        ValueError: an axis grows with a width in a way that cutting could not follow.
    """
    widths = read_widths(config)
    inner = 2 * widths.inner if widths.inner is not None else None
    doubled: dict[Kind, dict[str, Any]] = {
        Kind.HIDDEN: {"hidden": 2 * widths.hidden},
        Kind.HEADS: {"heads": 2 * widths.heads, "key_value_heads": 2 * widths.key_value_heads},
        Kind.INNER: {"inner": inner},
    }
    shapes = {kind: _shapes(model, config, partial(set_widths, **doubled[kind])) for kind in doubled if kind in kinds}
    modules = dict(model.named_modules())
    found: dict[str, Axes] = {}
    for name, tensor in model.state_dict().items():
        growth = [
            {kind: shapes[kind][name][axis] / size for kind in shapes if shapes[kind][name][axis] != size}
            for axis, size in enumerate(tensor.shape)
        ]
        found[name] = tuple(
            _blocks(name, axis, size, growth[axis], widths, modules) for axis, size in enumerate(tensor.shape)
        )
    return _with_common_heads(found)


def vocabulary_axes(model: PreTrainedModel, size: int) -> Mapping[str, tuple[bool, ...]]:
    """Name of each tensor -> which of its axes run over the vocabulary of the given size."""
    wider = _shapes(model, model.config, lambda config: setattr(text_config(config), "vocab_size", 2 * size))
    return {
        name: tuple(wider[name][axis] == 2 * n and n == size for axis, n in enumerate(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def _shapes(model: PreTrainedModel, config: Any, change: Callable[[Any], None]) -> dict[str, tuple[int, ...]]:
    changed = copy.deepcopy(config)
    change(changed)
    return {name: tuple(tensor.shape) for name, tensor in on_meta(type(model), changed).state_dict().items()}


def _blocks(
    name: str, axis: int, size: int, growth: dict[Kind, float], widths: Widths, modules: Mapping[str, nn.Module]
) -> tuple[Block, ...]:
    kinds = set(growth)
    if not kinds:
        return ()
    if kinds == {Kind.HIDDEN, Kind.HEADS} and size == widths.head_size:
        return (Block(Kind.HEAD_SIZE, size),)
    if len(kinds) == 1 and growth[next(iter(kinds))] == 2.0:
        if kinds == {Kind.INNER} and size % (inner := widths.inner or 1) == 0:
            return (Block(Kind.INNER, inner, group=_group(name, Kind.INNER)),) * (size // inner)
        if kinds == {Kind.HEADS} or (widths.is_tied and _is_attention_axis(name, axis, modules)):
            return _attention_blocks(name, size, widths)
        if kinds == {Kind.HIDDEN} and size % widths.hidden == 0:
            return (Block(Kind.HIDDEN, widths.hidden),) * (size // widths.hidden)
    raise ValueError(
        f"Axis {axis} of {name} ({size} long) grows with {' and '.join(sorted(kinds))} in a way that no selection of "
        "features or heads can follow (a grouped convolution, or widths added up). This model's width cannot be cut; "
        "cut its layers."
    )


def _attention_blocks(name: str, size: int, widths: Widths) -> tuple[Block, ...]:
    group = _group(name, Kind.HEADS)
    queries, keys = widths.heads * widths.head_size, widths.key_value_heads * widths.head_size
    query = Block(Kind.HEADS, queries, widths.head_size, group)
    key = Block(Kind.KEY_VALUE_HEADS, keys, widths.head_size, group)
    if any(part in _HEAD_BY_HEAD for part in name.split(".")):
        return (Block(Kind.HEADS, size, size // widths.heads, group),)
    layouts = [(query,), (key,), (query, key, key), (key, key)]
    layouts += [
        (Block(Kind.HEADS, widths.heads, 1, group),),
        (Block(Kind.KEY_VALUE_HEADS, widths.key_value_heads, 1, group),),
    ]
    for layout in layouts:
        if sum(block.size for block in layout) == size:
            return layout
    raise ValueError(
        f"{name} has an axis of {size} in its attention, which is neither {widths.heads} heads of {widths.head_size} "
        f"nor {widths.key_value_heads} key heads nor both together. This model's width cannot be cut; cut its layers."
    )


def _is_attention_axis(name: str, axis: int, modules: Mapping[str, nn.Module]) -> bool:
    path, _, kind = name.rpartition(".")
    *outer, leaf = path.split(".")
    if path not in modules or not any(_ATTENTION.search(part) for part in outer):
        return False
    # Conv1D of GPT-2 keeps its weight (in, out), Linear (out, in).
    output_axis = 1 if type(modules[path]).__name__ == "Conv1D" and kind == "weight" else 0
    if _READS.match(leaf):
        return axis == output_axis
    return bool(_WRITES.match(leaf)) and kind == "weight" and axis == 1 - output_axis


def _group(name: str, kind: Kind) -> str:
    """The layer of a tensor, or its attention module: the tensors that share one selection."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    end = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[: end + 1] if kind is Kind.HEADS else parts[:end])


def _with_common_heads(found: dict[str, Axes]) -> dict[str, Axes]:
    # T5 keeps one table of biases a head in its first layer and uses it in all: then all layers keep the same heads.
    heads = [block for axes in found.values() for blocks in axes for block in blocks if block.kind is Kind.HEADS]
    with_table = {block.group for block in heads if block.unit == 1}
    if not with_table or with_table == {block.group for block in heads}:
        return found
    attention = (Kind.HEADS, Kind.KEY_VALUE_HEADS)
    return {
        name: tuple(
            tuple(replace(block, group="") if block.kind in attention else block for block in blocks)
            for blocks in axes
        )
        for name, axes in found.items()
    }
