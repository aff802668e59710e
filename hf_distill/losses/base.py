"""What every loss shares: its entry in the registry, the checks of its inputs, and the masked sum of its values.

A loss takes (..., features) tensors and returns (...,) float32 values, one per item. It sees no mask and no reduction.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_distill.registry import Registry

LossFunction = TypeVar("LossFunction", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Reference:
    """How a paper, or its authors' code, reduces a loss, where that is not this project's way.

    Attributes:
        items: `token_mean` over all items, or `sample_mean`: each sequence's own mean first.
        pairs: whether a term over several layer pairs is their `sum` or their `mean`.
    """

    items: str = "token_mean"
    pairs: str = "sum"


@dataclass(frozen=True)
class LossSpec:
    """One registered loss.

    Attributes:
        name: the name that configurations and logs use.
        function: (student, teacher, *, ...) -> (...,) float32 values.
        feature: the signal that it compares: "logits", "hidden" (vectors), "attention" and "relation" (`Scores`),
            "tokens" (the vectors of a sequence among each other), "batch" (those of the rows of a batch), "domain".
        item: what one of its values stands for, and so what its sum is divided by: "position", "token", "pair",
            "row" (of scores) or "sequence".
        paper: the source of the formula, as a model card should cite it.
        reference: how the paper reduces it.
        compares: of a loss of logits, what they are to it: "classes" (one distribution over them), "labels" (a choice
            of its own each) or "outputs" (plain numbers).
        min_classes: of a loss of logits, with how many classes it begins to say anything; with fewer it is constant.
        any_classes: of a loss of logits, whether the teacher's classes may be others than the student's.
    """

    name: str
    function: Callable[..., Tensor]
    feature: str
    item: str
    paper: str
    reference: Reference = Reference()
    compares: str = "classes"
    min_classes: int = 1
    any_classes: bool = False

    @property
    def takes_temperature(self) -> bool:
        """Whether the function has a `temperature` keyword; the others must not be given one."""
        return "temperature" in self._keywords

    @property
    def takes_targets(self) -> bool:
        """Whether the function has a `targets` keyword: (...,) int64 classes of the labels, -100 for none."""
        return "targets" in self._keywords

    @property
    def compares_rows(self) -> bool:
        """Whether the function compares items with each other; it then has a `valid` keyword, (items,) bool."""
        return "valid" in self._keywords

    @property
    def options(self) -> tuple[str, ...]:
        """Of a loss of logits, the keywords that are the user's: all but those that the term and the batch fill in."""
        return tuple(name for name in self._keywords if name not in _FILLED_IN)

    @functools.cached_property
    def _keywords(self) -> list[str]:
        parameters = inspect.signature(self.function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


LOSSES: Registry[LossSpec] = Registry("loss")
# Keywords of losses of logits that the composition fills in.
_FILLED_IN = frozenset({"temperature", "targets", "valid"})


def register_loss(
    name: str,
    *,
    feature: str,
    item: str,
    paper: str,
    reference: Reference = Reference(),
    compares: str = "classes",
    min_classes: int = 1,
    any_classes: bool = False,
) -> Callable[[LossFunction], LossFunction]:
    """A decorator that enters a function into `LOSSES` and returns it unchanged; arguments as in `LossSpec`."""

    def register(function: LossFunction) -> LossFunction:
        spec = LossSpec(name, function, feature, item, paper, reference, compares, min_classes, any_classes)
        LOSSES.register(name, spec)
        return function

    return register


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum of the values that the mask keeps, a scalar in float32 (float64 for float64 values).

    Values outside the mask may be NaN or inf. Where nothing is kept the sum is 0 and still has a graph.

    Args:
        values: (...,) one value per item.
        mask: bool, same shape as `values`, True for the items that count; None counts all.
    """
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool. Pass mask.bool().")
        if mask.shape != values.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, values have {tuple(values.shape)}; they must be equal. "
                "Shift and trim both in the same way."
            )
        values = torch.where(mask, values, 0.0)
    return values.sum(dtype=compute_dtype(values))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where one of the tensors is float64."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuses logits of unequal shape or without a class."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits "
            f"{tuple(teacher_logits.shape)}; they must be equal. Align positions and vocabularies first."
        )
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(
            f"Logits have shape {tuple(student_logits.shape)}; expected (..., classes) with at least one class."
        )


def item_temperature(temperature: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperature as a (..., 1) tensor beside (..., classes) logits.

    A number is checked here; a tensor's values are trusted, since reading them would wait for the device.

    Args:
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        logits: (..., classes).
        dtype: of the result.
    """
    items = logits.shape[:-1]
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a finite number above 0.")
        return torch.full((), temperature, dtype=dtype, device=logits.device).expand(*items, 1)
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, but this loss has none for it. Pass temperature.detach().")
    if temperature.dim() and temperature.shape != items:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} beside logits {tuple(logits.shape)}; "
            f"expected a scalar or one value per item, {tuple(items)}."
        )
    return temperature.to(logits.device, dtype).expand(items).unsqueeze(-1)
