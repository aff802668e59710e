"""Exact normalisation and exact logs: sums over global counts, never means of means."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_distill.items import ROW_LENGTHS, ROW_MASK, batch_size, device_of


@dataclass(frozen=True)
class StepCounts:
    """Items over the whole accumulation window and all ranks of one optimizer step: the divisors of its terms.

    Attributes:
        counts: (5 + units,) int64 on the training device: in the order of `Items.counts`, then the units of the
            matches between layers, in the order of their plan. Where KD items have weights, floats with the sum of
            those weights in place of the number of KD items.
        world_scale: what a rank's share of a term is multiplied by, because DDP averages gradients over the ranks: the
            number of processes if `counts` is over all of them, else 1.
        single: whether the window is one micro-batch on one process, so that its own mean is the global mean.
    """

    counts: Tensor
    world_scale: int = 1
    single: bool = False

    @classmethod
    def of_window(cls, batches: Iterable[Tensor], accelerator: Accelerator, *, across_devices: bool) -> "StepCounts":
        """The counts of a window, of those of its micro-batches, with one gather if there are several processes."""
        counts = [*batches]
        total = torch.stack(counts).sum(0)
        if accelerator.num_processes == 1:
            return cls(total, single=len(counts) == 1)
        if not across_devices:
            return cls(total)
        return cls(accelerator.reduce(total, "sum"), world_scale=accelerator.num_processes)

    @classmethod
    def of_batch(cls, counts: Tensor) -> "StepCounts":
        """The counts of one batch alone, as in evaluation."""
        return cls(counts, single=True)

    @property
    def task(self) -> tuple[Tensor, Tensor]:
        """Items of the task loss; two numbers that differ only where the task has two targets."""
        return self.counts[0].long(), self.counts[1].long()

    @property
    def kd(self) -> Tensor:
        """Items the teacher teaches, or the sum of their weights in float32."""
        return self.counts[2].float() if self.counts.is_floating_point() else self.counts[2]

    @property
    def labelled(self) -> Tensor:
        """Rows with a label."""
        return self.counts[3].long()

    @property
    def rows(self) -> Tensor:
        """Rows, those that ranks repeat left out."""
        return self.counts[4].long()

    @property
    def units(self) -> Tensor:
        """(units,) the items of the matches between layers."""
        return self.counts[5:].long()


def divisor(count: Tensor) -> Tensor:
    """The count, or 1 where there is nothing to divide."""
    return torch.where(count > 0, count, 1)


def with_item_weights(counts: Tensor, total: Tensor) -> Tensor:
    """Counts in which the sum of the KD items' weights stands for their number.

    Args:
        counts: (5,) int64, as of `Items.counts`.
        total: scalar, the sum of the weights.
    """
    # float64 holds every count exactly; not all devices have it.
    counts = counts.to(torch.float32 if counts.device.type == "mps" else torch.float64)
    return torch.cat([counts[:2], total.to(counts.dtype)[None], counts[3:]])


def mark_repeated_rows(inputs: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """The batch, with a `ROW_MASK` if it is a data loader's last and repeats rows so that the ranks come out even.

    The rows are those that `Accelerator.gather_for_metrics` would drop. Call it right after the batch was fetched. Of
    one row made of all (`ROW_LENGTHS`) the part of the repeated ones is cut off.
    """
    if accelerator.num_processes == 1 or not accelerator.gradient_state.end_of_dataloader:
        return dict(inputs)
    rows = len(inputs[ROW_LENGTHS]) if ROW_LENGTHS in inputs else batch_size(inputs)
    kept = _rows_of_last_batch(accelerator, rows)
    if kept <= 0:
        return dict(inputs)
    if ROW_LENGTHS in inputs:
        return _without_repeated(inputs, kept=kept, accelerator=accelerator)
    first = rows * accelerator.process_index
    return {**inputs, ROW_MASK: torch.arange(first, first + rows, device=device_of(inputs)) < kept}


def _rows_of_last_batch(accelerator: Accelerator, rows: int) -> int:
    """How many rows of all ranks' last batches, of `rows` each, are not repeated; 0 or -1 where none is."""
    state = accelerator.gradient_state
    if state.remainder != -1:
        return state.remainder
    # accelerate 1.15 forgets it where a resumed training has skipped batches.
    loader: Any = state.active_dataloader
    sampler: Any = getattr(loader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    if sampler is None or getattr(sampler, "drop_last", True) or not hasattr(loader.dataset, "__len__"):
        return -1
    return len(loader.dataset) % (rows * accelerator.num_processes)


def _without_repeated(inputs: Mapping[str, Any], *, kept: int, accelerator: Accelerator) -> dict[str, Any]:
    lengths = inputs[ROW_LENGTHS]
    mine = kept - len(lengths) * accelerator.process_index
    if mine <= 0:  # a batch is never empty
        return {**inputs, ROW_MASK: torch.zeros(1, dtype=torch.bool, device=device_of(inputs))}
    tokens = (1, sum(lengths))
    return {
        name: value[:, : sum(lengths[:mine])] if isinstance(value, Tensor) and value.shape == tokens else value
        for name, value in inputs.items()
    }


class TermMeter:
    """Sums of named numbers, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds a scalar, detached."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = {}

    def totals(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums over all ranks, as numbers; every rank must have added the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)  # ranks may have met them in another order
        total = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return dict(zip(names, total.tolist(), strict=True))
