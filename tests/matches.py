"""What is inside a model by other means than the library's: in float64, by eager attention and hooks of our own."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.training import batch_of


@dataclass
class Seen:
    """A model's inside for one batch, all in float64.

    Attributes:
        real: (rows, length) bool, the positions that are not padding.
        labels: as the rows have them.
        logits: as the model gives them.
        hidden: the embeddings' output and that of each layer, (rows, length, width).
        maps: (rows, heads, length, length) a layer: the probabilities of eager attention.
        parts: for `query`, `key` and `value` (rows, heads, length, width) a layer.
    """

    real: Tensor
    labels: Tensor
    logits: Tensor
    hidden: list[Tensor]
    maps: list[Tensor] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def scores(self, layer: int) -> Tensor:
        """(rows, heads, length, length): a layer's scores before the softmax; layers count from 1."""
        query, key = self.parts["query"][layer - 1], self.parts["key"][layer - 1]
        return torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5

    def split(self, size: int) -> list["Seen"]:
        """The micro-batches of `size` rows."""

        def rows(value: Any, start: int) -> Any:
            if isinstance(value, dict):
                return {name: rows(part, start) for name, part in value.items()}
            return [rows(part, start) for part in value] if isinstance(value, list) else value[start : start + size]

        return [
            Seen(**{name: rows(value, start) for name, value in vars(self).items()})
            for start in range(0, len(self.real), size)
        ]


def pair_of(make: Any, student: dict[str, Any], teacher: dict[str, Any]) -> tuple[Any, Any]:
    """A student and a teacher with weights large enough that every term matters, the teacher's larger still."""
    return _made(make, student, seed=0, factor=2.0), _made(make, teacher, seed=1, factor=3.0)


def _made(make: Any, options: dict[str, Any], *, seed: int, factor: float) -> Any:
    torch.manual_seed(seed)
    model = make(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Initial logits are near 0, and differences of theirs at a high temperature float noise.
                parameter.mul_(25.0 if name == "classifier.weight" else factor)
    return model


def look(model: Any, rows: list[dict[str, Tensor]], *, attention: bool = True) -> Seen:
    """What a copy of the model, in float64, has inside for rows of text or images.

    Args:
        model: a BERT for its attention; any model for the rest.
        rows: as in `tests.tiny.rows`.
        attention: whether to look at maps, queries, keys and values too.
    """
    model = copy.deepcopy(model).eval().double()
    batch = {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch_of(rows).items()
        if name in ("input_ids", "attention_mask", "pixel_values", "input_values", "input_features", "labels")
    }
    labels = batch["labels"]
    inputs = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    parts: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    if attention:
        model.set_attn_implementation("eager")
        width = model.config.hidden_size // model.config.num_attention_heads
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]
            if kind in parts and isinstance(module, torch.nn.Linear):
                module.register_forward_hook(
                    lambda _, args, out, kind=kind: parts[kind].append(out.unflatten(-1, (-1, width)).transpose(1, 2))
                )
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=attention)
    hidden = out.encoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states
    return Seen(
        real=batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(hidden[0].shape[:2]).bool(),
        labels=labels,
        logits=out.logits,
        hidden=list(hidden),
        maps=list(out.attentions) if attention else [],
        parts=parts if attention else {},
    )
