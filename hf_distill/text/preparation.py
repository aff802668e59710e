"""A data set of raw text, tokenised and packed."""

import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset, LargeList, List

from hf_distill.collator import TEACHER_PREFIX
from hf_distill.items import IGNORE_INDEX
from hf_distill.text.arguments import TextArguments
from hf_distill.text.conversations import check_template
from hf_distill.text.formats import RowTokenizer, TextFormat, find_format
from hf_distill.text.packing import Packing

_ROWS_AT_ONCE = 1000


def text_format(dataset: Any, text_field: str = "text") -> TextFormat | None:
    """The format of a data set of raw text; None of any other data set.

    Looked at are the data sets of `datasets`, and lists of rows; a data set with a transform of its own makes its own
    columns. Of several data sets by name it is that of the first which has one.

    Args:
        dataset: one data set, or several by their names.
        text_field: the column of plain text.
    """
    if isinstance(dataset, Mapping):
        formats = (text_format(part, text_field) for part in dataset.values())
        return next((found for found in formats if found is not None), None)
    columns = columns_of(dataset)
    return None if columns is None else find_format(columns, text_field)


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of a data set; None where they cannot be told, or are made as the rows are read."""
    if isinstance(dataset, list | tuple):
        return [*dataset[0]] if dataset and isinstance(dataset[0], Mapping) else None
    if isinstance(dataset, Dataset):
        return None if dataset.format["type"] == "custom" else dataset.column_names
    if isinstance(dataset, IterableDataset):
        if dataset.column_names is not None:
            return dataset.column_names
        return [*next(iter(dataset), {})]
    return None


def prepare_text(
    dataset: Any, tokenizer: Any, args: Any, *, training: bool = False, kept: Iterable[str] = (), name: str = "dataset"
) -> Any:
    """The data set with `input_ids` and `labels`, and with `position_ids` where it is packed.

    Tokenised rows are kept in the cache of `datasets`. Data sets that hold no raw text, or whose rows are tokenised
    already, are returned as they are.

    Args:
        dataset: a `Dataset`, an `IterableDataset`, a list of rows, or several of these by their names.
        tokenizer: the student's, or a processor that holds one.
        args: `TrainingArguments` that are `TextArguments` too.
        training: whether it is to be packed where the arguments say so.
        kept: columns that something else reads.
        name: of the data set, for errors.

    Raises:
        ValueError: no tokenizer, no chat template, or settings that the data set's format does not read.
    """
    if isinstance(dataset, Mapping):
        return {
            key: prepare_text(part, tokenizer, args, training=training, kept=kept, name=f"{name}[{key!r}]")
            for key, part in dataset.items()
        }
    found = text_format(dataset, args.dataset_text_field)
    if found is None:
        return dataset
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(tokenizer):
        given = "there is no tokenizer" if tokenizer is None else f"processing_class={tokenizer!r} is no tokenizer"
        raise ValueError(
            f"{name} holds raw text ({found.value}), but {given}. Pass the student's as "
            "processing_class=AutoTokenizer.from_pretrained(...), or tokenise the rows (columns input_ids and labels)."
        )
    if found is not TextFormat.TEXT and _holds_messages(dataset, found):
        check_template(tokenizer)
    if isinstance(dataset, list | tuple):
        dataset = Dataset.from_list([*dataset])
    with args.main_process_first(desc=f"tokenising {name}"):
        return _prepared(dataset.with_format(None), tokenizer, args, found, training=training, kept=kept, name=name)


def _prepared(
    dataset: Any,
    tokenizer: Any,
    args: TextArguments,
    found: TextFormat,
    *,
    training: bool,
    kept: Iterable[str],
    name: str,
) -> Any:
    if (found is TextFormat.TEXT or not _holds_messages(dataset, found)) and not _ends_texts(tokenizer):
        warnings.warn(
            "The tokenizer has no eos_token, so nothing is put behind the texts, and a student does not learn where "
            "to end. Name the token of its vocabulary that ends a text: tokenizer.eos_token = '</s>'.",
            stacklevel=2,
        )
    packs = training and args.packing
    wraps = packs and args.packing_strategy == "wrapped"
    columns = columns_of(dataset) or []
    stays = [column for column in columns if column in {*kept} or column.startswith(TEACHER_PREFIX)]
    rows = RowTokenizer.of_arguments(args, tokenizer, found, cuts=not wraps, kept=[] if packs else stays)
    described = {"desc": f"Tokenising {name}"} if isinstance(dataset, Dataset) else {}
    tokenised = dataset.map(
        rows, batched=True, with_indices=True, batch_size=_ROWS_AT_ONCE, remove_columns=columns, **described
    )
    if isinstance(tokenised, Dataset):
        _check_rows(tokenised, name, rows)
    if not packs:
        return tokenised
    assert args.max_length is not None  # checked with the arguments
    described = {"desc": f"Packing {name}"} if described else {}
    packing = Packing(args.max_length, wraps=wraps)
    return tokenised.map(packing, batched=True, batch_size=_ROWS_AT_ONCE, **described)


def _ends_texts(tokenizer: Any) -> bool:
    """Whether texts get an end: the token for it, or what the tokenizer itself puts behind them."""
    if tokenizer.eos_token_id is not None:
        return True
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[-1] in tokenizer.all_special_ids and ids[-1] != tokenizer.unk_token_id


def _holds_messages(dataset: Any, found: TextFormat) -> bool:
    if found is TextFormat.MESSAGES:
        return True
    first = next(islice(iter(dataset), 1), {"prompt": ""})
    return not isinstance(first["prompt"], str)


def _check_rows(dataset: Dataset, name: str, rows: RowTokenizer) -> None:
    """Warns of rows without a label, which stay in the batches and teach nothing.

    Raises:
        ValueError: no row is left, or none has a label.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: no row of it has a token.")
    without = sum(_rows_without_label(batch["labels"]) for batch in dataset.with_format("arrow").iter(10_000))
    if without == 0:
        return
    reason, remedy = _without_loss(rows)
    what = f"{without} of the {len(dataset)} rows of {name} have no token with a loss: {reason}. "
    if without == len(dataset):
        raise ValueError(f"{what}{remedy}")
    warnings.warn(f"{what}They count for nothing. {remedy}", stacklevel=2)


