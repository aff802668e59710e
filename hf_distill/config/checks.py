"""Checks of single values that the terms share."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

Window = tuple[float, float]
ALWAYS: Window = (0.0, 1.0)


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any, *, least: float, expected: str) -> None:
    """Refuses what is no finite number >= `least`."""
    if not (is_number(value) and value >= least):
        written = " YAML takes 1e-3 for text: write 1.0e-3." if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r}, but {expected}.{written}")


def check_weight(name: str, weight: Any) -> None:
    """Refuses what is no weight of a term."""
    check_number(name, weight, least=0, expected="the weight of a term must be a number >= 0")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuses a word that is none of the known ones."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown.{did_you_mean(value, known)} Known: {', '.join(known)}.")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A question with the nearest known word, or nothing."""
    words = {each.casefold(): each for each in known}
    nearest = difflib.get_close_matches(str(word).casefold(), words, n=1)
    return f" Did you mean {words[nearest[0]]!r}?" if nearest else ""


def names_with(word: Any, known: Iterable[str]) -> str:
    """The known words that a shorter one is part of, or nothing: `kl` is not near to any, and in several."""
    found = [each for each in known if str(word).casefold() in each.casefold()] if word else []
    return f" Is one of these meant: {', '.join(found)}?" if found else ""


def check_window(name: str, active: Any) -> None:
    """Refuses what is no part (start, end) of the training's progress."""
    if not (
        isinstance(active, tuple)
        and len(active) == 2
        and all(map(is_number, active))
        and 0 <= active[0] < active[1] <= 1
    ):
        raise ValueError(
            f"{name}={active!r}, but the part of the training in which a term is on is (start, end) with "
            "0 <= start < end <= 1, such as (0, 0.5) for the first half."
        )
