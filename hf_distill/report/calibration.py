"""How far confidence and accuracy lie apart, summed up batch by batch."""

import numpy as np
from torch import Tensor


class Calibration:
    """The expected calibration error of items that come in parts; see `metrics.scores.expected_calibration_error`.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3: equally wide bins, open below and closed above.

    Args:
        bins: how many bins [0, 1] is cut into.
    """

    def __init__(self, bins: int = 15) -> None:
        self._gaps, self._items = np.zeros(bins), 0

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Adds items.

        Args:
            confidence: (items,) in [0, 1], the probability of what was chosen.
            right: (items,) bool.
        """
        sure, hits = confidence.cpu().double().numpy(), right.cpu().numpy()
        bins = len(self._gaps)
        places = np.clip(np.nan_to_num(np.ceil(sure * bins)).astype(int) - 1, 0, bins - 1)
        self._gaps += np.bincount(places, weights=hits - sure, minlength=bins)
        self._items += len(sure)

    @property
    def error(self) -> float | None:
        """The error, in [0, 1]; None without an item, NaN where a confidence is."""
        return float(np.abs(self._gaps).sum() / self._items) if self._items else None
