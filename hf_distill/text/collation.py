"""Batches of tokenised text: padded rows, rows of several texts, or one row of all."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from hf_distill.items import IGNORE_INDEX, ROW_LENGTHS
from hf_distill.text.arguments import TextArguments

Row = Mapping[str, Any]


def make_collator(args: TextArguments, tokenizer: Any, *, training: bool, counts_rows: bool = False) -> Any:
    """The collator for the rows that the arguments ask for.

    Args:
        args: the settings.
        tokenizer: the student's.
        training: whether the batches are for training; others are of padded rows.
        counts_rows: whether a flattened batch tells how long its rows are.
    """
    if training and args.padding_free:
        return FlatteningCollator(counts_rows=counts_rows)
    if training and args.packing:
        return PackedCollator(_pad_id(tokenizer), pad_to_multiple_of=args.pad_to_multiple_of)
    tokenizer = copy.deepcopy(tokenizer)
    # On the left it would be what predicts a text's first token, and move the places in a table of positions.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        # Any token will do: the attention mask and the labels say which ones are padding.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_pad_id(tokenizer))
    return DataCollatorForSeq2Seq(
        tokenizer, label_pad_token_id=IGNORE_INDEX, pad_to_multiple_of=args.pad_to_multiple_of
    )


def _pad_id(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


class PackedCollator:
    """Stacks packed rows, without an attention mask: models tell the texts of a row by its `position_ids`.

    What fills a row up stands behind its last text, where causal attention lets nothing see it. All of it has position
    1: no table of positions is too short for that, and no text begins there.

    Args:
        pad_id: the token that fills rows up.
        pad_to_multiple_of: of the length of the batch.
    """

    def __init__(self, pad_id: int, *, pad_to_multiple_of: int | None = None) -> None:
        self.pad_id = pad_id
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch: `input_ids`, `labels` and `position_ids`, (rows, length) int64 each."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            positions = [*row["position_ids"]]
            missing = length - len(positions)
            batch["input_ids"].append([*row["input_ids"], *[self.pad_id] * missing])
            batch["labels"].append([*row["labels"], *[IGNORE_INDEX] * missing])
            batch["position_ids"].append([*positions, *[1] * missing])
        return {name: torch.tensor(values) for name, values in batch.items()}


class FlatteningCollator(DataCollatorWithFlattening):
    """Transformers' padding-free batches, of packed rows too: one row of all texts, without an attention mask.

    Args:
        counts_rows: whether a batch has the lengths of its rows as `ROW_LENGTHS`, by which rows that were repeated to
            fill the last batch are told.
    """

    def __init__(self, *, counts_rows: bool = False) -> None:
        super().__init__()
        self.counts_rows = counts_rows

    def __call__(
        self, features: Sequence[Row], return_tensors: Any = None, separator_id: Any = None
    ) -> dict[str, Any]:
        """The batch: `input_ids`, `labels` and `position_ids`, (1, tokens) int64 each."""
        pieces = [piece for row in features for piece in _pieces(row)]
        batch = super().__call__(pieces, return_tensors, separator_id)
        if self.counts_rows:
            batch[ROW_LENGTHS] = [len(row["input_ids"]) for row in features]
        return batch


def _pieces(row: Row) -> list[dict[str, list[int]]]:
    """The texts of a row."""
    columns = {name: [*row[name]] for name in ("input_ids", "labels")}
    positions = [*row.get("position_ids", range(len(columns["input_ids"])))]
    starts = [place for place, position in enumerate(positions) if position == 0]
    ends = [*starts[1:], len(positions)]
    return [
        {name: values[start:end] for name, values in columns.items()} for start, end in zip(starts, ends, strict=True)
    ]
