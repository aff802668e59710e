"""Scores over spans of tokens: named entities, and the answer of extractive question answering."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns (type, first, last) of each entity in one row of IOB2 tags.

    An `I-X` that follows no `B-X` or `I-X` opens an entity of its own, as in conlleval and seqeval's default mode.
    """
    spans = set()
    kind, first = "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if kind and (prefix != "I" or tag_kind != kind):
            spans.add((kind, first, position - 1))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, first = tag_kind, position
    return spans


def entity_precision_recall_f1(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Micro precision, recall and F1 over entities; an entity counts if its type and both of its ends are right.

    Args:
        predictions: rows of IOB2 tags.
        references: rows of IOB2 tags, as long as the predictions.
    """
    found = expected = right = 0
    for predicted_tags, reference_tags in zip(predictions, references, strict=True):
        predicted, wanted = entity_spans(predicted_tags), entity_spans(reference_tags)
        found, expected, right = found + len(predicted), expected + len(wanted), right + len(predicted & wanted)
    return {
        "entity_precision": right / found if found else 0.0,
        "entity_recall": right / expected if expected else 0.0,
        "entity_f1": 2 * right / (found + expected) if found + expected else 0.0,
    }


def best_span(
    start_logits: NDArray[np.floating], end_logits: NDArray[np.floating], *, max_tokens: int
) -> tuple[int, int]:
    """Returns the (first, last) token with the highest sum of logits among spans of at most `max_tokens`.

    Args:
        start_logits: (tokens,).
        end_logits: (tokens,).
        max_tokens: >= 1.
    """
    sums = start_logits[:, None] + end_logits[None, :]
    positions = np.arange(len(start_logits))
    tokens = positions[None, :] - positions[:, None] + 1
    valid = (tokens >= 1) & (tokens <= max_tokens)
    first, last = np.unravel_index(np.where(valid, sums, -np.inf).argmax(), sums.shape)
    return int(first), int(last)


def span_f1(predicted: tuple[int, int], wanted: tuple[int, int]) -> float:
    """F1 of the token positions of two (first, last) spans."""
    shared = max(0, min(predicted[1], wanted[1]) - max(predicted[0], wanted[0]) + 1)
    return 2 * shared / (predicted[1] - predicted[0] + 1 + wanted[1] - wanted[0] + 1)
