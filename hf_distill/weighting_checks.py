"""What a data set must hold for the item weights asked for, looked up before the first step."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_distill.dataset_checks import ROWS_LOOKED_AT, first_rows, is_indexed, random_states_kept
from hf_distill.phrase_index import PhraseIndex
from hf_distill.row_weights import row_text
from hf_distill.weighting import GroupWeights, ItemWeighting, PhraseWeights, follows, group_of, weighting_columns


def group_sizes(dataset: Any, column: str) -> dict[str, int]:
    """How many rows of a data set each group has, by the group's name in order.

    Raises:
        ValueError: the column is missing, or the data set is a stream, whose rows are not counted for it.
    """
    if not is_indexed(dataset):
        raise ValueError(
            f"The groups of {column!r} are to be counted, but the data set is a stream ({type(dataset).__name__}). "
            f"Write the weights out, {{by: group, column: {column}, weights: ...}}, or load it as a whole."
        )
    _check_column(dataset, column)
    with random_states_kept():
        if hasattr(dataset, "select_columns"):
            values = dataset.select_columns([column]).with_format(None)[column]
        else:
            values = [dataset[i][column] for i in range(len(dataset))]
        return dict(sorted(Counter(map(group_of, values)).items()))


def find_groups(
    weights: Sequence[ItemWeighting], train_dataset: Any, eval_dataset: Any = None
) -> dict[str, dict[str, int]]:
    """For each column whose groups must be known: {group: rows of the training set}.

    Weights by size need the training set's groups; those that follow the loss the evaluation set's, which alone have
    one, and whose sizes stay 0 here unless they are counted for the former.

    Raises:
        ValueError: as `group_sizes`; or weights are to follow the loss, and there is no evaluation set.
    """
    found: dict[str, dict[str, int]] = {}
    for setting in weights:
        if not isinstance(setting, GroupWeights) or setting.weights:
            continue
        known = found.setdefault(setting.column, {})
        if setting.size_power is not None:
            known |= group_sizes(train_dataset, setting.column)
        if follows(setting):
            if eval_dataset is None:
                raise ValueError(
                    f"The weights of {setting.column!r} are to follow the loss of each group, but there is no "
                    "eval_dataset to measure it on. Pass one, or write the weights out."
                )
            parts = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
            groups = {group for part in parts for group in group_sizes(part, setting.column)}
            known |= dict.fromkeys(groups - {*known}, 0)
    return found


def check_weights(weights: Sequence[ItemWeighting], dataset: Any) -> None:
    """Refuses a data set without the columns of the weights, and warns once if no phrase stands in its first rows.

    Raises:
        ValueError: with the column that is missing.
    """
    for column in sorted(weighting_columns(weights)):
        _check_column(dataset, column)
    for setting in weights:
        if isinstance(setting, PhraseWeights):
            check_phrases(dataset, setting)


def check_phrases(dataset: Any, setting: PhraseWeights) -> None:
    """Warns if none of the first rows, a thousand at most, holds a phrase; rows to be read but once are left alone."""
    index = PhraseIndex(setting.boosts(), match_case=setting.match_case)
    column, looked_at = setting.text_column, 0
    with random_states_kept():
        for row in first_rows(dataset, (column,)):
            if isinstance(row, Mapping) and column in row:
                looked_at += 1
                if index.strongest(row_text(row[column], column)):
                    return
    if looked_at:
        of_all = "" if looked_at < ROWS_LOOKED_AT else "first "
        warnings.warn(
            f"None of the {of_all}{looked_at} rows holds any of the phrases in {column!r}, so they may weigh nothing. "
            "Look at text_column, the spelling (whole words, every form of its own), and match_case.",
            stacklevel=2,
        )


def _check_column(dataset: Any, column: str) -> None:
    names = getattr(dataset, "column_names", None)
    if names is None:
        with random_states_kept():
            first = next(iter(first_rows(dataset, (column,))), None)
        names = [*first] if isinstance(first, Mapping) else None
    if names is not None and column not in names:
        raise ValueError(
            f"Item weights read the column {column!r}, which the data set does not have (it has {', '.join(names)}). "
            "Keep the column when tokenizing (remove_columns), or name another."
        )
