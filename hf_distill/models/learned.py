"""The temperature that is trained against the student, as CTKD has it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from hf_distill.losses.difficulty import top_probabilities

_CLASSES = 32
_HIDDEN = 64


class TemperatureModule(nn.Module):
    """T = minimum + spread * sigmoid(θ) with a θ that is one parameter, or has a part of its own for each item.

    An item's own part comes from a network of one hidden layer, which sees the teacher's 32 largest probabilities and
    the student's of the same classes, so that it has one size whatever the vocabulary. It begins at 0, and θ at 1 as
    in the authors' code: all items begin at the same T. The logits get no gradient.

    Args:
        minimum: > 0, the least T.
        spread: > 0, how far above it T can get.
        per_item: whether items have parts of their own.
        dtype: of the weights: that of the student's trainable parameters, which FSDP wants to be one.
        device: where the weights live. They are drawn on the CPU, so that all kinds of device start alike.
        seed: of the weights; torch's random state is neither read nor moved.

    Source: Li et al. 2022, arXiv:2211.16231; there the network of the instance scope sees the whole
        vectors of both.
    """

    def __init__(
        self,
        *,
        minimum: float,
        spread: float,
        per_item: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.minimum, self.spread, self.per_item = minimum, spread, per_item
        # FSDP2 shards no scalars, hence (1,).
        self.theta = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
        if per_item:
            # The hidden layer's bias is the weight of a constant 1: PEFT would save a parameter called `bias`.
            inner = torch.empty(_HIDDEN, 2 * _CLASSES + 1)
            nn.init.kaiming_uniform_(inner, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
            self.inner = nn.Parameter(inner.to(device, dtype))
            self.outer = nn.Parameter(torch.zeros(1, _HIDDEN, dtype=dtype, device=device))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, *, reversal: float = 1.0) -> Tensor:
        """T in float32 with its graph to the weights: a scalar, or (...,) for each item; finite for rows with NaN.

        Args:
            student_logits: (..., classes), any float dtype.
            teacher_logits: (..., classes).
            reversal: what the weights' gradient is multiplied by; below 0 they climb what the student descends.
        """
        theta = self.theta.float().squeeze(0)
        if self.per_item:
            probabilities = top_probabilities(student_logits, teacher_logits, classes=_CLASSES).float()
            features = functional.pad(probabilities.nan_to_num(nan=0.0).flatten(-2), (0, 1), value=1.0)
            with torch.autocast(features.device.type, enabled=False):
                hidden = functional.linear(features, self.inner.float()).relu()
                theta = theta + functional.linear(hidden, self.outer.float()).squeeze(-1)
        return self.minimum + self.spread * scale_gradient(theta, reversal).sigmoid()

    def of(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        reversal: float,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, with other tensors for the weights by their names.

        Args:
            student_logits: (..., classes).
            teacher_logits: (..., classes).
            reversal: as of `forward`.
            parameters: what stands for the weights, such as those that went through the student's forward, where DDP
                sees them; None takes the module's own.
        """
        options = {"reversal": reversal}
        return functional_call(self, dict(parameters or {}), (student_logits, teacher_logits), options)


def scale_gradient(values: Tensor, factor: float) -> Tensor:
    """The values, whose gradient arrives at what they were made from multiplied by the factor.

    Args:
        values: any shape.
        factor: -1 turns descent into ascent, 0 stops it.

    Source: Ganin et al. 2015, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818, the gradient
        reversal layer.
    """
    return _ScaledGradient.apply(values, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
