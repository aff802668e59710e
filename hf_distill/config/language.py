"""Terms as plain values, such as YAML and JSON hold, and back."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from hf_distill.config.checks import did_you_mean, is_number
from hf_distill.config.terms import Balance, LayerMap, Projection
from hf_distill.features import Feature, parse_feature
from hf_distill.layer_mapping import EXPLICIT_MAP
from hf_distill.schedules import Schedule
from hf_distill.temperature import TemperaturePolicy, read_temperature, write_temperature
from hf_distill.weighting import read_item_weights, write_item_weights

T = TypeVar("T")
# Written even where they are the defaults: they say what a term is.
_ALWAYS_WRITTEN = ("weight", "loss", "temperature")


def read(cls: type[T], values: Any, path: str) -> T:
    """One term or part of a term.

    Args:
        cls: the dataclass that it becomes.
        values: a mapping from the dataclass's fields to plain values.
        path: where it was written, for errors: `matches[1]`.
    """
    known: dict[str, Field] = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    check_keys(values, known, path)
    needed = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{path} lacks {' and '.join(missing)}.")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _READERS or (value is None and known[name].default is None):
            arguments[name] = value
        else:
            arguments[name] = _READERS[name](value, f"{path}.{name}")
    return cls(**arguments)


def check_keys(values: Any, known: Iterable[str], path: str) -> None:
    """Refuses what is no mapping, and keys that nobody reads."""
    known = tuple(known)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'The recipe'} is {values!r}; expected a mapping with {', '.join(known)}.")
    for key in values:
        if key not in known:
            where = f"{path}.{key}" if path else f"{key}"
            raise ValueError(f"{where}: unknown key.{did_you_mean(key, known)} Known: {', '.join(known)}.")


def read_map(value: Any, path: str = "map") -> LayerMap:
    """A layer map from a strategy's name, {student layer: teacher layer}, [[student, teacher]] or {strategy: ...}.

    The layers of a mapping may be digits in quotes, as JSON's keys are, and pairs a text, as on a command line.
    """
    if isinstance(value, str) and value.startswith(("[", "{")):
        value = json.loads(value)
    if isinstance(value, str):
        value = {"strategy": value}
    if isinstance(value, Mapping) and "strategy" not in value and all(_is_layer(key) for key in value):
        value = [[int(key), layer] for key, layer in value.items()]
    if isinstance(value, list | tuple):
        value = {"strategy": EXPLICIT_MAP, "pairs": value}
    return _read_part(LayerMap, value, path)


def _is_layer(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.removeprefix("-").isdigit())


def _read_projection(value: Any, path: str) -> Projection:
    return _read_part(Projection, {"kind": value} if isinstance(value, str) else value, path)


def _read_part(cls: type[T], values: Any, path: str) -> T:
    try:
        return read(cls, values, path)
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f"{path}: {error}") from None


def read_balance(value: Any) -> Balance:
    """A balance from the name of its kind, or a mapping."""
    return _read_part(Balance, {"kind": value} if isinstance(value, str) else value, "balance")


def write_balance(balance: Balance) -> Any:
    """The shortest plain value from which `read_balance` makes an equal one."""
    return balance.kind if balance == Balance(balance.kind) else {"kind": balance.kind, **write(balance)}


def read_schedule(value: Any, path: str) -> Schedule:
    """A schedule from what `Schedule.of` takes; errors begin with the path."""
    return Schedule.of(value, path)


def read_number_or_schedule(value: Any, path: str) -> Any:
    """A number as it is, else a schedule."""
    return value if is_number(value) else Schedule.of(value, path)


def _read_feature(value: Any, path: str) -> Feature:
    if not isinstance(value, str):
        raise ValueError(f"{path}={value!r} is no reference to a feature. Write it as text, such as 'hidden[*]'.")
    try:
        return parse_feature(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tuple(value: Any, path: str) -> Any:
    return tuple(_read_tuple(part, path) for part in value) if isinstance(value, list | tuple) else value


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "student": _read_feature,
    "teacher": _read_feature,
    "map": read_map,
    "projection": _read_projection,
    "temperature": read_temperature,
    "weight_schedule": read_schedule,
    "teacher_scale": read_number_or_schedule,
    "item_weights": read_item_weights,
    "active": _read_tuple,
    "pairs": _read_tuple,
    "candidates": _read_tuple,
}


def write(term: Any) -> dict[str, Any]:
    """The plain values of a term or a part of one; what is as by default is left out."""
    written = {}
    for field in fields(term):
        value = getattr(term, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name == "item_weights" and value:
            written[field.name] = write_item_weights(value)
        elif value != default or field.name in _ALWAYS_WRITTEN:
            written[field.name] = _plain(value)
    return written


def write_map(layer_map: LayerMap) -> Any:
    """The shortest plain value from which `read_map` makes an equal map: a name, pairs or a mapping."""
    if layer_map.strategy == EXPLICIT_MAP:
        return _plain(layer_map.pairs)
    if layer_map == LayerMap(layer_map.strategy):
        return layer_map.strategy
    return {"strategy": layer_map.strategy, **write(layer_map)}


def _plain(value: Any) -> Any:
    if isinstance(value, Feature):
        return str(value)
    if isinstance(value, Schedule):
        return value.to_plain()
    if isinstance(value, TemperaturePolicy):
        return write_temperature(value)
    if isinstance(value, LayerMap):
        return write_map(value)
    if isinstance(value, Projection):
        return {"kind": value.kind, **write(value)}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value
