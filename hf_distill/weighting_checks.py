"""What a data set must hold for the item weights asked for, looked up before the first step."""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_distill.dataset_checks import ROWS_LOOKED_AT, first_rows, is_indexed, random_states_kept
from hf_distill.phrase_index import PhraseIndex
from hf_distill.phrases import large_boost
from hf_distill.row_weights import row_text, truth_values, weights_in, without_weight
from hf_distill.weighting import (
    ColumnWeights,
    GroupWeights,
    ItemWeighting,
    PhraseWeights,
    TeacherWeights,
    follows,
    group_of,
    weighting_columns,
)

_ROWS_AT_ONCE = 10_000
_GROUPS_SHOWN = 10


def group_sizes(dataset: Any, column: str, *, name: str = "train_dataset") -> dict[str | None, int]:
    """How many rows of a data set each group has, by the group's name in order; last those without one, as None.

    Args:
        dataset: with its rows by number.
        column: of the groups.
        name: of the data set, for errors.

    Raises:
        ValueError: the column is missing, or the data set is a stream, whose rows are not counted for it.
    """
    if not is_indexed(dataset):
        raise ValueError(
            f"The groups of {column!r} are to be counted, but {name} is a stream ({type(dataset).__name__}). "
            f"Write the weights out, {{by: group, column: {column}, weights: ...}}, or load it as a whole."
        )
    _check_column(dataset, column, name)
    with random_states_kept():
        sizes = Counter(map(group_of, _values(dataset, column, len(dataset))))
    return dict(sorted(sizes.items(), key=lambda item: (item[0] is None, item[0])))


def find_groups(
    weights: Sequence[ItemWeighting], train_dataset: Any, eval_dataset: Any = None
) -> dict[str, dict[str, int]]:
    """For each column whose groups must be known: {group: rows of the training set}.

    Weights by size need the training set's groups; those that follow the loss the evaluation set's, which alone have
    one, and whose sizes stay 0 here unless they are counted for the former.

    Raises:
        ValueError: as `group_sizes`; a row of the training set has no group; or weights are to follow the loss, and
            there is no evaluation set.
    """
    found: dict[str, dict[str, int]] = {}
    for setting in weights:
        if not isinstance(setting, GroupWeights) or setting.weights:
            continue
        known = found.setdefault(setting.column, {})
        if setting.size_power is not None:
            sizes = group_sizes(train_dataset, setting.column)
            if None in sizes:
                _check_groups(train_dataset, setting)
            known |= {group: size for group, size in sizes.items() if group is not None}
        if follows(setting):
            if eval_dataset is None:
                raise ValueError(
                    f"The weights of {setting.column!r} are to follow the loss of each group, but there is no "
                    "eval_dataset to measure it on. Pass one, or write the weights out."
                )
            parts = {"eval_dataset": eval_dataset}
            if isinstance(eval_dataset, Mapping):
                parts = {f"eval_dataset[{key!r}]": part for key, part in eval_dataset.items()}
            groups = {g for name, part in parts.items() for g in group_sizes(part, setting.column, name=name)}
            known |= {group: 0 for group in groups if group is not None and group not in known}
    return found


def check_weights(weights: Sequence[ItemWeighting], dataset: Any, *, has_labels: bool | None = None) -> None:
    """Refuses a training set without what the weights are made of, and warns of weights that do nothing there.

    Columns of weights and of groups are read where that is cheap: in tables and lists all rows, but a thousand where
    tokens have weights of their own; in other data sets a thousand; in streams none.

    Args:
        weights: the settings.
        dataset: the training set.
        has_labels: whether some row has a label; None where that is not known.

    Raises:
        ValueError: with the column that is missing, or the row without a weight.
    """
    for column in sorted(weighting_columns(weights)):
        _check_column(dataset, column, "train_dataset")
    for setting in weights:
        if isinstance(setting, PhraseWeights):
            check_phrases(dataset, setting)
        elif isinstance(setting, ColumnWeights):
            _check_values(dataset, setting.column)
        elif isinstance(setting, GroupWeights) and setting.weights:
            _check_groups(dataset, setting)
        elif isinstance(setting, TeacherWeights) and setting.signal == "correctness" and has_labels is False:
            _warn(
                "signal='correctness' weighs by whether the teacher hits the label, and no label was found in "
                "train_dataset, so all items weigh 1. Add labels, or take signal='confidence'."
            )


