"""Temperatures as plain values, such as YAML and JSON hold, and back."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hf_distill.registry import Registry
from hf_distill.schedules import SCHEDULES, Schedule
from hf_distill.temperature.base import ScheduledTemperature, TemperaturePolicy
from hf_distill.temperature.learned import LearnedTemperature
from hf_distill.temperature.per_item import AdaptiveTemperature, CwsmTemperature, FlswTemperature

# Every policy by the name under which it is written; those of `SCHEDULES` are scheduled.
POLICIES: Registry[type[TemperaturePolicy]] = Registry("temperature policy")
for _name in SCHEDULES:
    POLICIES.register(_name, ScheduledTemperature)
for _policy in (AdaptiveTemperature, FlswTemperature, CwsmTemperature, LearnedTemperature):
    POLICIES.register(_policy.name, _policy)
del _name, _policy


def read_temperature(value: Any, path: str = "temperature") -> Any:
    """A number, or a policy; what is neither a mapping nor a word is returned as it is, for the term to check.

    Args:
        value: 4, "adaptive", {"policy": "constant", "value": 4}, {"policy": "linear", "from": 8, "to": 2} or
            {"policy": "adaptive", "signal": "loss", "min": 2, "max": 10}.
        path: where it was written, for errors.

    Raises:
        ValueError: with the path, what is wrong and what is expected.
    """
    if isinstance(value, str):
        value = {"policy": value}
    if not isinstance(value, Mapping):
        return value
    try:
        return _read_policy(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_policy(values: Mapping[str, Any]) -> float | TemperaturePolicy:
    if "policy" not in values and "kind" in values:  # as other schedules have it
        values = {"policy" if key == "kind" else key: value for key, value in values.items()}
    if "policy" not in values and (slips := difflib.get_close_matches("policy", map(str, values), n=1)):
        raise ValueError(f"unknown key {slips[0]!r}. Did you mean 'policy'?")
    name = values.get("policy", "constant" if "value" in values else None)
    if not isinstance(name, str):
        raise ValueError(
            f"{dict(values)!r} has no policy. Write a number, or {{policy: linear, from: 8, to: 2}}; policies: "
            f"{', '.join(POLICIES)}."
        )
    policy = POLICIES.get(name)
    options = {key: value for key, value in values.items() if key != "policy"}
    if policy is ScheduledTemperature:
        if "kind" in options:
            raise ValueError(f"kind={options['kind']!r}: the kind of a temperature's schedule is its `policy`.")
        try:
            schedule = Schedule.of({**options, "kind": name}, name)
        except ValueError as error:
            raise ValueError(str(error).replace("{kind:", "{policy:")) from None
        return schedule.initial if name == "constant" else ScheduledTemperature(schedule)
    known: Registry[str] = Registry(f"key of the temperature policy {name!r}:")
    for field in fields(policy):  # type: ignore[arg-type]
        known.register(field.name, field.name)
    return policy(**{known.get(key): value for key, value in options.items()})


def write_temperature(temperature: float | TemperaturePolicy) -> Any:
    """The shortest plain value from which `read_temperature` makes an equal one: a number or a mapping."""
    if not isinstance(temperature, TemperaturePolicy):
        return temperature
    if isinstance(temperature, ScheduledTemperature):
        plain = temperature.schedule.to_plain()
        if not isinstance(plain, Mapping):
            return plain
        return {"policy" if key == "kind" else key: value for key, value in plain.items()}
    options = {
        field.name: getattr(temperature, field.name)
        for field in fields(temperature)  # type: ignore[arg-type]
        if getattr(temperature, field.name) != field.default
    }
    return {"policy": temperature.name, **options}
