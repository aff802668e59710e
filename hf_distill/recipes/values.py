"""Values as YAML and the command line give them, made into what a field takes."""

import os
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from hf_distill.config.checks import check_choice

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


def converted(value: Any, hint: Any, where: str) -> Any:
    """The value as the type that a field has: `1e-4`, which YAML takes for a text, as a number.

    Args:
        value: plain, of YAML.
        hint: the field's annotation.
        where: what the field is called, for the error.

    Raises:
        ValueError: it is of another type, with what was expected.
    """
    kinds = kinds_of(hint)
    if isinstance(value, list) and Sequence in kinds:
        return value
    if Any in kinds or type(value) in kinds:
        return value
    if isinstance(value, bool):
        # YAML reads no and off as False, and these are words of TrainingArguments, such as eval_strategy: no.
        if str in kinds and not value:
            return "no"
    elif isinstance(value, int | float | str):
        made = _as_one_of(value, kinds)
        if made is not None:
            return made
    elif isinstance(value, tuple) and list in kinds:
        return [*value]
    if isinstance(value, str) and list in kinds:
        return [value]
    if isinstance(value, str) and (choices := kinds.get(Literal)):
        check_choice(where, value, choices)
        return value
    expected = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds if kind in _WORDS))
    raise ValueError(f"{where}={value!r}, expected {expected}.")


def check_folder(folder: str | os.PathLike, where: str) -> None:
    """Refuses a folder that is a file, or that would be below one, and one that may not be written to.

    Args:
        folder: may be missing.
        where: what it is called, for the error.

    Raises:
        ValueError: with the file, or the folder without permission.
    """
    path = Path(folder).expanduser()
    taken = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    if taken is not None:
        raise ValueError(f"{where}={str(folder)!r}, but {taken} is a file. Name a folder, which may be new.")
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{where}={str(folder)!r}, but {there} may not be written to by this user. Name another folder, or change "
            "its permissions."
        )


def _as_one_of(value: Any, kinds: Mapping[Any, Any]) -> Any:
    """A number or a text as another of the kinds, or None; what is a text already where texts are taken stays one."""
    text = str(value).strip()
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                number = float(text.replace("_", ""))
            except ValueError:
                continue
            if kind is float or number.is_integer():
                return kind(number)
    return text if str in kinds else None


def kinds_of(hint: Any) -> dict[Any, Any]:
    """The plain types that an annotation takes, in its order; of literals with their choices."""
    kinds: dict[Any, Any] = {}
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin = get_origin(part) or part
        if isinstance(origin, type) and issubclass(origin, Enum):
            origin = str
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            origin = dict
        kinds[origin] = get_args(part)
    return kinds
