"""A temperature that is trained against the student."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_distill.registry import Registry
from hf_distill.schedules import Schedule
from hf_distill.temperature.base import Reduce, TemperaturePolicy, check_numbers

# Whether items have temperatures of their own.
SCOPES: Registry[bool] = Registry("scope of a learned temperature")
SCOPES.register("global", False)
SCOPES.register("instance", True)


@dataclass(frozen=True)
class LearnedTemperature(TemperaturePolicy):
    """T = min + range * sigmoid(θ), where θ climbs the loss that the student descends (CTKD).

    θ is a parameter (`global`), or made from the item's own logits by a small network (`instance`); both are a
    `hf_distill.models.learned.TemperatureModule`. Its gradient is reversed more and more, so that the student meets
    harder temperatures by and by.

    Attributes:
        scope: `global` or `instance`.
        min: > 0, the least T.
        range: > 0, how far above it T can get.
        curriculum: in (0, 1], the share of the training after which the gradient is reversed in full.
        learning_rate_factor: > 0, times the student's learning rate: θ must move by whole numbers, and the rates of
            fine-tuning are small.

    Source: Li et al. 2022, "Curriculum Temperature for Knowledge Distillation", arXiv:2211.16231, whose
        curriculum takes 10 epochs.
    """

    scope: str = "global"
    min: float = 1.0
    range: float = 20.0
    curriculum: float = 0.1
    learning_rate_factor: float = 100.0

    name: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        SCOPES.get(self.scope)
        check_numbers(self)
        if not (self.min > 0 and self.range > 0):
            raise ValueError(
                f"min={self.min!r} and range={self.range!r}, but T = min + range * sigmoid(θ) needs both above 0."
            )
        if not 0 < self.curriculum <= 1:
            raise ValueError(f"curriculum={self.curriculum!r} is no part of the training. Give a number in (0, 1].")
        if not self.learning_rate_factor > 0:
            raise ValueError(f"learning_rate_factor={self.learning_rate_factor!r} must be a number > 0.")

    @property
    def is_per_item(self) -> bool:
        """Whether items have temperatures of their own."""
        return SCOPES.get(self.scope)

    @property
    def lowest(self) -> float:
        """No T is below this."""
        return self.min

    @property
    def highest(self) -> float:
        """No T is above this."""
        return self.min + self.range

    def reversal(self, progress: float) -> float:
        """What the gradient of θ is multiplied by: from 0 to -1, half a cosine wave over the curriculum.

        Args:
            progress: the share of the training that is done, in [0, 1].
        """
        return Schedule("cosine", initial=0.0, final=-1.0, end=self.curriculum).at(progress)

    def __call__(
        self,
        progress: float,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        binary: bool = False,
        valid: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> Tensor:
        """Refused: the policy has no weights.

        Raises:
            TypeError: always.
        """
        raise TypeError("A learned temperature comes from its TemperatureModule, not from the policy alone.")
