"""The eight rows of the exactness benchmark, for each task: the same at any length but for their padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VOCABULARY, LABELS = 97, 3
REAL_LENGTHS = (10, 4, 9, 6, 3, 10, 7, 5)  # uneven, so that a mean of micro-batch means differs from the mean
LENGTH, PADDED_LENGTH = 10, 16
IGNORED = -100

Row = dict[str, Tensor]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows of one length, stacked."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + index)


def _pad(values: Tensor, length: int, fill: float) -> Tensor:
    """`values` (real length, ...) with `fill` appended up to `length` on the first axis."""
    padding = values.new_full((length - values.shape[0], *values.shape[1:]), fill)
    return torch.cat([values, padding])


def _tokens(index: int, length: int) -> tuple[Row, Tensor, torch.Generator]:
    """Padded input_ids (length,) and attention_mask (length,), the unpadded ids, and the row's generator."""
    generator = _generator(index)
    ids = torch.randint(3, VOCABULARY, (REAL_LENGTHS[index],), generator=generator)
    row = {"input_ids": _pad(ids, length, 1), "attention_mask": _pad(torch.ones_like(ids), length, 0)}
    return row, ids, generator


def _sequence_row(index: int, length: int) -> Row:
    row, _, generator = _tokens(index, length)
    return row | {"labels": torch.randint(0, LABELS, (), generator=generator)}


def _token_row(index: int, length: int) -> Row:
    row, ids, generator = _tokens(index, length)
    labels = torch.randint(0, LABELS, ids.shape, generator=generator)
    return row | {"labels": _pad(labels, length, IGNORED)}


def _masked_row(index: int, length: int) -> Row:
    row, ids, generator = _tokens(index, length)
    hidden = torch.rand(ids.shape, generator=generator) < 0.3
    hidden[0] = True
    return row | {"labels": _pad(ids.masked_fill(~hidden, IGNORED), length, IGNORED)}


def _causal_row(index: int, length: int) -> Row:
    row, ids, _ = _tokens(index, length)
    return row | {"labels": _pad(ids, length, IGNORED)}


def _target(index: int, length: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(3, VOCABULARY, (1 + REAL_LENGTHS[index] // 2,), generator=generator)
    return _pad(labels, length, IGNORED)


def _translation_row(index: int, length: int) -> Row:
    row, _, generator = _tokens(index, length)
    return row | {"labels": _target(index, length, generator)}


def _image_row(index: int, length: int) -> Row:
    generator = _generator(index)
    pixels = torch.randn(3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, LABELS, (), generator=generator)}


def _waveform(index: int, length: int) -> tuple[Row, torch.Generator]:
    """Sixteen samples make one frame, plus what the first frames need."""
    generator = _generator(index)
    samples = torch.randn(160 + 16 * REAL_LENGTHS[index], generator=generator)
    total = 160 + 16 * length
    row = {
        "input_values": _pad(samples, total, 0),
        "attention_mask": _pad(torch.ones(samples.shape, dtype=torch.long), total, 0),
    }
    return row, generator


def _waveform_class_row(index: int, length: int) -> Row:
    row, generator = _waveform(index, length)
    return row | {"labels": torch.randint(0, LABELS, (), generator=generator)}


def _waveform_text_row(index: int, length: int) -> Row:
    row, generator = _waveform(index, length)
    return row | {"labels": _target(index, length, generator)}


def _speech_row(index: int, length: int) -> Row:
    generator = _generator(index)
    features = torch.randn(8, 32, generator=generator)  # a window of fixed size: only the transcript is padded
    return {"input_features": features, "labels": _target(index, length, generator)}


ROWS: dict[str, Callable[[int, int], Row]] = {
    "sequence": _sequence_row,
    "token": _token_row,
    "masked_lm": _masked_row,
    "causal_lm": _causal_row,
    "translation": _translation_row,
    "image": _image_row,
    "audio": _waveform_class_row,
    "ctc": _waveform_text_row,
    "speech": _speech_row,
}
