"""The prompts a teacher answers: read from a file, a folder, the Hub or memory, each once, none too long."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Json, concatenate_datasets

from hf_distill.sources import load_rows
from hf_distill.text.conversations import CHAT_COLUMNS, given_beside

# A text, or a conversation: messages of {"role": ..., "content": ...}.
Prompt = str | list[dict[str, Any]]

COLUMNS = ("prompt", "messages", "text")
_ROWS_AT_A_TIME = 1000
_ROWS_NAMED = 5


@dataclass(frozen=True)
class Question:
    """A prompt with what its row gives the chat template.

    Attributes:
        prompt: a text or a conversation.
        beside: the row's `tools` and `chat_template_kwargs`, as they stand there; nothing beside a text.
        number: of the row, for errors.
    """

    prompt: Prompt
    beside: Mapping[str, Any]
    number: int

    @property
    def digest(self) -> bytes:
        """A hash of all that the teacher is asked."""
        given = given_beside(self.beside)
        asked = [self.prompt, given] if given else self.prompt
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).digest()


@dataclass(frozen=True)
class Prompts:
    """Prompts to answer, in the order of their rows.

    Attributes:
        rows: data set of the rows whose prompts are answered.
        column: their column.
        fingerprint: hash of all of them, in order.
        counts: how many rows there were, and how many were left out for which reason.
    """

    rows: Dataset
    column: str
    fingerprint: str
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> list[Question]:
        """The prompts from `start` to before `stop`."""
        return [question for question in _questions(self.rows, self.column, start, stop) if question is not None]


def read_prompts(
    source: str | os.PathLike | Sequence[Prompt] | Dataset, *, split: str, dataset_config: str | None
) -> Dataset:
    """The data set that holds the prompts.

    Args:
        source: a file (txt, csv, json, jsonl, parquet), a folder, a name on the Hub, a data set, or the prompts.
        split: of a source that has splits; `train[:1000]` takes a part.
        dataset_config: name of the configuration, for a source with several.

    Raises:
        ValueError: the source has no such split.
    """
    if isinstance(source, Dataset):
        return source
    if not isinstance(source, str | os.PathLike):
        return Dataset.from_dict({"prompt": list(source)})
    return load_rows(source, split, dataset_config)


def with_template_kwargs(rows: Dataset, given: Mapping[str, Any]) -> Dataset:
    """The rows with variables for the chat template in a column, as those who read the answers need them too.

    Args:
        rows: the data set.
        given: the variables; a row's own go before them.
    """
    if not given:
        return rows
    name = "chat_template_kwargs"
    has_own = name in rows.column_names
    own = (given_beside({name: cell}).get(name, {}) for cell in (rows[name] if has_own else [None] * len(rows)))
    column = Dataset.from_dict({name: [{**given, **each} for each in own]}, features=Features({name: Json()}))
    return concatenate_datasets([rows.remove_columns(name) if has_own else rows, column], axis=1)


def as_prompt(value: Any) -> Prompt | None:
    """The prompt in a cell: a text, or a conversation without its last answer; None where there is nothing to answer.

    Raises:
        TypeError: the cell holds neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        turns = value[:-1] if value and value[-1]["role"] == "assistant" else value
        return turns or None
    raise TypeError(f"{value!r:.80} is neither a text nor a list of messages with a role")


def choose_prompts(
    rows: Dataset,
    column: str | None,
    *,
    encode: Callable[[list[Question]], list[list[int]]],
    max_tokens: int | None,
    skip_long_prompts: bool,
) -> Prompts:
    """The prompts to answer: what is empty or came before is left out, and counted.

    Args:
        rows: the data set.
        column: of the prompts; None for the first there is of `prompt`, `messages` and `text`.
        encode: gives the tokens of prompts.
        max_tokens: length of a prompt at most; None for any.
        skip_long_prompts: leave out longer ones.

    Raises:
        ValueError: no such column, no prompts, or one that is too long.
        TypeError: a cell that holds no prompt.
    """
    column = _column(rows, column)
    kept: list[int] = []
    too_long: list[tuple[int, int]] = []
    whole = hashlib.sha256()
    counts = {"rows": len(rows), "empty": 0, "repeated": 0, "too_long": 0, "prompts": 0, "prompt_tokens": 0}
    for found in _once(rows, column, counts):
        lengths = [len(ids) for ids in encode(found)]
        for question, length in zip(found, lengths, strict=True):
            if length == 0:
                counts["empty"] += 1
            elif max_tokens is not None and length > max_tokens:
                too_long.append((question.number, length))
            else:
                kept.append(question.number)
                whole.update(question.digest)
                counts["prompt_tokens"] += length
    if too_long and not skip_long_prompts:
        named = ", ".join(f"row {row} ({length} tokens)" for row, length in too_long[:_ROWS_NAMED])
        raise ValueError(
            f"Prompts have more than the {max_tokens} tokens that leave room for an answer in the teacher's window: "
            f"{named}{f' and {len(too_long) - _ROWS_NAMED} more' if len(too_long) > _ROWS_NAMED else ''}. Shorten "
            "them, lower max_new_tokens, or leave them out with skip_long_prompts."
        )
    if not kept:
        raise ValueError(
            f"There is nothing to answer: of {len(rows)} rows, {counts['empty']} have an empty {column!r} and "
            f"{len(too_long)} are too long for the teacher."
        )
    counts |= {"too_long": len(too_long), "prompts": len(kept)}
    return Prompts(rows.select(kept), column, whole.hexdigest()[:16], counts)


def _once(rows: Dataset, column: str, counts: dict[str, int]) -> Iterator[list[Question]]:
    """Each prompt's first row, some at a time; counts the rows that are left out."""
    seen: set[bytes] = set()
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        found: list[Question] = []
        for question in _questions(rows, column, start, start + _ROWS_AT_A_TIME):
            if question is None:
                counts["empty"] += 1
            elif (digest := question.digest) in seen:
                counts["repeated"] += 1
            else:
                seen.add(digest)
                found.append(question)
        if found:
            yield found


def _questions(rows: Dataset, column: str, start: int, stop: int) -> Iterator[Question | None]:
    """What the rows from `start` to before `stop` ask; None for one that asks nothing."""
    columns = rows[start:stop]
    beside = [name for name in CHAT_COLUMNS if name in columns]
    for place, value in enumerate(columns[column]):
        try:
            prompt = as_prompt(value)
        except TypeError as error:
            raise TypeError(
                f"Row {start + place} of the prompts: {error}. Choose another column than {column!r}."
            ) from None
        if prompt is None:
            yield None
        else:
            given = {} if isinstance(prompt, str) else {name: columns[name][place] for name in beside}
            yield Question(prompt, given, start + place)


def _column(rows: Dataset, column: str | None) -> str:
    found = next((name for name in (COLUMNS if column is None else (column,)) if name in rows.column_names), None)
    if found is None:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise ValueError(
            f"The prompts have {wanted}; there are: {', '.join(rows.column_names)}. Choose one with column= "
            "(--column)."
        )
    return found
