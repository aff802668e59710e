"""What the temperature is: a number, a schedule, a value for each item, or one that is learned."""

from hf_distill.temperature.base import ScheduledTemperature, TemperaturePolicy
from hf_distill.temperature.language import POLICIES, read_temperature, write_temperature
from hf_distill.temperature.learned import LearnedTemperature
from hf_distill.temperature.per_item import (
    AdaptiveTemperature,
    CwsmTemperature,
    FlswTemperature,
    RelativeTemperature,
)

__all__ = [
    "POLICIES",
    "AdaptiveTemperature",
    "CwsmTemperature",
    "FlswTemperature",
    "LearnedTemperature",
    "RelativeTemperature",
    "ScheduledTemperature",
    "TemperaturePolicy",
    "read_temperature",
    "write_temperature",
]
