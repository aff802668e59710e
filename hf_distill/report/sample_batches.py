"""Inputs of any batch size and length, made of real rows: what the latency of a model is measured on."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.batches import TARGETS
from hf_distill.models.heads import decoder_inputs, input_names, task_model
from hf_distill.report.rows import Rows
from hf_distill.signals import Task

_ROWS_LOOKED_AT = 256


class SampleBatches:
    """Makes batches of one model's inputs.

    Rows are repeated where there are too few. A row's real tokens (or samples of sound) are repeated up to the length
    asked for, or cut to it, so that nothing is padding; a decoder's inputs keep the length that they have. Inputs of
    one size, such as images, are left as they are.

    Args:
        rows: the rows.
        model: the model that reads them.
        task: what its head predicts.
        inputs_of: a collated batch -> what the model reads of it, labels included.
    """

    def __init__(
        self, rows: Rows, model: nn.Module, *, task: Task, inputs_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> None:
        self._rows, self._model, self._task, self._inputs_of = rows, model, task, inputs_of
        names = input_names(model)
        self._names = names - {*TARGETS}
        self._main = str(task_model(model).main_input_name)

    @property
    def has_length(self) -> bool:
        """Whether rows may be of any length, as text and sound are, and images are not."""
        main = self._sample(1)[self._main]
        return main.dim() == 2 or (self._task is Task.MULTIPLE_CHOICE and main.dim() == 3)

    def usual_lengths(self) -> tuple[int | None, ...]:
        """The median and the greatest length of the first rows; (None,) where rows have none."""
        if not self.has_length:
            return (None,)
        batches = islice(self._rows.batches(), -(-_ROWS_LOOKED_AT // self._rows.batch_size))
        inputs = [self._inputs_of(batch) for batch in batches]
        lengths = torch.cat([_real(each, each[self._main]).sum(-1).flatten() for each in inputs])
        return tuple(sorted({int(lengths.median()), int(lengths.max())}))

    def __call__(self, batch_size: int, length: int | None) -> dict[str, Tensor]:
        """The inputs.

        Args:
            batch_size: rows, >= 1.
            length: of the model's main input; None leaves it as it is.
        """
        inputs = self._sample(batch_size)
        rows = torch.arange(batch_size) % len(inputs[self._main])
        inputs = {name: value[rows.to(value.device)] for name, value in inputs.items()}
        if length is None:
            return inputs
        main = inputs[self._main]
        real = _real(inputs, main)
        # The real places first, in their order, and then as many rounds of them as it takes.
        order = (~real).long().argsort(dim=-1, stable=True)
        steps = torch.arange(length, device=main.device) % real.sum(-1, keepdim=True).clamp(min=1)
        places = order.gather(-1, steps)
        fitted = {
            name: value.gather(-1, places) if value.shape == main.shape and not _is_of_decoder(name) else value
            for name, value in inputs.items()
        }
        if "position_ids" in fitted:
            fitted["position_ids"] = torch.arange(length, device=main.device).expand(places.shape)
        return fitted

    def _sample(self, count: int) -> dict[str, Tensor]:
        wanted = -(-count // self._rows.batch_size)
        parts = [self._read(batch) for batch in islice(self._rows.batches(), wanted)]
        # Batches of other lengths do not join: the first has as many rows as there are, up to its size.
        sizes = {name: value.shape[1:] for name, value in parts[0].items()}
        parts = [part for part in parts if {name: value.shape[1:] for name, value in part.items()} == sizes]
        return {name: torch.cat([part[name] for part in parts]) for name in sizes}

    def _read(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        inputs = self._inputs_of(batch)
        read = {name: value for name, value in inputs.items() if name in self._names and isinstance(value, Tensor)}
        if self._task is Task.SEQ2SEQ_LM and "labels" in inputs and "decoder_input_ids" not in read:
            read |= {name: value for name, value in decoder_inputs(self._model, inputs["labels"]).items()}
        return read


def _is_of_decoder(name: str) -> bool:
    # Texts to write may be as long as those to read.
    return name.startswith("decoder_") or name == "labels"


def _real(inputs: Mapping[str, Any], main: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == main.shape:
        return mask.bool()
    return torch.ones(main.shape, dtype=torch.bool, device=main.device)
