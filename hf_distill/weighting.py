"""What some items of the logit term weigh more than others: by phrases, by a column, by groups, by the teacher.

Here are the settings alone; several multiply. Their plain form is a list such as

    - {by: phrases, phrases: [heart attack, 心肌梗死], boost: 0.3}
    - {by: group, column: language, size_power: 0.5}
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

# In a batch: (batch,) or (batch, length of input_ids or labels) float32, >= 0.
ITEM_WEIGHT = "item_weight"
# In a batch: (batch,) int64, the place of a row's group among the known ones, or their number.
ITEM_GROUP = "item_group"


@dataclass(frozen=True)
class ItemWeighting:
    """What all the settings have: the word they are written `by`, and the columns of the data set that they read."""

    by: ClassVar[str]

    @property
    def columns(self) -> frozenset[str]:
        """None, unless a setting says otherwise."""
        return frozenset()


def _check_number(name: str, value: Any, expected: str, *, least: float = 0.0, most: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and least <= value <= most):
        raise ValueError(f"{name}={value!r}, but {expected}.")


def _check_column(name: str, value: Any) -> None:
    if not (isinstance(value, str) and value):
        raise ValueError(f"{name}={value!r}, but it is the name of a column of the data set.")


@dataclass(frozen=True)
class PhraseWeights(ItemWeighting):
    """Weight 1 + boost for what belongs to a phrase: tokens where tokens are items, else rows that hold one.

    Attributes:
        phrases: what to look for, as it is written in the text.
        file: in place of `phrases`, a UTF-8 text file of them, one on a line, each with a tab and a boost of its own
            behind it if wanted.
        boost: >= 0; of overlapping phrases the largest counts.
        text_column: the text that was tokenized; that of the target in encoder-decoder models.
        match_case: whether upper and lower case differ.
    """

    by: ClassVar[str] = "phrases"
    phrases: tuple[str, ...] = ()
    file: str | None = None
    boost: float = 0.3
    text_column: str = "text"
    match_case: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.phrases, list | tuple):
            raise ValueError(
                f"phrases={self.phrases!r}; expected a list of texts such as ['heart attack'], or, for a file with "
                "one on each line, its path as file."
            )
        object.__setattr__(self, "phrases", tuple(self.phrases))
        if bool(self.phrases) == bool(self.file):
            raise ValueError(
                f"phrases={list(self.phrases)!r} and file={self.file!r}: give one of them, a list of phrases or a "
                "file with one on each line."
            )
        wrong = [phrase for phrase in self.phrases if not (isinstance(phrase, str) and phrase.strip())]
        if wrong:
            raise ValueError(f"phrases holds {wrong[0]!r}, but a phrase is a text that is not empty.")
        _check_number("boost", self.boost, "it is added to the weight 1 of the others and must be a number >= 0")
        _check_column("text_column", self.text_column)
        if not isinstance(self.match_case, bool):
            raise ValueError(f"match_case={self.match_case!r}, but it must be true or false.")

    @property
    def columns(self) -> frozenset[str]:
        """The text."""
        return frozenset({self.text_column})

    def boosts(self) -> dict[str, float]:
        """Each phrase with its boost; reads the file.

        Raises:
            ValueError: the file is not there, is not UTF-8, holds no phrase, or a boost that is no number >= 0.
        """
        if self.file is None:
            return dict.fromkeys(self.phrases, float(self.boost))
        path = Path(self.file)
        if not path.is_file():
            raise ValueError(
                f"file={self.file!r} is no file. Give the path of a text file with one phrase on each line."
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            shown = error.object[error.start : error.start + 1]
            raise ValueError(
                f"{path} is not UTF-8: byte {error.start} is {shown!r}. Save it as UTF-8, which editors offer as the "
                "encoding."
            ) from None
        found: dict[str, float] = {}
        for number, line in enumerate(lines, 1):
            phrase, _, written = line.partition("\t")
            if not phrase.strip():
                continue
            boost = self.boost if not written.strip() else _number(written)
            _check_number(f"{path}, line {number}: boost", boost, "after the tab stands a number >= 0, or nothing")
            found[phrase.strip()] = max(float(boost), found.get(phrase.strip(), 0.0))
        if not found:
            raise ValueError(f"{path} holds no phrase. Write one on each line.")
        return found


def _number(written: str) -> Any:
    try:
        return float(written)
    except ValueError:
        return written


@dataclass(frozen=True)
class ColumnWeights(ItemWeighting):
    """The weights that a column holds, >= 0: one number for a row, or one for each of its tokens.

    Attributes:
        column: its name. Lists are as long as the row's input_ids; as its labels, in encoder-decoder models.
    """

    by: ClassVar[str] = "column"
    column: str = "distill_weight"

    def __post_init__(self) -> None:
        _check_column("column", self.column)

    @property
    def columns(self) -> frozenset[str]:
        """The weights."""
        return frozenset({self.column})


@dataclass(frozen=True)
class GroupWeights(ItemWeighting):
    """A weight for each group of rows, such as those of one language: exactly one of the three ways.

    Attributes:
        column: whose values are the groups.
        weights: (value, weight >= 0) pairs, or a mapping. Values compare as texts: 1 and "1" are one.
        default: of the values that `weights` leaves out, and of rows without a value; None refuses such rows.
        size_power: τ in [0, 1]: a group of n rows has an influence ∝ n^τ in all, and so a row n^(τ-1), scaled to a
            mean of 1 over the training rows. 1 changes nothing; with 0 all groups have the same influence. The
            smoothing of Conneau et al. 2020, arXiv:1911.02116, as weights in place of sampling.
        follow: `loss` weighs a group by (its loss in the latest evaluation / the groups' mean)^power; 1 before the
            first.
        power: of `follow`, > 0.
    """

    by: ClassVar[str] = "group"
    column: str
    weights: tuple[tuple[str, float], ...] = ()
    default: float | None = None
    size_power: float | None = None
    follow: str | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_column("column", self.column)
        named = [
            (group_of(value), weight)
            for value, weight in (self.weights.items() if isinstance(self.weights, Mapping) else self.weights)
        ]
        if any(group is None for group, _ in named):
            raise ValueError("weights gives one to a missing value. Rows without a value take the default.")
        pairs = tuple(sorted((str(group), weight) for group, weight in named))
        object.__setattr__(self, "weights", pairs)
        values = [value for value, _ in pairs]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"weights gives {twice[0]!r} two weights. Keep one.")
        ways = {"weights": bool(pairs), "size_power": self.size_power is not None, "follow": self.follow is not None}
        if sum(ways.values()) != 1:
            given = " and ".join(name for name, is_given in ways.items() if is_given) or "none"
            raise ValueError(f"Weights by group {self.column!r} take one of {', '.join(ways)}; given: {given}.")
        for value, weight in pairs:
            _check_number(f"weights[{value!r}]", weight, "the weight of a group must be a number >= 0")
        if self.default is not None:
            _check_number("default", self.default, "the weight of the other groups must be a number >= 0")
        if self.size_power is not None:
            _check_number("size_power", self.size_power, "it must be a number from 0 (equal influence) to 1", most=1.0)
        if self.follow not in (None, "loss"):
            raise ValueError(f"follow={self.follow!r} is unknown. Known: loss.")
        _check_number("power", self.power, "it is the exponent of a group's loss and must be a number > 0")
        if self.power == 0:
            raise ValueError("power=0 weighs all groups alike. Leave the weights by group out, or take a number > 0.")
        for name, reader in (("default", "weights"), ("power", "follow")):
            if getattr(self, name) != _default(self, name) and not ways[reader]:
                raise ValueError(f"{name}={getattr(self, name)!r} is read beside {reader} only. Drop it.")

    @property
    def columns(self) -> frozenset[str]:
        """The groups."""
        return frozenset({self.column})

    def factors(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each known group: for `follow` 1 each, in the order of `ITEM_GROUP`.

        Args:
            sizes: the training rows of each group, of which `weights` needs none.

        Raises:
            ValueError: the sizes are needed and not known.
        """
        if self.weights:
            return dict(self.weights)
        power = self.size_power
        if power is None:
            return dict.fromkeys(sorted(sizes), 1.0)
        if not (rows := sum(sizes.values())):
            raise ValueError(f"size_power needs the sizes of the groups of {self.column!r}, and no group has a row.")
        known = {group: size for group, size in sizes.items() if size}
        scale = rows / sum(size**power for size in known.values())
        return {group: scale * size ** (power - 1) for group, size in known.items()}


def group_of(value: Any) -> str | None:
    """The name of a row's group: a number or a text of any library as plain text; None of a missing value or NaN."""
    plain = value.item() if hasattr(value, "item") else value
    is_missing = plain is None or (isinstance(plain, float) and math.isnan(plain))
    return None if is_missing else str(plain)


@dataclass(frozen=True)
class TeacherWeights(ItemWeighting):
    """A weight for each item, by what the teacher makes of it.

    Attributes:
        signal: `confidence`: the teacher's largest probability at temperature 1, to a `power`, and 0 below a
            `threshold`. `correctness`: `wrong` where the teacher misses the label, else 1; 1 without a label too.
        power: of the confidence, > 0.
        threshold: of the confidence, in [0, 1).
        wrong: >= 0.
    """

    by: ClassVar[str] = "teacher"
    signal: str = "confidence"
    power: float = 1.0
    threshold: float = 0.0
    wrong: float = 0.0

    def __post_init__(self) -> None:
        read_with = {"power": "confidence", "threshold": "confidence", "wrong": "correctness"}
        if self.signal not in read_with.values():
            raise ValueError(f"signal={self.signal!r} is unknown. Known: confidence, correctness.")
        _check_number("power", self.power, "it is the exponent of the confidence and must be a number > 0")
        _check_number("threshold", self.threshold, "it is a least confidence and must be a number in [0, 1)", most=1.0)
        _check_number("wrong", self.wrong, "it is the weight where the teacher is wrong and must be a number >= 0")
        if self.threshold == 1 or (self.power == 0 and not self.threshold):
            raise ValueError(
                f"power={self.power!r} with threshold={self.threshold!r}: a threshold of 1 leaves nothing to learn, "
                "and a power of 0 without a threshold weighs all alike. Take a power > 0, or a threshold in (0, 1)."
            )
        for name, signal in read_with.items():
            if getattr(self, name) != _default(self, name) and self.signal != signal:
                raise ValueError(f"{name}={getattr(self, name)!r} is read beside signal={signal!r} only. Drop it.")


_KINDS: dict[str, type[ItemWeighting]] = {
    kind.by: kind for kind in (PhraseWeights, ColumnWeights, GroupWeights, TeacherWeights)
}


def _default(setting: Any, name: str) -> Any:
    return next(field.default for field in fields(setting) if field.name == name)


def weighting_columns(weights: Iterable[ItemWeighting]) -> frozenset[str]:
    """The columns of the data set that weights are made of."""
    return frozenset().union(*(setting.columns for setting in weights))


def batch_weight_columns(weights: Iterable[ItemWeighting]) -> frozenset[str]:
    """What the collator puts into a batch for these weights: some of `ITEM_WEIGHT` and `ITEM_GROUP`."""
    names = {ITEM_GROUP if follows(setting) else ITEM_WEIGHT for setting in weights if setting.columns}
    return frozenset(names)


def follows(setting: ItemWeighting) -> bool:
    """Whether the weights change with each evaluation."""
    return isinstance(setting, GroupWeights) and setting.follow is not None


def read_item_weights(value: Any, path: str = "item_weights") -> tuple[ItemWeighting, ...]:
    """The settings that a list of mappings stands for, each with a key `by`; a single mapping is a list of one.

    Args:
        value: plain values, or settings as they are.
        path: where it was written, for errors: `logits.item_weights`.

    Raises:
        ValueError: an unknown `by` or key, or values that a setting refuses; the message begins with the path.
    """
    written = [value] if isinstance(value, Mapping | ItemWeighting) else value
    if not isinstance(written, list | tuple):
        raise ValueError(f"{path}={value!r}; expected a list of mappings such as {{by: column, column: weight}}.")
    read: tuple[ItemWeighting, ...] = tuple(
        each if isinstance(each, ItemWeighting) else _read(each, f"{path}[{number}]")
        for number, each in enumerate(written)
    )
    if sum(follows(setting) for setting in read) > 1:
        raise ValueError(f"{path}: the weights of one group column can follow the loss, and here are several.")
    return read


def _read(value: Any, path: str) -> ItemWeighting:
    if not isinstance(value, Mapping) or "by" not in value:
        raise ValueError(f"{path} is {value!r}; expected a mapping with a key by: {', '.join(_KINDS)}.")
    by = value["by"]
    _check_known(f"{path}.by: {by!r} is unknown", by, _KINDS)
    kind = _KINDS[by]
    known = {field.name: field for field in fields(kind)}
    for key in value:
        _check_known(f"{path}.{key}: unknown key with by: {by}", key, ("by", *known))
    for name, field in known.items():
        if field.default is MISSING and name not in value:
            raise ValueError(f"{path} lacks {name}.")
    arguments = {name: part for name, part in value.items() if name != "by"}
    for name in ("phrases", "weights"):
        if name in arguments:
            arguments[name] = _pairs_or_texts(name, arguments[name], f"{path}.{name}")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _pairs_or_texts(name: str, value: Any, path: str) -> tuple[Any, ...]:
    expected = Mapping if name == "weights" else list | tuple
    if not isinstance(value, expected):
        shown = "a mapping {value: weight}" if name == "weights" else "a list of texts"
        raise ValueError(f"{path} is {value!r}; expected {shown}.")
    return tuple(value.items()) if isinstance(value, Mapping) else tuple(value)


def _check_known(what: str, word: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    if word not in known:
        nearest = difflib.get_close_matches(str(word), known, n=1)
        meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{what}.{meant} Known: {', '.join(known)}.")


def write_item_weights(weights: Iterable[ItemWeighting]) -> list[dict[str, Any]]:
    """The plain values from which `read_item_weights` makes equal settings; what is as by default is left out."""
    written = []
    for setting in weights:
        plain: dict[str, Any] = {"by": setting.by}
        for field in fields(setting):
            value = getattr(setting, field.name)
            if value != field.default or field.name == "boost":
                plain[field.name] = list(value) if field.name == "phrases" else value
        if "weights" in plain:
            plain["weights"] = dict(plain["weights"])
        written.append(plain)
    return written
