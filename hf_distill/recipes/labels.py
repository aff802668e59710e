"""Labels as users write them, as the numbers that a model was trained on."""

from collections.abc import Mapping
from typing import Any

from datasets import ClassLabel, Dataset

from hf_distill.items import IGNORE_INDEX

_SHOWN = 20


def is_missing(label: Any) -> bool:
    """Whether a cell holds no label: empty, NaN as of an empty cell among numbers, or -100."""
    return not isinstance(label, list) and (label in (None, "", IGNORE_INDEX) or label != label)


def class_number(label: Any) -> int | None:
    """The class that a number, or a string of digits, stands for; empty cells make numbers floats."""
    text = str(label).removesuffix(".0")
    return int(text) if text.isdecimal() else None


class Labels:
    """Numbers for a model's labels.

    Args:
        names: the names of its classes by number.
        kind: `single_label_classification`, `multi_label_classification` or `regression`.
    """

    def __init__(self, names: Mapping[int, str], kind: str = "single_label_classification") -> None:
        self._names, self._kind = names, kind
        self._numbers = {name.casefold(): number for number, name in names.items()}
        self._exact = {name: number for number, name in names.items()}  # some differ by their case alone

    def of_column(self, rows: Dataset, column: str) -> list[Any]:
        """A column's labels as numbers; None where there is none.

        Raises:
            ValueError: a label that the model does not know, with those it does.
        """
        feature = rows.features[column]
        inner = getattr(feature, "feature", feature)
        given = inner.names if isinstance(inner, ClassLabel) else None
        if given is not None and not {name.casefold() for name in given} & {*self._numbers}:
            given = None  # other words for the same numbers
        return [self._one(value, given) for value in rows[column]]

    def of_words(self, rows: Dataset, column: str) -> list[Any]:
        """Of a column with a label for each word, a list of the list, or the text of them."""
        feature = rows.features[column]
        inner = getattr(feature, "feature", feature)
        given = inner.names if isinstance(inner, ClassLabel) else None
        words = (value.split() if isinstance(value, str) else value for value in rows[column])
        return [None if tags is None else [self._class(tag, given) for tag in tags] for tags in words]

    def _one(self, value: Any, given: list[str] | None) -> Any:
        if is_missing(value):
            return None
        if self._kind == "regression":
            return [float(part) for part in value] if isinstance(value, list) else float(value)
        if self._kind == "single_label_classification":
            return self._class(value, given)
        if not isinstance(value, list):
            raise ValueError(f"The label {value!r} is one, and the model tells many: expected a list of labels.")
        is_indicator = len(value) == len(self._names) and all(not isinstance(part, str) for part in value)
        if is_indicator and given is None and {*value} <= {0, 1, None}:
            return [float("nan") if part is None else float(part) for part in value]
        numbers = {self._class(part, given) for part in value}
        return [float(number in numbers) for number in range(len(self._names))]

    def _class(self, value: Any, given: list[str] | None) -> int:
        if is_missing(value):
            return IGNORE_INDEX
        word = str(given[value] if given is not None else value)
        known = self._exact.get(word, self._numbers.get(word.casefold()))
        number = class_number(value) if known is None and given is None else known
        if number is None or number >= len(self._names):
            names = [*self._names.values()]
            others = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = value if given is None else word
            raise ValueError(
                f"The data has the label {shown!r}, which the teacher does not know. It knows "
                f"{', '.join(names[:_SHOWN])}{others}, or the numbers 0 to {len(names) - 1}."
            )
        return number
