"""The weights of a batch's items, made of columns of its rows that no model reads."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.items import IGNORE_INDEX
from hf_distill.phrase_index import PhraseIndex
from hf_distill.phrases import token_weights
from hf_distill.signals import Task
from hf_distill.weighting import (
    ITEM_GROUP,
    ITEM_WEIGHT,
    ColumnWeights,
    GroupWeights,
    ItemWeighting,
    PhraseWeights,
    follows,
    group_of,
    weighting_columns,
)

Row = Mapping[str, Any]
# Columns that are the student's own, though weights may be made of them too.
_INPUT_COLUMNS = frozenset({"input_ids", "label", "labels", "label_ids"})


class RowWeights:
    """Makes `ITEM_WEIGHT` and `ITEM_GROUP` of a batch; several weights multiply.

    Weights are (batch,) float32 where all are by row, else (batch, length of input_ids) or, in encoder-decoder models,
    (batch, length of labels), with 1 beside a row's own tokens. Packed rows, (1, length), get theirs one after
    another. What changes between evaluations is left to the device: it gets each row's group.

    Args:
        weights: the settings.
        task: what the student's head predicts. Where its items are rows, and for CTC, phrases weigh a whole row.
        tokenizer: the student's; a fast one where phrases weigh tokens.
        group_sizes: column -> {group: rows of the training set}, for weights by size or loss.
        kept: columns that something else reads too, and that stay in the rows.

    Raises:
        ValueError: a file of phrases cannot be read.
    """

    def __init__(
        self,
        weights: Sequence[ItemWeighting],
        *,
        task: Task,
        tokenizer: Any | None = None,
        group_sizes: Mapping[str, Mapping[str, int]] | None = None,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        self._weights = tuple(weights)
        self._taken = weighting_columns(self._weights) - _INPUT_COLUMNS - kept
        self._texts = {setting.text_column for setting in self._weights if isinstance(setting, PhraseWeights)}
        self._by_token = not task.one_item_per_row and task is not Task.CTC
        self._ids = "labels" if task is Task.SEQ2SEQ_LM else "input_ids"
        self._task = task
        self._evaluates = False
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        sizes = group_sizes or {}
        self._phrases = {
            setting: PhraseIndex(setting.boosts(), match_case=setting.match_case)
            for setting in self._weights
            if isinstance(setting, PhraseWeights)
        }
        self._groups = {
            setting: setting.factors(sizes.get(setting.column, {}))
            for setting in self._weights
            if isinstance(setting, GroupWeights)
        }

    def for_evaluation(self) -> "RowWeights":
        """The same, with groups alone: an evaluation weighs nothing, but tells groups apart where it knows them."""
        other = copy.copy(self)
        other._evaluates = True
        other._weights = tuple(filter(follows, self._weights))
        return other

    def without_columns(self, rows: Sequence[Row]) -> list[Row]:
        """The rows without what only the weights read."""
        # A collator that is to tokenize a text needs it.
        taken = self._taken if self._ids in rows[0] else self._taken - self._texts
        return [{name: value for name, value in row.items() if name not in taken} for row in rows]

    def __call__(self, rows: Sequence[Row], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The entries to add to the batch that a collator made of the rows.

        Raises:
            ValueError: a column is missing, a weight is no finite number >= 0, a group is not known, ids are not those
                of the text, or tokens have weights of their own where no item is a token.
        """
        made: dict[str, Tensor] = {}
        fixed = [self._of(setting, rows, batch) for setting in self._weights if not follows(setting)]
        if fixed:
            weights = [np.prod(np.broadcast_arrays(*parts), axis=0) for parts in zip(*fixed, strict=True)]
            made[ITEM_WEIGHT] = torch.from_numpy(self._laid_out(weights, rows, batch, beside=1.0)).float()
        for setting in filter(follows, self._weights):
            assert isinstance(setting, GroupWeights)
            if self._evaluates and setting.column not in rows[0]:
                continue
            order: dict[str | None, int] = {group: place for place, group in enumerate(self._groups[setting])}
            groups = [np.asarray(order.get(group_of(value), len(order))) for value in _column(rows, setting.column)]
            made[ITEM_GROUP] = torch.from_numpy(self._laid_out(groups, rows, batch, beside=len(order))).long()
        return made

    def _of(self, setting: ItemWeighting, rows: Sequence[Row], batch: Mapping[str, Any]) -> list[np.ndarray]:
        """For each row a number, or one for each of its tokens."""
        if isinstance(setting, GroupWeights):
            return [np.asarray(self._factor(setting, group_of(value))) for value in _column(rows, setting.column)]
        if isinstance(setting, ColumnWeights):
            return [self._checked(value, setting.column) for value in _column(rows, setting.column)]
        assert isinstance(setting, PhraseWeights)
        texts, phrases = _column(rows, setting.text_column), self._phrases[setting]
        if self._by_token:
            ids, columns = self._row_ids(rows, batch), (self._ids, setting.text_column)
            return [np.asarray(w) for w in token_weights(ids, texts, self._tokenizer, phrases, columns=columns)]
        return [np.asarray(1.0 + phrases.strongest(row_text(value, setting.text_column))) for value in texts]

    def _factor(self, setting: GroupWeights, group: str | None) -> float:
        known = self._groups[setting]
        if group in known:
            return known[group]
        if setting.size_power is not None and group is not None:  # of an evaluation set
            return 1.0
        if setting.default is None:
            raise ValueError(without_weight(setting, group, row="A row"))
        return setting.default

    def _checked(self, value: Any, column: str) -> np.ndarray:
        weights = weights_in(value)
        if weights is None:
            raise ValueError(f"Column {column!r} holds {value!r}, but weights are finite numbers >= 0.")
        if weights.ndim > 1 or (weights.ndim == 1 and not self._by_token):
            raise ValueError(
                f"Column {column!r} holds an array of shape {weights.shape}, but the items of {self._task} take "
                f"{'one weight per token or row' if self._by_token else 'one weight per row'}. Make it a "
                f"{'list of numbers' if self._by_token else 'number, such as the mean of the list'}."
            )
        return weights

    def _row_ids(self, rows: Sequence[Row], batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Each row's own ids; those in the batch where its collator made them."""
        if self._ids not in batch:
            raise ValueError(f"Weights of tokens need {self._ids} in the batch, which holds {', '.join(batch)}.")
        if self._ids not in rows[0]:
            return [*batch[self._ids].numpy()]
        return [np.asarray(value) for value in _column(rows, self._ids)]

    def _laid_out(
        self, values: Sequence[np.ndarray], rows: Sequence[Row], batch: Mapping[str, Any], *, beside: float
    ) -> np.ndarray:
        """(batch,) where each value is one number, else (batch, length), `beside` where a row has no token."""
        ids = batch.get(self._ids) if self._by_token else None
        is_packed = ids is not None and len(ids) == 1 < len(rows)
        if not is_packed and all(value.ndim == 0 for value in values):
            return np.asarray(values)
        own = self._row_ids(rows, batch)
        for value, tokens in zip(values, own, strict=True):
            if value.ndim and len(value) != len(tokens):
                raise ValueError(
                    f"A row has {len(value)} weights for {len(tokens)} {self._ids}. Give each of them one, special "
                    "tokens too, and cut both in the same way."
                )
        full = [np.broadcast_to(value, tokens.shape) for value, tokens in zip(values, own, strict=True)]
        if is_packed:
            laid = np.concatenate(full)[None]
            assert ids is not None
            if laid.shape != tuple(ids.shape):
                raise ValueError(
                    f"Rows of {laid.size} {self._ids} were packed into {ids.shape[-1]}: theirs must be all."
                )
            return laid
        return self._beside_tokens(full, own, batch, beside)

    def _beside_tokens(
        self, values: Sequence[np.ndarray], own: Sequence[np.ndarray], batch: Mapping[str, Any], beside: float
    ) -> np.ndarray:
        ids = batch[self._ids].numpy()
        mask = batch.get("attention_mask") if self._ids == "input_ids" else None
        real = ids != IGNORE_INDEX if mask is None or mask.shape != ids.shape else mask.numpy() > 0
        from_right = getattr(self._tokenizer, "padding_side", "right") == "left"
        laid = np.full(ids.shape, beside)
        for row, (value, tokens) in enumerate(zip(values, own, strict=True)):
            shift = _shift(tokens, ids[row], real[row], from_right=from_right)
            if shift is None:
                raise ValueError(
                    f"The collator made {ids.shape[-1]} {self._ids} of a row's {len(tokens)}, and which of them are "
                    "left cannot be told. Cut the rows before, and their weights with them."
                )
            first, last = max(0, -shift), min(len(tokens), ids.shape[-1] - shift)
            laid[row, first + shift : last + shift] = value[first:last]
        return laid


def _shift(own: np.ndarray, ids: np.ndarray, real: np.ndarray, *, from_right: bool) -> int | None:
    """How far a collator moved a row's tokens by padding; None where it cut them, nobody knows how.

    Tokens may have been replaced, as masked ones are; so the place is the one with most real tokens. A collator that
    drops a first token, which the decoder starts with anyway, leaves two such, and the tokens themselves then tell.
    """
    spare = len(ids) - len(own)
    best, chosen = (-1, -1), None
    for shift in (spare, 0, -1) if from_right else (0, spare, -1):
        first, last = max(0, -shift), min(len(own), len(ids) - shift)
        if last < first:
            continue
        same = int((own[first:last] == ids[first + shift : last + shift]).sum())
        is_cut = last - first < len(own)
        found = (int(real[first + shift : last + shift].sum()), same)
        if found > best and not (is_cut and same < last - first):
            best, chosen = found, shift
    return chosen


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    for row in rows:
        if name not in row:
            raise ValueError(
                f"A row has no column {name!r}, of which item weights are made (it has {', '.join(row)}). Keep it in "
                "the data set, or name another."
            )
    return [row[name] for row in rows]


def weights_in(value: Any) -> np.ndarray | None:
    """A row's weight, or those of its tokens, in float64; None where some is no finite number >= 0."""
    try:
        weights = np.asarray(np.nan if value is None else value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return weights if (np.isfinite(weights) & (weights >= 0)).all() else None


def without_weight(setting: GroupWeights, group: str | None, *, row: str) -> str:
    """What to say of a row whose group has no weight, nor a default."""
    if group is None:
        default = "" if setting.size_power is not None else " or give the weights a default,"
        return f"{row} has no {setting.column!r}, by which rows are weighed. Fill it in,{default} or drop the row."
    known = [value for value, _ in setting.weights]
    return (
        f"{row} is of the {setting.column!r} group {group!r}, and weights are given for {', '.join(known)} alone. Add "
        f"its weight, or a default.{truth_values(known)}"
    )


def truth_values(groups: Collection[str]) -> str:
    """What to say beside groups that YAML may have made of words."""
    is_likely = not {"True", "False"}.isdisjoint(groups)
    return " YAML reads an unquoted no, off, yes or on as a truth value." if is_likely else ""


def row_text(value: Any, column: str) -> str:
    """A row's text; of several, such as words or choices, all."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return "\n".join(row_text(part, column) for part in value)
    raise ValueError(f"Column {column!r} holds {value!r}; expected a text, or several.")
