"""What every temperature policy is, and the one that depends on the progress alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from hf_distill.schedules import Schedule, is_number

# From a rank's own sums to those over all ranks.
Reduce = Callable[[Tensor], Tensor]


class TemperaturePolicy(ABC):
    """What T is, at a moment of the training and for an item: frozen, hashable, without state.

    Attributes:
        name: what it is called where it is written.
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(
        self,
        progress: float,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        binary: bool = False,
        valid: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> float | Tensor:
        """T > 0, finite for every item: a number, or (...,) in float32 without gradient.

        Args:
            progress: the share of the training that is done, in [0, 1].
            student_logits: (..., classes), any float dtype; masked rows may hold NaN.
            teacher_logits: (..., classes).
            binary: whether each class is a choice of its own, as with several labels.
            valid: (...,) bool, the items that count where a policy compares them with each other; None counts all.
            reduce: of such a policy, from (2,) sum and count on this rank to those over all; every rank must call.
        """

    def at(self, progress: float) -> "float | TemperaturePolicy":
        """The number that T is now, for all items; the policy itself where it needs the logits."""
        return self

    @property
    def is_per_item(self) -> bool:
        """Whether items have temperatures of their own."""
        return True

    @property
    @abstractmethod
    def lowest(self) -> float:
        """No T is below this."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """No T is above this."""


@dataclass(frozen=True)
class ScheduledTemperature(TemperaturePolicy):
    """T as a function of the training's progress.

    Attributes:
        schedule: with numbers > 0.
    """

    schedule: Schedule

    name: ClassVar[str] = "scheduled"

    def __post_init__(self) -> None:
        if not self.schedule.lowest > 0:
            raise ValueError(
                f"The temperature goes down to {self.schedule.lowest!r}, but it divides the logits: it must stay "
                "above 0. Begin and end at numbers > 0, such as from: 8, to: 2."
            )

    def __call__(
        self,
        progress: float,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        binary: bool = False,
        valid: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> float:
        """T at this progress, the same for all items."""
        return self.schedule.at(progress)

    def at(self, progress: float) -> float:
        """T at this progress."""
        return self.schedule.at(progress)

    @property
    def is_per_item(self) -> bool:
        """Whether items have temperatures of their own."""
        return False

    @property
    def lowest(self) -> float:
        """No T is below this."""
        return self.schedule.lowest

    @property
    def highest(self) -> float:
        """No T is above this."""
        return self.schedule.highest


def check_numbers(policy: Any) -> None:
    """Refuses fields of a policy that are declared as numbers and are none."""
    for field in fields(policy):
        value = getattr(policy, field.name)
        if isinstance(field.default, float) and not is_number(value):
            written = " YAML takes 1e-3 for text: write 1.0e-3." if isinstance(value, str) else ""
            raise ValueError(f"{field.name}={value!r} of an {policy.name} temperature must be a number.{written}")


def check_bounds(least: float, most: float) -> None:
    """Refuses what cannot be the least and the greatest temperature."""
    if not 0 < least <= most:
        raise ValueError(f"min={least!r} and max={most!r} of a temperature, but it must be 0 < min <= max.")
