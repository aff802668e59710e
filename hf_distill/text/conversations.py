"""One conversation in the tokenizer's chat template, and which of its tokens the assistant wrote."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError

from hf_distill.items import IGNORE_INDEX

# The columns of what a template is given beside the messages.
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
# As Transformers looks for it (utils/chat_template_utils.py, 5.23).
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "Give the tokenizer a chat template whose assistant turns stand between {% generation %} and {% endgeneration %}, "
    "split the conversations into prompt and completion, or set assistant_only_loss=False."
)


@dataclass(frozen=True)
class Conversation:
    """Messages with what the template is given beside them.

    Attributes:
        tokenizer: with a chat template.
        messages: at least one.
        tools: JSON schemas of functions, or None.
        options: further variables of the template.
        number: of the row, for errors.
    """

    tokenizer: Any
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0

    @classmethod
    def of_row(cls, tokenizer: Any, messages: Any, row: Mapping[str, Any], number: int) -> "Conversation":
        """The messages with what their row gives the template.

        Args:
            tokenizer: with a chat template.
            messages: of the row.
            row: whose `CHAT_COLUMNS` are read, where there are such.
            number: of the row.

        Raises:
            ValueError: these are no messages, or none.
        """
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(
                f"Row {number}: {messages!r} is no list of messages such as {{'role': ..., 'content': ...}}."
            )
        if not messages:
            raise ValueError(f"Row {number} has no message. Drop it (Dataset.filter).")
        for message in messages:
            _check_role(message, number)
        given = given_beside(row)
        return cls(
            tokenizer,
            [_present(message) for message in messages],
            tools=given.get("tools"),
            options=given.get("chat_template_kwargs", {}),
            number=number,
        )

    @property
    def marks_turns(self) -> bool:
        """Whether the template says which tokens the assistant wrote."""
        return _GENERATION.search(self.tokenizer.get_chat_template(tools=self.tools)) is not None

    def tokens(self, *, asks: bool = False) -> list[int]:
        """The ids of the whole conversation.

        Args:
            asks: whether the beginning of the assistant's next turn stands at the end.
        """
        asked = {"add_generation_prompt": True} if asks else {}
        return self._apply(self.messages, return_dict=True, **asked)["input_ids"]

    def marked(self) -> tuple[list[int], list[int]]:
        """The ids, and 1 for each that the template marks as the assistant's."""
        made = self._apply(self.messages, return_dict=True, return_assistant_tokens_mask=True)
        return made["input_ids"], made["assistant_masks"]

    def text(self, count: int, *, asks: bool = False) -> str:
        """The first messages as the template writes them.

        Args:
            count: how many.
            asks: whether the assistant is to answer: the beginning of its turn stands at the end. A last message of
                the assistant's own is left open in place of it.
        """
        if count == 0 and not asks:
            return ""
        is_open = asks and count > 0 and self.messages[count - 1].get("role") == "assistant"
        return self._apply(
            self.messages[:count],
            tokenize=False,
            add_generation_prompt=asks and not is_open,
            continue_final_message=is_open,
        )

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=self.tools, tokenizer_kwargs={"verbose": False}, **options, **self.options
            )
        except TemplateError as error:
            raise ValueError(f"Row {self.number}: the chat template refuses the messages: {error}") from error


def _check_role(message: Mapping[str, Any], number: int) -> None:
    # A template writes a key that is not there as nothing: the row would be empty turns.
    if message.get("role") is None:
        raise ValueError(
            f"Row {number}: a message has the keys {', '.join(map(str, message))}, and no role. Expected are role "
            "(system, user, assistant) and content: rename them (Dataset.map), as from and value of the ShareGPT "
            "format, where human is user and gpt is assistant."
        )


def given_beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the `CHAT_COLUMNS` of a row hold, read where it is JSON; a column that holds nothing is left out."""
    cells = {name: row.get(name) for name in CHAT_COLUMNS}
    read = {name: json.loads(cell) if cell and isinstance(cell, str) else cell for name, cell in cells.items()}
    return {name: value for name, cell in read.items() if (value := _present(cell))}


def check_template(tokenizer: Any) -> None:
    """Refuses a tokenizer that cannot put messages into text.

    Raises:
        ValueError: it has no chat template, or is not a fast one.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"The data set holds messages, but {_name(tokenizer)} has no chat template. Load the tokenizer of a chat "
            "model, set tokenizer.chat_template, or give the rows as plain text (column text, or prompt and "
            "completion)."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{_name(tokenizer)} is not a fast tokenizer, and only these tell which token stands where in the "
            "template's text. Load the tokenizer with AutoTokenizer.from_pretrained(...), use_fast=True."
        )


