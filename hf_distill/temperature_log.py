"""What the temperatures were, over all items and ranks since the last log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

_BINS = 32


@dataclass(frozen=True)
class Histogram:
    """How many values fell between which bounds.

    Attributes:
        counts: of each bin.
        edges: one more than bins, rising; values at an edge count above it, the last edge's own below it.
        least: the least value.
        most: the greatest value.
        total: the sum of the values.
        squares: the sum of their squares.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    least: float
    most: float
    total: float
    squares: float


class TemperatureMeter:
    """The temperatures of the items that count, kept on the device until they are asked for.

    Args:
        lowest: what no temperature is below.
        highest: what none is above, >= lowest.
    """

    def __init__(self, lowest: float, highest: float) -> None:
        self._lowest = lowest
        self._width = (highest - lowest) / _BINS or 1.0 / _BINS  # one temperature alone falls into the first bin
        self._sums: Tensor | None = None  # number, sum, sum of squares, and the bins
        self._extremes: Tensor | None = None  # greatest, and greatest of the negatives

    def add(self, temperature: float | Tensor, mask: Tensor) -> None:
        """Takes down T of the items that the mask keeps.

        Args:
            temperature: a number, a scalar or (...,); detached here; may be NaN outside the mask.
            mask: (...,) bool, the items that count.
        """
        if mask.numel() == 0:
            return
        # float64 counts exactly; not all devices have it.
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        if not isinstance(temperature, Tensor):
            temperature = torch.full((), temperature, dtype=dtype, device=mask.device)
        values = temperature.detach().to(dtype).expand(mask.shape)
        kept = values.where(mask, 0.0)
        bins = ((kept - self._lowest) / self._width).long().clamp_(0, _BINS - 1)
        counted = mask.to(dtype)
        counts = torch.zeros(_BINS, dtype=dtype, device=mask.device).scatter_add_(0, bins.flatten(), counted.flatten())
        sums = torch.cat([torch.stack([counted.sum(), kept.sum(), kept.square().sum()]), counts])
        extremes = torch.stack([values.where(mask, -math.inf).amax(), (-values).where(mask, -math.inf).amax()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._extremes = extremes if self._extremes is None else torch.maximum(self._extremes, extremes)

    def add_all(self, temperatures: Sequence[float | Tensor], mask: Tensor) -> None:
        """Takes down several temperatures of the same items, as of the start and the end of an answer."""
        for temperature in temperatures:
            self.add(temperature, mask)

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = self._extremes = None

    def totals(self, accelerator: Accelerator) -> tuple[dict[str, float], Histogram | None]:
        """What to log, and the histogram, over all ranks, which must all call; nothing where no item counted.

        Returns: `temperature` (the mean), `temperature_min` and `temperature_max`, and the histogram.
        """
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(3 + _BINS, dtype=dtype, device=device) if self._sums is None else self._sums
        extremes = (
            torch.full((2,), -math.inf, dtype=dtype, device=device) if self._extremes is None else self._extremes
        )
        ranks = accelerator.gather(torch.cat([sums, extremes])[None]).tolist()
        number, total, squares, *counts = (
            math.fsum(column) for column in zip(*(row[:-2] for row in ranks), strict=True)
        )
        if number == 0:
            return {}, None
        most, least = max(row[-2] for row in ranks), -max(row[-1] for row in ranks)
        # Rounding alone could carry the mean past them, which shows where all are equal.
        mean = min(max(total / number, least), most)
        edges = tuple(self._lowest + self._width * edge for edge in range(_BINS + 1))
        histogram = Histogram(tuple(map(int, counts)), edges, least, most, total, squares)
        return {"temperature": mean, "temperature_min": least, "temperature_max": most}, histogram
