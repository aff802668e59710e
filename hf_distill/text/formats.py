"""Rows of text as token ids and labels, by the format of their columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hf_distill.items import IGNORE_INDEX
from hf_distill.text.arguments import TextArguments
from hf_distill.text.beginnings import begun_once, last_tokens, own_beginning
from hf_distill.text.conversations import CHAT_COLUMNS, Conversation, message_prompt, supervised_turns

Tokens = tuple[list[int], list[int]]  # ids and labels
# Of what is made of a row: one more whenever the same row gives other tokens, which `datasets` has kept.
RULES = 1
# Of answers that `hf-distill generate` wrote: whether the teacher came to an end.
_FINISHED = "finished"
# Tokenizers leave it a token of its own, except before itself.
_LEAD = "\n"


class TextFormat(Enum):
    """How a data set holds its text."""

    TEXT = "text"
    COMPLETION = "prompt and completion"
    MESSAGES = "messages"

    def columns(self, text_field: str) -> tuple[str, ...]:
        """The columns that are read, those that need not be there included."""
        own = {
            TextFormat.TEXT: (text_field,),
            TextFormat.COMPLETION: ("prompt", "completion", _FINISHED, *CHAT_COLUMNS),
            TextFormat.MESSAGES: ("messages", *CHAT_COLUMNS),
        }
        return own[self]


def find_format(columns: Iterable[str], text_field: str = "text") -> TextFormat | None:
    """The format of a data set with these columns; None where it is tokenised already or holds no text.

    Args:
        columns: of the data set.
        text_field: the column of plain text. Others go before it, as they say more.
    """
    names = {*columns}
    if "input_ids" in names:
        return None
    if "messages" in names:
        return TextFormat.MESSAGES
    if {"prompt", "completion"} <= names:
        return TextFormat.COMPLETION
    return TextFormat.TEXT if text_field in names else None


@dataclass(frozen=True)
class RowTokenizer:
    """Makes ids and labels of a batch of rows, for `datasets.map(batched=True, with_indices=True)`.

    Plain text is tokenised as the tokenizer does it, with an end-of-sequence token behind it where there is one, and
    has a loss everywhere. A completion ends likewise, unless its row is not `finished`, and has the loss alone. Where
    the tokenizer begins a text with a token of its own, one that was written with it too has it once. Messages are put
    into the tokenizer's chat template, which writes all special tokens itself; the assistant's turns have the loss.
    Rows without any token are left out.

    Attributes:
        tokenizer: the student's.
        text_format: of the rows.
        text_field: the column of plain text.
        max_length: tokens kept of a row; None keeps all.
        keep_end: whether these are the last ones, behind the token that begins the text where it has one.
        completion_only: whether prompts have no loss.
        assistant_only: whether messages of others have none.
        kept: columns that stay as they are.
        rules: by which rows are made, for the cache of `datasets`, which looks at the attributes alone.
    """

    tokenizer: Any
    text_format: TextFormat
    text_field: str = "text"
    max_length: int | None = None
    keep_end: bool = False
    completion_only: bool = True
    assistant_only: bool = False
    kept: tuple[str, ...] = ()
    rules: int = field(default_factory=lambda: RULES, init=False)

    @classmethod
    def of_arguments(
        cls,
        args: TextArguments,
        tokenizer: Any,
        text_format: TextFormat,
        *,
        cuts: bool = True,
        kept: Iterable[str] = (),
    ) -> "RowTokenizer":
        """The one that the arguments ask for.

        Args:
            args: the settings.
            tokenizer: the student's.
            text_format: of the rows.
            cuts: whether rows are cut at `max_length`.
            kept: columns that stay.

        Raises:
            ValueError: a setting of another format.
        """
        # Of plain text all has a loss, as completion_only_loss=False says.
        only_completions = () if args.completion_only_loss is False else ("completion_only_loss",)
        unread = {
            TextFormat.TEXT: (*only_completions, "assistant_only_loss"),
            TextFormat.MESSAGES: ("completion_only_loss",),
        }
        for name in unread.get(text_format, ()):
            if (value := getattr(args, name)) is not None:
                raise ValueError(
                    f"{name}={value}, but the data set holds {text_format.value}, where nobody reads it. Drop it, or "
                    "give the columns prompt and completion, or messages."
                )
        only_assistant = args.assistant_only_loss
        return cls(
            tokenizer=tokenizer,
            text_format=text_format,
            text_field=args.dataset_text_field,
            max_length=args.max_length if cuts else None,
            keep_end=args.truncation_mode == "keep_end",
            completion_only=args.completion_only_loss is not False,
            assistant_only=text_format is TextFormat.MESSAGES if only_assistant is None else only_assistant,
            kept=tuple(kept),
        )

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The columns `input_ids` and `labels`, and those that are kept.

        Args:
            rows: columns of the batch.
            indices: the rows' numbers, for errors.

        Raises:
            ValueError: a row that is no text, a template that rewrites earlier turns, or none at all.
        """
        made = self._made(rows, indices)
        chosen = [number for number, (ids, _) in enumerate(made) if ids]
        columns = {name: [rows[name][number] for number in chosen] for name in self.kept}
        cut = [self._cut(*made[number]) for number in chosen]
        return {**columns, "input_ids": [ids for ids, _ in cut], "labels": [labels for _, labels in cut]}

    def _cut(self, ids: list[int], labels: list[int]) -> Tokens:
        if self.max_length is not None and self.keep_end:
            return last_tokens(ids, labels, self.max_length, beginning=self.tokenizer.bos_token_id)
        return ids[: self.max_length], labels[: self.max_length]

    def _made(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> list[Tokens]:
        if self.text_format is TextFormat.TEXT:
            texts, beginning = self._texts(rows, self.text_field, indices), own_beginning(self.tokenizer)
            made = zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True)
            whole = (self._ended(begun_once(ids, beginning)) if text else [] for text, ids in made)
            return [(ids, ids) for ids in whole]
        if self.text_format is TextFormat.MESSAGES:
            return [self._conversation(row, number) for row, number in _each(rows, indices)]
        if isinstance(rows["prompt"][0], str):
            return self._completions(rows, indices)
        return [self._chat_completion(row, number) for row, number in _each(rows, indices)]

    def _texts(self, rows: Mapping[str, Sequence[Any]], column: str, indices: Sequence[int]) -> list[str]:
        for value, number in zip(rows[column], indices, strict=True):
            if not isinstance(value, str):
                raise ValueError(
                    f"Row {number}: {column!r} holds {value!r}, expected a text. Fill it in, or drop the row "
                    "(Dataset.filter); messages belong into both prompt and completion, or into messages."
                )
        return [*rows[column]]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _completions(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> list[Tokens]:
        if self.assistant_only:
            raise ValueError(
                "assistant_only_loss=True, but prompts and completions are plain texts, which have no turns. Drop it, "
                "or give messages."
            )
        prompts, completions = (self._texts(rows, name, indices) for name in ("prompt", "completion"))
        whole = self.tokenizer(
            [p + c for p, c in zip(prompts, completions, strict=True)], return_special_tokens_mask=True, verbose=False
        )
        begun = self.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        beginning = own_beginning(self.tokenizer)
        ends = rows.get(_FINISHED, [True] * len(prompts))
        made = []
        for ids, special, prompt, completion, is_whole in zip(
            whole["input_ids"], whole["special_tokens_mask"], begun, completions, ends, strict=True
        ):
            start, end = _inside(special)
            hidden = start + len(prompt)
            # Where a token would reach over the border, the two are tokenised apart, as they are in a generation.
            if ids[start:hidden] != prompt:
                ids = ids[:start] + prompt + self._plain(completion) + ids[end:]
            if is_whole is not False:
                ids = self._ended(ids)
            if prompt:
                ids, twice = begun_once(ids, beginning), ids
                hidden -= len(twice) - len(ids)
            hidden = hidden if self.completion_only else 0
            made.append((ids, [IGNORE_INDEX] * hidden + ids[hidden:]))
        return made

    def _plain(self, text: str) -> list[int]:
        # Some tokenizers put a space before whatever begins a text, and this goes on with one.
        lead, whole = self.tokenizer([_LEAD, _LEAD + text], add_special_tokens=False, verbose=False)["input_ids"]
        if whole[: len(lead)] == lead:
            return whole[len(lead) :]
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _conversation(self, row: Mapping[str, Any], number: int) -> Tokens:
        conversation = Conversation.of_row(self.tokenizer, row["messages"], row, number)
        if not self.assistant_only:
            ids = conversation.tokens()
            return ids, ids
        return supervised_turns(conversation)

    def _chat_completion(self, row: Mapping[str, Any], number: int) -> Tokens:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], list):
                raise ValueError(f"Row {number}: {name!r} holds {row[name]!r}, expected a list of messages.")
        conversation = Conversation.of_row(self.tokenizer, row["prompt"] + row["completion"], row, number)
        ids = conversation.tokens()
        labels = supervised_turns(conversation)[1] if self.assistant_only else ids
        if not self.completion_only:
            return ids, labels
        ends = row.get(_FINISHED) is not False
        return ids, message_prompt(conversation, len(row["prompt"]), labels, ends=ends)


def _each(rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Iterable[tuple[dict[str, Any], int]]:
    """The rows of columns, with their numbers."""
    for place, number in enumerate(indices):
        yield {name: column[place] for name, column in rows.items()}, number


def _inside(special: list[int]) -> tuple[int, int]:
    """From where to where the tokens are of the text, between those that the tokenizer puts around it."""
    plain = [place for place, flag in enumerate(special) if not flag]
    return (plain[0], plain[-1] + 1) if plain else (len(special), len(special))
