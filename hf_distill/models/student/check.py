"""Whether the axes found in a teacher are what they were taken for: tried by shuffling them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_distill.models.student.axes import Axes, Kind, Widths
from hf_distill.models.student.depth import text_config
from hf_distill.models.student.width import WidthCut

_TOLERANCE = 1e-4


def check_axes(model: PreTrainedModel, axes: Mapping[str, Axes], widths: Widths) -> None:
    """Shuffles residual features, heads and inner neurons through the whole model, which must not change its outputs.

    The model itself is left as it is; for a moment a float32 copy of its weights exists.

    Raises:
        ValueError: the outputs change, so a cut along these axes would mix up features; or the model does not run.
    """
    shuffled = _shuffle(axes, widths)
    modes = {module: module.training for module in model.modules()}
    names = dict(model.named_parameters())
    try:
        model.eval()
        with torch.no_grad():
            inputs = sample_inputs(model)
            expected = _run(model, {name: value.float() for name, value in names.items()}, inputs)
            found = _run(model, {name: shuffled.apply(name, value.float()) for name, value in names.items()}, inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a made-up input ({type(error).__name__}: {error}), so "
            "whether its width can be cut cannot be tried. Cut its layers instead."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if expected.shape[-1] == widths.hidden:  # a model without a head gives the features themselves, shuffled
        expected, found = expected.sort(-1).values, found.sort(-1).values
    change = float((expected - found).abs().max() / expected.std().clamp_min(1e-12))
    if not change <= _TOLERANCE:
        raise ValueError(
            f"Shuffling the features and heads of {type(model).__name__} consistently changed its outputs by "
            f"{change:.1e} of their spread, so its weights are laid out in a way this cut does not know (fused or "
            "interleaved projections). Its width cannot be cut; cut its layers instead."
        )


def sample_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small made-up input of the model's kind."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "pixel_values": lambda: (1, config.num_channels, *_square(config.image_size)),
        "input_values": lambda: (1, 4000),
        "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
    }
    inputs: dict[str, Tensor] = {}
    if model.main_input_name in shapes:
        inputs[model.main_input_name] = torch.randn(shapes[model.main_input_name](), generator=generator)
    else:
        size = text_config(config).vocab_size
        inputs["input_ids"] = torch.randint(size, (2, 6), generator=generator)
        if type(model).__name__.endswith("ForMultipleChoice"):
            inputs["input_ids"] = inputs["input_ids"][None]
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(
            config.vocab_size, (len(next(iter(inputs.values()))), 4), generator=generator
        )
    return {name: value.to(model.device) for name, value in inputs.items()}


def _square(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _run(model: PreTrainedModel, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    outputs = functional_call(model, weights, kwargs={**inputs, "return_dict": True})
    names = [name for name in ("logits", "start_logits", "last_hidden_state") if name in outputs]
    return outputs[names[0]] if names else outputs[0]


def _shuffle(axes: Mapping[str, Axes], widths: Widths) -> WidthCut:
    generator = torch.Generator().manual_seed(0)
    kept: dict[tuple[Kind, str], Tensor] = {}
    for block in (block for tensor in axes.values() for blocks in tensor for block in blocks):
        if block.kind is Kind.HEADS and (block.kind, block.group) not in kept:
            keys = torch.randperm(widths.key_value_heads, generator=generator)
            inside = torch.randperm(widths.queries_per_key, generator=generator)
            kept[Kind.HEADS, block.group] = (keys[:, None] * widths.queries_per_key + inside).flatten()
            kept[Kind.KEY_VALUE_HEADS, block.group] = keys
        elif block.kind in (Kind.HIDDEN, Kind.INNER) and (block.kind, block.group) not in kept:
            kept[block.kind, block.group] = torch.randperm(block.size, generator=generator)
    return WidthCut(axes, kept, {})