def _name(tokenizer: Any) -> str:
    return f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')!r}"


def supervised_turns(conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids and labels in which only what the assistant wrote has a label.

    The template says so by its generation blocks. One without them is rendered turn by turn: the assistant wrote what
    a turn adds behind the prompt for it, up to the last character that is no space.

    Raises:
        ValueError: a template without marks writes earlier turns otherwise once later ones are there, so that what a
            turn adds cannot be told.
    """
    if conversation.marks_turns:
        ids, mask = conversation.marked()
        return ids, [token if mine else IGNORE_INDEX for token, mine in zip(ids, mask, strict=True)]
    whole = conversation.text(len(conversation.messages))
    spans = [
        _span_of_turn(conversation, place, whole)
        for place, message in enumerate(conversation.messages)
        if message.get("role") == "assistant"
    ]
    return _labelled(conversation, whole, spans)


def message_prompt(conversation: Conversation, count: int, labels: list[int], *, ends: bool = True) -> list[int]:
    """The labels without those of the first `count` messages, and of the prompt for an answer to them.

    Raises:
        ValueError: the template writes the prompt otherwise once its completion is there.
    """
    whole = conversation.text(len(conversation.messages))
    prompt = conversation.text(count, asks=True) if count else ""
    if not whole.startswith(prompt):
        raise ValueError(
            f"Row {conversation.number}: the chat template writes the prompt otherwise once its completion is there: "
            f"{_where(prompt, whole)} Give the template's options in a column chat_template_kwargs, such as "
            "{'enable_thinking': False}, give another template, or set completion_only_loss=False."
        )
    end = len(whole.rstrip()) if ends else _end_of_content(conversation, whole)
    _, completed = _labelled(conversation, whole, [(len(prompt), end)])
    return [label if own != IGNORE_INDEX else IGNORE_INDEX for label, own in zip(labels, completed, strict=True)]


def _end_of_content(conversation: Conversation, whole: str) -> int:
    """Where the last message stops, before what the template closes its turn with."""
    content = conversation.messages[-1].get("content")
    content = content.strip() if isinstance(content, str) else ""
    place = whole.rfind(content)
    return place + len(content) if content and place >= 0 else 0


def _span_of_turn(conversation: Conversation, place: int, whole: str) -> tuple[int, int]:
    # Nothing asks for a turn that begins the conversation, or that goes on with the assistant's own.
    is_asked = place > 0 and conversation.messages[place - 1].get("role") != "assistant"
    before = conversation.text(place, asks=is_asked)
    after = conversation.text(place + 1)
    if not (whole.startswith(before) and after.startswith(before) and whole.startswith(after)):
        broken = before if not whole.startswith(before) else after
        raise ValueError(
            f"Row {conversation.number}: the chat template writes turn {place + 1} of {len(conversation.messages)} "
            f"otherwise once later ones are there (as templates do that strip earlier thinking): "
            f"{_where(broken, whole)} So what the assistant wrote cannot be told. {_REMEDY}"
        )
    return len(before), len(after.rstrip())


def _labelled(conversation: Conversation, whole: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Ids and labels: those of tokens that have a part in one of the spans of characters."""
    made = conversation.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = made["input_ids"]
    labels = [
        token if any(first < end and start < last for start, end in spans) else IGNORE_INDEX
        for token, (first, last) in zip(ids, made["offset_mapping"], strict=True)
    ]
    return ids, labels


def _present(value: Any) -> Any:
    """Without what is None: Arrow gives every struct of a column the keys of all; templates ask for them."""
    if isinstance(value, Mapping):
        return {name: _present(part) for name, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value


def _where(one: str, other: str) -> str:
    """Where a text departs from another."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, place - 20)
    return f"{one[start : place + 20]!r} becomes {other[start : place + 20]!r}."
