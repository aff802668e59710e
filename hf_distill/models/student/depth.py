"""Fewer layers: which of the teacher's to keep, the config that says so, and the new names of their weights."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

# T5's first layer holds the table that all its layers use, whichever layer comes first in the student.
_HELD_BY_FIRST = "relative_attention_bias"
# Which layers to keep: how many, which, or either for each stack.
Layers: TypeAlias = int | Sequence[int] | Mapping[str, int | Sequence[int]]

# Where configs with two stacks count the layers of each; others have `num_hidden_layers`, whatever it maps to.
_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Fields that list layer numbers instead of one value a layer.
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attention_layers", "attn_layers")


def uniform_layers(count: int, depth: int) -> tuple[int, ...]:
    """`count` of `depth` layers, evenly spread from the first to the last: 6 of 12 are 0, 2, 4, 7, 9, 11.

    One layer alone is the first. Source: the choice of DistilBERT (arXiv:1910.01108, authors' code); distil-whisper
    (arXiv:2311.00430) spreads likewise with both ends pinned.

    Raises:
        ValueError: count is not in 1..depth.
    """
    if not 1 <= count <= depth:
        raise ValueError(f"Cannot keep {count} of the teacher's {depth} layers; choose 1 to {depth}.")
    return tuple(round(i * (depth - 1) / max(count - 1, 1)) for i in range(count))


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model of a multimodal model, else the config itself."""
    return getattr(config, "text_config", None) or config


def layer_counts(config: Any) -> dict[str, str]:
    """Stack -> the config field that counts its layers: {"encoder": ..., "decoder": ...}, or {"": ...} for one."""
    config = text_config(config)
    found = {
        stack: next((name for name in names if isinstance(config.__dict__.get(name), int)), None)
        for stack, names in _COUNTS.items()
    }
    if all(found.values()):
        return {stack: name for stack, name in found.items() if name is not None}
    return {"": config.attribute_map.get("num_hidden_layers", "num_hidden_layers")}


def kept_layers(layers: Layers, config: Any) -> dict[str, tuple[int, ...]]:
    """Stack -> the teacher's layers to keep, counted from 0, for every stack that is named.

    Raises:
        ValueError: a stack that the model does not have, or layers that it does not have.
    """
    counts = layer_counts(config)
    if isinstance(layers, Mapping):
        if unknown := set(layers) - set(counts):
            raise ValueError(
                f"layers names {', '.join(map(repr, sorted(unknown)))}, but the stacks of this model are "
                f"{', '.join(map(repr, counts))}." + (" Give the layers without a name." if "" in counts else "")
            )
        wanted = dict(layers)
    else:
        wanted = dict.fromkeys(counts, layers)
    depths = {stack: getattr(text_config(config), counts[stack], None) for stack in wanted}
    for stack, depth in depths.items():
        if not isinstance(depth, int):
            raise ValueError(f"The config has no number of layers in {counts[stack]!r} ({depth!r}), so none can go.")
    return {stack: _checked(choice, depths[stack]) for stack, choice in wanted.items()}


def _checked(choice: int | Sequence[int], depth: Any) -> tuple[int, ...]:
    if isinstance(choice, int):
        return uniform_layers(choice, depth)
    kept = tuple(int(layer) + depth * (layer < 0) for layer in choice)
    if not kept or not all(0 <= layer < depth for layer in kept):
        raise ValueError(
            f"layers={list(choice)} names layers that the teacher does not have: it has {depth}, counted from 0 to "
            f"{depth - 1} (or from the end, -1 to -{depth})."
        )
    return kept


def cut_depth(config: Any, kept: Mapping[str, tuple[int, ...]]) -> Any:
    """A copy of the config for the kept layers, every field with one value a layer cut alike."""
    cut = copy.deepcopy(config)
    inner, counts = text_config(cut), layer_counts(config)
    overrides = {int(layer): own for layer, own in (inner.to_dict().get("per_layer_config") or {}).items()}
    for stack, layers in kept.items():
        depth = getattr(inner, counts[stack])
        for name, value in _per_layer_fields(inner, counts[stack], depth):
            if name in _LAYER_NUMBERS:
                new = [i for i, layer in enumerate(layers) if layer in value]
            else:
                new = [value[layer] for layer in layers]
            setattr(inner, name, type(value)(new))
        inner.per_layer_config = None
        setattr(inner, counts[stack], len(layers))
        if overrides:
            inner.per_layer_config = {i: overrides[k] for i, k in enumerate(layers) if k in overrides}
    cut.validate()
    return cut


def cut_alignment_heads(model: PreTrainedModel, decoder: Sequence[int] | None, *, heads_stay: bool) -> None:
    """Renumbers the layers of the heads by which Whisper tells times, in place; drops them where heads were cut."""
    generation: Any = getattr(model, "generation_config", None)
    heads = getattr(generation, "alignment_heads", None)
    if heads is None or (decoder is None and heads_stay):
        return
    new = {old: i for i, old in enumerate(decoder or ())}
    left = [[new[layer], head] for layer, head in heads if layer in new]
    generation.alignment_heads = left if heads_stay and left else None


def _per_layer_fields(config: Any, count: str, depth: int) -> Iterator[tuple[str, Any]]:
    # A list may be as long as the stack is deep by accident (`conv_dim`, `begin_suppress_tokens`). One that belongs to
    # the layers is, where the config class makes it up, as long as another depth, too.
    deeper = type(config)(**{count: depth + 3})
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or "token" in name:
            continue
        default = getattr(deeper, name, None)
        is_fixed = isinstance(default, list | tuple) and len(default) not in (0, depth + 3)
        if name in _LAYER_NUMBERS or (len(value) == depth and not is_fixed):
            yield name, value


def layer_lists(model: PreTrainedModel, kept: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Path of each list of layers in the model -> the layers of it to keep.

    A stack's lists are those that become shorter when the config asks for fewer layers in that stack.

    Raises:
        ValueError: no list becomes shorter, as where layers share their weights.
    """
    lists: dict[str, tuple[int, ...]] = {}
    before = _lengths(model)
    for stack, layers in kept.items():
        depth = getattr(text_config(model.config), layer_counts(model.config)[stack])
        if len(layers) == depth:  # a reordering changes no length: look at one layer less
            probe, length = cut_depth(model.config, {stack: layers[: depth - 1]}), depth - 1
        else:
            probe, length = cut_depth(model.config, {stack: layers}), len(layers)
        if length == 0:
            continue
        after = _lengths(on_meta(type(model), probe))
        found = [path for path, n in before.items() if n == depth and after.get(path) == length]
        if not found:
            raise ValueError(
                f"The {stack + ' ' if stack else ''}layers of {type(model).__name__} stand in no list that follows "
                "the number in its config (do they share weights?), so its depth cannot be cut. Leave layers out."
            )
        lists |= dict.fromkeys(found, layers)
    return lists


def on_meta(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without memory, for its names and shapes."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _lengths(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }


def teacher_name(name: str, lists: Mapping[str, tuple[int, ...]]) -> str:
    """The teacher's name of one of the student's tensors: `h.1.ln.weight` was `h.11.ln.weight`."""
    for path, layers in lists.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            if _HELD_BY_FIRST in name:
                return name
            return f"{path}.{layers[int(index)]}.{rest}"
    return name