def check_phrases(dataset: Any, setting: PhraseWeights) -> None:
    """Warns if none of the first rows, a thousand at most, holds a phrase; rows to be read but once are left alone."""
    boosts = setting.boosts()
    if large := large_boost(boosts):
        _warn(large)
    index = PhraseIndex(boosts, match_case=setting.match_case)
    column, looked_at = setting.text_column, 0
    with random_states_kept():
        for row in first_rows(dataset, (column,)):
            if isinstance(row, Mapping) and column in row:
                looked_at += 1
                if index.strongest(row_text(row[column], column)):
                    return
    if looked_at:
        of_all = "" if looked_at < ROWS_LOOKED_AT else "first "
        numbered = [phrase for phrase in boosts if re.search(r"[,;\s]\d+([.,]\d+)?$", phrase)] if setting.file else []
        hint = f" {numbered[0]!r} ends in a number: a boost stands behind a tab." if numbered else ""
        _warn(
            f"None of the {of_all}{looked_at} rows holds any of the phrases in {column!r}, so they may weigh nothing. "
            f"Look at text_column, the spelling (whole words, every form of its own), and match_case.{hint}"
        )


def _check_values(dataset: Any, column: str) -> None:
    """Refuses a row that has no weight."""
    with random_states_kept():
        for number, value in enumerate(_values(dataset, column, _cheap(dataset, column))):
            is_plain = isinstance(value, int | float) and 0 <= value < float("inf")
            if not is_plain and weights_in(value) is None:
                raise ValueError(f"{_row(number)}: {column!r} is {value!r}, but weights are finite numbers >= 0.")


def _check_groups(dataset: Any, setting: GroupWeights) -> None:
    """Refuses a row whose group has no weight, and warns of weights for groups that no row is of."""
    known = dict(setting.weights)
    looked_at = _cheap(dataset, setting.column)
    found: Counter[str | None] = Counter()
    with random_states_kept():
        for number, value in enumerate(_values(dataset, setting.column, looked_at)):
            group = group_of(value)
            if setting.default is None and group not in known and (group is None or setting.weights):
                raise ValueError(without_weight(setting, group, row=_row(number)))
            found[group] += 1
    unmatched = [repr(group) for group in known if group not in found]
    if found and unmatched and looked_at == len(dataset):
        shown = [f"{group!r} ({rows} rows)" for group, rows in found.most_common(_GROUPS_SHOWN) if group is not None]
        more = ", ..." if len(found) > _GROUPS_SHOWN else ""
        _warn(
            f"Weights are given for {', '.join(unmatched)}, but no row of train_dataset has such a "
            f"{setting.column!r}: it has {', '.join(shown)}{more}. Write groups as the column does."
            f"{truth_values(known)}"
        )


def _cheap(dataset: Any, column: str) -> int:
    """How many of the first rows to read a column of before a training."""
    if not is_indexed(dataset):
        return 0
    is_table = hasattr(dataset, "select_columns")
    if is_table and dataset.format["type"] == "custom":  # a transform may yet fill what is missing
        return 0
    with random_states_kept():
        first = next(_values(dataset, column, 1), None)
    is_list = hasattr(first, "__len__") and not isinstance(first, str)
    is_cheap = (is_table or isinstance(dataset, list | tuple)) and not is_list
    return len(dataset) if is_cheap else min(len(dataset), ROWS_LOOKED_AT)


def _values(dataset: Any, column: str, rows: int) -> Iterator[Any]:
    """A column's values in the first rows; None where a row lacks it."""
    rows = min(rows, len(dataset)) if rows else 0
    if hasattr(dataset, "select_columns"):
        # Decodes no image or sound, and by parts: a column of `datasets` itself is read row by row.
        plain = dataset.select_columns([column]).with_format(None)
        for start in range(0, rows, _ROWS_AT_ONCE):
            yield from plain[start : min(start + _ROWS_AT_ONCE, rows)][column]
        return
    for number in range(rows):
        row = dataset[number]
        yield row.get(column) if isinstance(row, Mapping) else row[column]


def _row(number: int) -> str:
    return f"Row {number} of train_dataset (the first is 0)"


def _warn(message: str) -> None:
    """Warns with the line of the user's that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _check_column(dataset: Any, column: str, name: str) -> None:
    names = getattr(dataset, "column_names", None)
    if names is None:
        with random_states_kept():
            first = next(iter(first_rows(dataset, (column,))), None)
        names = [*first] if isinstance(first, Mapping) else None
    if names is not None and column not in names:
        raise ValueError(
            f"Item weights read the column {column!r}, which {name} does not have (it has {', '.join(names)}). "
            "Keep the column when tokenizing (remove_columns), or name another."
        )