def _without_loss(rows: RowTokenizer) -> tuple[str, str]:
    """Why rows may come out without a loss, and what to do."""
    cuts = "" if rows.max_length is None else f" or were cut off at max_length={rows.max_length}"
    if rows.assistant_only:
        reason, remedy = "their messages of the role 'assistant' are missing, empty", "give them an answer"
    elif rows.text_format is TextFormat.COMPLETION and rows.completion_only:
        reason, remedy = "their completions are empty", "give them a completion"
    else:
        reason, remedy = "they have fewer than two tokens", "leave them out (Dataset.filter)"
    if not cuts:
        return reason, f"{remedy[0].upper()}{remedy[1:]}."
    return f"{reason}{cuts}", f"Raise max_length, set truncation_mode='keep_end', or {remedy}."


def check_tokenised(dataset: Any, name: str, *, needs_labels: bool) -> None:
    """Refuses rows of tokens that the user made and nothing can be learned from.

    They are read up to the first that has a loss.

    Args:
        dataset: any; looked at is a `Dataset` with lists in its column `input_ids`.
        name: of it, for the error.
        needs_labels: whether nothing else is learned from them, where they have labels, than what these point at.

    Raises:
        ValueError: rows of several texts, rows with another number of labels than of tokens, or not one label.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in (columns_of(dataset) or ()):
        return
    tokens = getattr(dataset.features["input_ids"], "feature", None)
    if isinstance(tokens, List | LargeList):
        raise ValueError(
            f"The rows of {name} hold several texts each: their input_ids are lists of lists. Map a function of "
            "batches with Dataset.map(..., batched=True)."
        )
    if tokens is None or not isinstance(dataset.features.get("labels"), List | LargeList):
        return
    seen = 0
    for batch in _arrow(dataset):
        lengths = [pc.list_value_length(batch[column]).to_numpy() for column in ("input_ids", "labels")]
        if (other := np.flatnonzero(lengths[0] != lengths[1])).size > 0:
            counts = [own[other[0]] for own in lengths]
            raise ValueError(
                f"Row {seen + other[0]} of {name} has {counts[0]} input_ids and {counts[1]} labels. Give each token a "
                "label: its own id, not the next one's (the shift is made later), or -100 for none."
            )
        if _rows_without_label(batch["labels"]) < len(batch):
            return
        seen += len(batch)
    if needs_labels and seen > 0:
        raise ValueError(
            f"None of the {seen} rows of {name} has a token with a loss: their labels are -100 throughout, which "
            "means 'not this position' for the teacher too. Give the tokens that count their own ids as labels, or "
            "leave the column out and set task_weight=0 to learn from the teacher at every token."
        )


def _rows_without_label(labels: Any) -> int:
    """How many rows of an Arrow column of labels have none after their first, which nothing predicts."""
    lengths = pc.list_value_length(labels).to_numpy()
    values = pc.list_flatten(labels).to_numpy() != IGNORE_INDEX
    ends = np.cumsum(lengths)
    values[ends - lengths] = False
    sums = np.concatenate([[0], np.cumsum(values)])
    return int((sums[ends] == sums[ends - lengths]).sum())


def longest_row(dataset: Any) -> int | None:
    """The tokens of the longest text; None where only reading all rows would tell.

    Args:
        dataset: as `prepare_text` returns it; of packed rows the texts count.
    """
    if not isinstance(dataset, Dataset):
        return None
    if "position_ids" in dataset.column_names:
        batches = (pc.max(pc.list_flatten(batch["position_ids"])) for batch in _arrow(dataset))
        return 1 + max(most.as_py() for most in batches)
    return max(pc.max(pc.list_value_length(batch["input_ids"])).as_py() for batch in _arrow(dataset))


def largest_token(dataset: Dataset) -> int:
    """The largest id in the rows.

    Args:
        dataset: as `prepare_text` returns it.
    """
    return max(pc.max(pc.list_flatten(batch["input_ids"])).as_py() for batch in _arrow(dataset))


def prompt_lengths(dataset: Dataset) -> np.ndarray:
    """(rows,) the tokens before the first that has a label; all of them where none has.

    Args:
        dataset: as `prepare_text` returns it, not packed.
    """
    found = []
    for batch in _arrow(dataset):
        lengths = pc.list_value_length(batch["labels"]).to_numpy()
        values = pc.list_flatten(batch["labels"]).to_numpy()
        starts = np.cumsum(lengths) - lengths
        places = np.where(values != IGNORE_INDEX, np.arange(len(values)), len(values))
        found.append(np.minimum(np.minimum.reduceat(places, starts) - starts, lengths))
    return np.concatenate(found)


def _arrow(dataset: Dataset) -> Any:
    return dataset.with_format("arrow").iter(10_000)
