"""Several texts in one row: which go together, and where each begins."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.items import IGNORE_INDEX

Columns = Mapping[str, Sequence[list[int]]]


@dataclass(frozen=True)
class Packing:
    """Packs a batch of rows, for `datasets.map(batched=True)`.

    A packed row has `position_ids` that begin with 0 at each of its texts, and no label at the first token of one,
    which the text before it would have to predict.

    Attributes:
        length: tokens of a row, at most.
        wraps: whether texts are cut where a row ends, so that rows are full; else each stays whole, and goes to where
            the least room is left (best fit, the longest text first).
    """

    length: int
    wraps: bool = False

    def __call__(self, rows: Columns) -> dict[str, list[Any]]:
        """The columns `input_ids`, `labels` and `position_ids` of the packed rows.

        Raises:
            ValueError: a text is longer than a row and may not be cut.
        """
        lengths = [len(ids) for ids in rows["input_ids"]]
        groups = _wrapped(lengths, self.length) if self.wraps else _best_fit(lengths, self.length)
        packed: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
        for group in groups:
            ids: list[int] = []
            labels: list[int] = []
            positions: list[int] = []
            for number, start, end in group:
                ids += rows["input_ids"][number][start:end]
                labels += [IGNORE_INDEX, *rows["labels"][number][start + 1 : end]]
                positions += range(end - start)
            for name, values in zip(packed, (ids, labels, positions), strict=True):
                packed[name].append(values)
        return packed


Piece = tuple[int, int, int]  # of a text: its number, and from where to where


def _best_fit(lengths: Sequence[int], room: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    spaces: list[tuple[int, int]] = []  # room left in a row and its number, the smallest first
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if length > room:
            raise ValueError(f"A text of {length} tokens does not fit into rows of {room}. Cut it, or wrap the texts.")
        if length == 0:
            continue
        place = bisect_left(spaces, (length, 0))
        if place < len(spaces):
            left, row = spaces.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append((number, 0, length))
        insort(spaces, (left - length, row))
    # In the order of the data, as far as the packing leaves it: a stream is not shuffled afterwards.
    return sorted(map(sorted, rows))


def _wrapped(lengths: Sequence[int], room: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    left = 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if left == 0:
                rows.append([])
                left = room
            end = min(length, start + left)
            rows[-1].append((number, start, end))
            left -= end - start
            start = end
    return rows
