"""Projections of the student's features to the teacher's width, the same on every rank and in every resumed run."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

KINDS = ("linear", "mlp", "identity")
INITS = ("default", "orthogonal")


class Projection(nn.Sequential):
    """Layers from the student's width to the teacher's; without any, the features as they are."""

    def forward(self, features: Tensor) -> Tensor:
        """(..., teacher width) in the dtype of the weights.

        Args:
            features: (..., student width), any float dtype: an adapter trains in float32 beside a bfloat16 model.
        """
        weight = next(self.parameters(), features)
        return super().forward(features.to(weight.dtype))


def make_projection(
    student_width: int,
    teacher_width: int,
    *,
    kind: str,
    init: str,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> Projection:
    """A projection whose weights depend on these arguments alone; torch's random state is neither read nor moved.

    Args:
        student_width: features of the student.
        teacher_width: features of the teacher.
        kind: `linear`; `mlp` with one hidden layer of the teacher's width and a GELU; `identity`.
        init: `default` draws as `nn.Linear` does; `orthogonal` gives orthonormal rows or columns and zero biases.
        bias: whether the layers add one.
        dtype: of the weights: that of the student's trainable parameters, which FSDP wants to be one.
        device: where the weights live. They are drawn on the CPU, so that all kinds of device start alike.
        seed: of the weights.

    Raises:
        ValueError: an unknown kind or init, or an identity between unequal widths.
    """
    for name, value, known in (("projection", kind, KINDS), ("init of a projection", init, INITS)):
        if value not in known:
            raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")
    if kind == "identity":
        if student_width != teacher_width:
            raise ValueError(
                f"An identity cannot compare the student's {student_width} features with the teacher's "
                f"{teacher_width}. Use projection kind 'linear' or 'mlp', or a loss that takes unequal widths."
            )
        return Projection()
    widths = (student_width, teacher_width) if kind == "linear" else (student_width, teacher_width, teacher_width)
    generator = torch.Generator().manual_seed(seed)
    fill = _FILL[init]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        # Drawn in float32: orthogonalisation knows no half precision.
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            fill(layer, generator)
        layers += [nn.GELU(), layer] if layers else [layer]
    return Projection(*layers).to(device, dtype)


def _fill_default(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _fill_orthogonal(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.orthogonal_(layer.weight, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


_FILL: dict[str, Callable[[nn.Linear, torch.Generator], None]] = {
    "default": _fill_default,
    "orthogonal": _fill_orthogonal,
}
