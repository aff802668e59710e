"""Which columns of a data set a language model can read, and which its user may have meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from transformers.utils import logging

from hf_distill.collator import LABEL_COLUMNS, TEACHER_PREFIX
from hf_distill.signals import Task
from hf_distill.text.formats import TextFormat, find_format
from hf_distill.text.preparation import columns_of

logger = logging.get_logger(__name__)

_TOKENS = {
    Task.CAUSAL_LM: "input_ids",
    Task.MASKED_LM: "input_ids (dataset.map(lambda rows: tokenizer(rows['text']), batched=True))",
    Task.SEQ2SEQ_LM: (
        "input_ids and labels (dataset.map(lambda rows: tokenizer(rows['source'], text_target=rows['target']), "
        "batched=True))"
    ),
}


def check_columns(
    dataset: Any, name: str, *, task: Task, inputs: Iterable[str], text_field: str, own_collator: bool
) -> None:
    """Refuses a data set without any column that a model reads, where `Trainer` would drop all it has.

    Args:
        dataset: a data set, or several by their names.
        name: of it, for the error.
        task: the student's.
        inputs: the arguments of its forward.
        text_field: the column of plain text.
        own_collator: whether the rows are tokenised by a collator of the user's own, if at all.

    Raises:
        ValueError: with the columns there are, and those that may have been meant.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_columns(
                part, f"{name}[{key!r}]", task=task, inputs=inputs, text_field=text_field, own_collator=own_collator
            )
        return
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], str):
        raise ValueError(f"The rows of {name} are texts. Write them as rows with a column: [{{{text_field!r}: ...}}].")
    reads_text = task is Task.CAUSAL_LM and not own_collator
    if not reads_text and getattr(dataset, "column_names", ()) is None:
        return  # of a stream nobody else looks at the first row, which may take long to read
    columns = columns_of(dataset)
    if not columns or (reads_text and find_format(columns, text_field) is not None):
        return
    if not {*inputs}.difference(LABEL_COLUMNS).isdisjoint(columns) or any(
        column.startswith(TEACHER_PREFIX) for column in columns
    ):
        return
    message = f"{name} has no column that the student reads (it has {', '.join(columns)}). "
    if own_collator:
        message += "If your data collator reads these, set remove_unused_columns=False. "
    if reads_text:
        message += (
            f"Read are input_ids, or raw text: the column dataset_text_field={text_field!r}, the columns prompt and "
            f"completion, or messages. {_meant(dataset, text_field)}"
        )
    else:
        message += f"Tokenise the rows first, into {_TOKENS[task]}."
    raise ValueError(message.strip())


def _meant(dataset: Any, text_field: str) -> str:
    row: Mapping[str, Any] = next(islice(iter(dataset), 1), {})
    texts = [column for column, value in row.items() if isinstance(value, str)]
    chats = [column for column, value in row.items() if isinstance(value, list) and value and _is_turn(value[0])]
    if chats:
        turn = row[chats[0]][0]
        keys = "" if "role" in turn else f", and the keys of its messages ({', '.join(turn)}) to role and content"
        return f"Did you mean messages? Rename the column: dataset.rename_column({chats[0]!r}, 'messages'){keys}."
    if "prompt" in row:
        return (
            "These are prompts alone: they need a column completion. `hf-distill generate` has the teacher write it; "
            "empty ones with lmbda=1, task_weight=0 leave it to the student; dataset_text_field='prompt' learns the "
            "prompts themselves."
        )
    close = get_close_matches(text_field, texts, n=1) or (texts if len(texts) == 1 else [])
    if close:
        return f"Did you mean dataset_text_field={close[0]!r}?"
    if len(texts) > 1:
        return (
            "Name the column with dataset_text_field; where one answers another, rename them "
            "(Dataset.rename_columns) to prompt and completion."
        )
    return ""


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"role", "from"} & {*value})


def say_which_columns(dataset: Any, name: str, text_format: TextFormat, text_field: str, kept: Iterable[str]) -> None:
    """Logs which columns of raw text are read where there are others, which say less.

    Args:
        dataset: one data set of raw text.
        name: of it.
        text_format: in which it is read.
        text_field: the column of plain text.
        kept: columns that something else reads.
    """
    read = text_format.columns(text_field)
    left = {*(columns_of(dataset) or ())} - {*read, *kept}
    ignored = [column for column in ("messages", "prompt", "completion", text_field) if column in left]
    if ignored:
        logger.warning(f"Of {name} the format {text_format.value} is read, and {', '.join(ignored)} is ignored.")
