"""A temperature for each item, from the logits of student and teacher."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses.difficulty import DIFFICULTIES, difficulty, logit_distance, student_doubt
from hf_distill.registry import Registry
from hf_distill.temperature.base import Reduce, TemperaturePolicy, check_bounds, check_numbers

# Whether the hardest item is the hottest.
DIRECTIONS: Registry[bool] = Registry("direction")
DIRECTIONS.register("harder_hotter", True)
DIRECTIONS.register("harder_cooler", False)


@dataclass(frozen=True)
class AdaptiveTemperature(TemperaturePolicy):
    """T between `min` and `max` by how hard an item is, which is judged by that item alone.

    With the difficulty d in [0, 1], `harder_hotter` has T = min + (max - min) d**sharpness, and `harder_cooler`
    T = max - (max - min) d**sharpness. Papers go both ways: softer targets keep a hard item's noise small, and sharper
    ones stress its label. An item's T is the same in whatever batch it comes.

    Attributes:
        signal: what says how hard it is: `teacher_entropy`, `teacher_confidence` (the lack of it), `disagreement`
            or `loss`; see `hf_distill.losses.difficulty`.
        direction: `harder_hotter` or `harder_cooler`.
        min: > 0, the least T.
        max: >= min, the greatest T.
        sharpness: > 0; above 1 only the hardest items leave the easy end, below 1 only the easiest stay there.
    """

    signal: str = "teacher_entropy"
    direction: str = "harder_hotter"
    min: float = 2.0
    max: float = 10.0
    sharpness: float = 1.0

    name: ClassVar[str] = "adaptive"

    def __post_init__(self) -> None:
        DIFFICULTIES.get(self.signal)
        DIRECTIONS.get(self.direction)
        check_numbers(self)
        check_bounds(self.min, self.max)
        if not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness!r}, but difficulty**sharpness rises only with one > 0.")

    @torch.no_grad()
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
        """(...,) T of each item; `max` or `min`, as of the hardest, where the logits hold NaN."""
        hard = difficulty(self.signal, student_logits, teacher_logits, binary=binary).nan_to_num_(nan=1.0)
        coolest, hottest = (self.min, self.max) if DIRECTIONS.get(self.direction) else (self.max, self.min)
        return (coolest + (hottest - coolest) * hard**self.sharpness).clamp_(self.min, self.max)

    @property
    def lowest(self) -> float:
        """No T is below this."""
        return self.min

    @property
    def highest(self) -> float:
        """No T is above this."""
        return self.max


@dataclass(frozen=True)
class RelativeTemperature(TemperaturePolicy):
    """T = base + strength * (mean w - w) with a w of each item: the harder items are cooler than the others.

    The mean is over the valid items at hand, so an item's T depends on its batch: accumulation over several smaller
    batches is another training than one large batch.

    Attributes:
        base: T of an average item.
        strength: >= 0; 0 leaves `base` for all.
        min: > 0, the least T.
        max: >= min, the greatest T.

    Source: Wen et al. 2019, arXiv:1911.07471, as TextBrewer's code (Yang et al. 2020, arXiv:2002.12620) has it, which
        knows no bounds.
    """

    base: float = 8.0
    strength: float = 1.0
    min: float = 2.0
    max: float = 10.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check_bounds(self.min, self.max)
        if not self.min <= self.base <= self.max:
            raise ValueError(f"base={self.base!r} is not between min={self.min!r} and max={self.max!r}.")
        if self.strength < 0:
            raise ValueError(
                f"strength={self.strength!r}, but {self.name} makes harder items cooler. Give a number >= 0; the "
                "other way round is {policy: adaptive, direction: harder_hotter}."
            )

    @abstractmethod
    def weight(self, student_logits: Tensor, teacher_logits: Tensor, *, binary: bool) -> Tensor:
        """(...,) w, larger for harder items."""

    @torch.no_grad()
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
        """(...,) T of each item; `base` where the logits hold NaN."""
        weight = self.weight(student_logits, teacher_logits, binary=binary)
        counted = ~weight.isnan() if valid is None else ~weight.isnan() & valid
        total = torch.stack((weight.where(counted, 0.0).sum(), counted.sum().to(weight.dtype)))
        if reduce is not None:
            total = reduce(total)
        mean = total[0] / total[1].clamp_min(1.0)
        return (self.base + self.strength * (mean - weight)).nan_to_num_(nan=self.base).clamp_(self.min, self.max)

    @property
    def lowest(self) -> float:
        """No T is below this."""
        return self.min

    @property
    def highest(self) -> float:
        """No T is above this."""
        return self.max


@dataclass(frozen=True)
class FlswTemperature(RelativeTemperature):
    """FLSW: w = (1 - cos(z_s, z_t))**power, so items on which the logits point elsewhere are cooler.

    Attributes:
        power: > 0.
    """

    power: float = 2.0

    name: ClassVar[str] = "flsw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power={self.power!r}, but distance**power rises only with one > 0.")

    def weight(self, student_logits: Tensor, teacher_logits: Tensor, *, binary: bool) -> Tensor:
        """(...,) w in [0, 2**power]."""
        return logit_distance(student_logits, teacher_logits) ** self.power


@dataclass(frozen=True)
class CwsmTemperature(RelativeTemperature):
    """CWSM: w = 1 / (max p_s + 0.001), so items of which the student is unsure are cooler."""

    name: ClassVar[str] = "cwsm"

    def weight(self, student_logits: Tensor, teacher_logits: Tensor, *, binary: bool) -> Tensor:
        """(...,) w, about 1 where the student is certain."""
        return student_doubt(student_logits, teacher_logits, binary=binary)
