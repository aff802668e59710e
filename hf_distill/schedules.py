"""Numbers that change over the training: pure functions of its progress, so that resuming needs no state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_distill.registry import Registry

Points = tuple[tuple[float, float], ...]

# How each kind goes from one value to the next: (initial, final, share of the way in [0, 1]) -> value.
SCHEDULES: Registry[Callable[[float, float, float], float]] = Registry("kind of schedule")


def _hold(initial: float, final: float, share: float) -> float:
    return initial


def _straight(initial: float, final: float, share: float) -> float:
    return initial * (1 - share) + final * share


def _half_cosine(initial: float, final: float, share: float) -> float:
    return _straight(initial, final, (1 - math.cos(math.pi * share)) / 2)


def _constant_ratio(initial: float, final: float, share: float) -> float:
    return initial ** (1 - share) * final**share


for _name, _course in {
    "constant": _hold,
    "linear": _straight,
    "cosine": _half_cosine,
    "exponential": _constant_ratio,
    "warmup": _straight,
    "step": _hold,
    "piecewise": _straight,
}.items():
    SCHEDULES.register(_name, _course)
del _name, _course

_BY_POINTS = ("step", "piecewise")
_WHOLE = {"start": 0.0, "end": 1.0}
_DEFAULTS: dict[str, dict[str, float]] = {
    **dict.fromkeys(("constant", "linear", "cosine", "exponential"), _WHOLE),
    "warmup": {"initial": 0.0, "final": 1.0, "start": 0.0, "end": 0.1},
}
# The fields of most kinds, and the words in which they are written.
_KEYS = {"initial": "from", "final": "to", "start": "start", "end": "end"}
_FIELDS: Registry[str] = Registry("key of a schedule")
for _field, _key in {"kind": "kind", **_KEYS, "points": "points"}.items():
    _FIELDS.register(_key, _field)
_FIELDS.register("value", "initial")
del _field, _key


@dataclass(frozen=True)
class Schedule:
    """A number for each moment of the training.

    `constant` is `initial` throughout. `linear`, `cosine` (half a wave) and `exponential` (a constant ratio) go from
    `initial` at `start` to `final` at `end`, and stay as they are before and after. `warmup` is linear, by default
    from 0 to 1 within the first tenth. `step` holds the value of each of its `points` until the next one, `piecewise`
    goes straight from point to point.

    Attributes:
        kind: one of `SCHEDULES`.
        initial: the first value, `from` where it is written.
        final: the last value, `to` where it is written.
        start: the progress, in [0, 1], until which it has its first value.
        end: the progress from which it has its last value.
        points: (progress, value) of `step` and `piecewise` alone, which take all the others from them.
    """

    kind: str
    # None stands for the kind's own value, which __post_init__ fills in.
    initial: float = None  # type: ignore[assignment]
    final: float = None  # type: ignore[assignment]
    start: float = None  # type: ignore[assignment]
    end: float = None  # type: ignore[assignment]
    points: Points = ()

    def __post_init__(self) -> None:
        SCHEDULES.get(self.kind)
        self._check_points()
        derived = self._derived()
        for name, value in (derived or _DEFAULTS[self.kind]).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        missing = [key for name, key in _KEYS.items() if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"A {self.kind} schedule needs {' and '.join(missing)}. Write {{kind: {self.kind}, from: 1, to: 0.1}}."
            )
        for name, key in _KEYS.items():
            value, word = getattr(self, name), "value" if (self.kind, key) == ("constant", "from") else key
            if not is_number(value):
                written = " YAML takes 1e-3 for text: write 1.0e-3." if isinstance(value, str) else ""
                raise ValueError(f"{word}={value!r} of a {self.kind} schedule must be a finite number.{written}")
            if derived and value != derived[name]:
                from_what = "its points" if self.points else "its value"
                raise ValueError(
                    f"{word}={value!r} of a {self.kind} schedule, which takes it from {from_what}. Drop it."
                )
        if not self.points and not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start={self.start!r} and end={self.end!r} of a {self.kind} schedule must be parts of the training, "
                "0 <= start < end <= 1."
            )
        if self.kind == "exponential" and not self.lowest > 0:
            raise ValueError(
                f"An exponential schedule from {self.initial!r} to {self.final!r} has no constant ratio: both must "
                "be > 0. Take values > 0, or kind linear or cosine."
            )

    def _check_points(self) -> None:
        if self.kind not in _BY_POINTS:
            if self.points:
                raise ValueError(f"points={self.points!r} with kind={self.kind!r}, which has none. Use piecewise.")
            return
        if not (
            isinstance(self.points, tuple)
            and self.points
            and all(map(_is_point, self.points))
            and all(first[0] < second[0] for first, second in pairwise(self.points))
        ):
            raise ValueError(
                f"points={self.points!r} of a {self.kind} schedule must be pairs of progress and value, with rising "
                "progress in [0, 1], such as [[0, 8], [0.5, 4], [1, 2]]."
            )

    def _derived(self) -> dict[str, float]:
        """What this kind's fields can only be; nothing where they are free."""
        if self.points:
            (start, initial), (end, final) = self.points[0], self.points[-1]
            return {"initial": initial, "final": final, "start": start, "end": end}
        if self.kind != "constant":
            return {}
        if self.initial is None:
            raise ValueError("A constant schedule needs its value: write the number alone.")
        return {"initial": self.initial, "final": self.initial, **_WHOLE}

    def at(self, progress: float) -> float:
        """Its number now.

        Args:
            progress: the share of the training that is done, in [0, 1].
        """
        knots = self.points or ((self.start, self.initial), (self.end, self.final))
        if progress <= knots[0][0]:
            return knots[0][1]
        course = SCHEDULES.get(self.kind)
        for (start, initial), (end, final) in pairwise(knots):
            if progress < end:
                value = course(initial, final, (progress - start) / (end - start))
                # Rounding alone could carry it past its ends.
                return min(max(value, min(initial, final)), max(initial, final))
        return knots[-1][1]

    def within(self, start: float, end: float) -> "Schedule":
        """The same course in a part of the training: before and after it, its first and its last number."""

        def placed(progress: float) -> float:
            return min(start + (end - start) * progress, 1.0)

        if self.points:
            return Schedule(self.kind, points=tuple((placed(progress), value) for progress, value in self.points))
        if self.kind == "constant":
            return self
        return Schedule(self.kind, self.initial, self.final, placed(self.start), placed(self.end))

    @property
    def lowest(self) -> float:
        """The least of its numbers."""
        return min(self._values)

    @property
    def highest(self) -> float:
        """The greatest of its numbers."""
        return max(self._values)

    @property
    def is_constant(self) -> bool:
        """Whether it is one number throughout."""
        return self.lowest == self.highest

    @property
    def _values(self) -> tuple[float, ...]:
        return tuple(value for _, value in self.points) or (self.initial, self.final)

    @classmethod
    def of(cls, value: Any, path: str = "schedule") -> "Schedule":
        """A schedule from a plain value: a number, the name of a kind that needs no more (`warmup`), or a mapping.

        Args:
            value: 0.5, "warmup", {"kind": "linear", "from": 8, "to": 2, "start": 0, "end": 0.5} or
                {"kind": "step", "points": [[0, 8], [0.5, 4]]}; a schedule is returned as it is.
            path: where it was written, for errors.

        Raises:
            ValueError: with the path, what is wrong and what is expected.
        """
        if isinstance(value, cls):
            return value
        try:
            if is_number(value):
                return cls("constant", value)
            return cls(**_read_fields({"kind": value} if isinstance(value, str) else value))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_plain(self) -> Any:
        """The shortest plain value from which `of` makes an equal schedule."""
        if self.kind == "constant":
            return self.initial
        if self.points:
            return {"kind": self.kind, "points": [[*point] for point in self.points]}
        defaults = _DEFAULTS[self.kind]
        written = {
            key: getattr(self, name) for name, key in _KEYS.items() if getattr(self, name) != defaults.get(name)
        }
        return {"kind": self.kind, **written} if written else self.kind


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_point(point: Any) -> bool:
    return isinstance(point, tuple) and len(point) == 2 and all(map(is_number, point)) and 0 <= point[0] <= 1


def _read_fields(values: Any) -> dict[str, Any]:
    if isinstance(values, Mapping) and "policy" in values and "kind" not in values:  # as temperatures have it
        values = {"kind" if key == "policy" else key: value for key, value in values.items()}
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise ValueError(
            f"{values!r} is no schedule. Write a number, or a mapping such as {{kind: linear, from: 8, to: 2}}; "
            f"kinds: {', '.join(SCHEDULES)}."
        )
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = _FIELDS.get(key)
        if (key == "value") != (values["kind"] == "constant") and name == "initial":
            raise ValueError(f"{key}: a constant has a `value`, the other kinds have `from` and `to`.")
        fields[name] = _as_tuples(value)
    return fields


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list | tuple) else value
