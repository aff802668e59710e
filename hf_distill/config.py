"""What a distillation minimises, as frozen values checked once."""

import math
from dataclasses import dataclass

from hf_distill.losses import LOSSES


@dataclass(frozen=True)
class TaskTerm:
    """The student's own loss on the labels."""

    weight: float = 0.5

    def __post_init__(self) -> None:
        _check_weight("task_weight", self.weight)


@dataclass(frozen=True)
class LogitTerm:
    """The distance of the student's logits from the teacher's."""

    loss: str = "forward_kl"
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _check_weight("kd_weight", self.weight)
        LOSSES.get(self.loss)
        if not (
            isinstance(self.temperature, int | float) and self.temperature > 0 and math.isfinite(self.temperature)
        ):
            raise ValueError(
                f"temperature={self.temperature!r}, but it divides the logits: it must be a positive number "
                "(1 compares the distributions as they are, 2 to 4 is usual)."
            )


@dataclass(frozen=True)
class DistillationConfig:
    """Every term of the training loss: their weighted sum is minimised, and weights are never normalised."""

    task: TaskTerm
    logits: LogitTerm

    def __post_init__(self) -> None:
        if self.task.weight == 0 and self.logits.weight == 0:
            raise ValueError("All weights are zero, so there is nothing to learn: raise kd_weight or task_weight.")


def _check_weight(name: str, weight: float) -> None:
    if not (isinstance(weight, int | float) and weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"{name}={weight!r}, but the weight of a term must be a number >= 0.")
