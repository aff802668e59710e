"""The token that begins a text: written once, and kept where a text is cut at its start."""

from typing import Any

from hf_distill.items import IGNORE_INDEX


def own_beginning(tokenizer: Any) -> int | None:
    """The id of the beginning-of-text token that a tokenizer puts before a text by itself; None where it puts none."""
    beginning = tokenizer.bos_token_id
    return beginning if beginning is not None and tokenizer("")["input_ids"][:1] == [beginning] else None


def begun_once(ids: list[int], beginning: int | None) -> list[int]:
    """The ids without the second of two beginnings, as a text has them that was written with its own.

    Args:
        ids: of a text, with what the tokenizer puts before it.
        beginning: from `own_beginning`.
    """
    return ids[1:] if beginning is not None and ids[:2] == [beginning, beginning] else ids


def last_tokens(
    ids: list[int], labels: list[int], length: int, *, beginning: int | None
) -> tuple[list[int], list[int]]:
    """The ids and labels of the end of a text, behind its beginning where it has one.

    Args:
        ids: of the text.
        labels: likewise.
        length: how many are kept, at most.
        beginning: the tokenizer's beginning-of-text token, whoever put it there; None for none.
    """
    if len(ids) <= length:
        return ids, labels
    if length == 1 or ids[0] != beginning:
        return ids[-length:], labels[-length:]
    rest = len(ids) - length + 1
    # No text goes on from its beginning as this one does now, so nothing is to predict it. A label of the beginning
    # itself, which nothing predicts either, says that no prompt is left.
    first = IGNORE_INDEX if labels[rest] == IGNORE_INDEX else ids[0]
    return [ids[0], *ids[rest:]], [first, IGNORE_INDEX, *labels[rest + 1 :]]
