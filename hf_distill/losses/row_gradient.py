"""Values per item whose gradient is known when they are computed: walking over rows, and handing the gradient back."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# A CPU is fastest while the scratch stays in its cache: 2048 x 32,000 logits in one block took three times as long in
# float32 and five times in bfloat16. Other devices need blocks large enough to hide the launch of each operation.
_CPU_SCRATCH_BYTES = 4 * 2**20
_DEVICE_SCRATCH_BYTES = 256 * 2**20
# So many cost less to read one by one than by an operation.
_FEW_ROWS = 32


def rows_per_block(logits: Tensor, *, buffers: int, dtype: torch.dtype) -> int:
    """How many rows of (..., classes) logits fit the scratch memory, `buffers` times over in `dtype`; at least one."""
    budget = _CPU_SCRATCH_BYTES if logits.device.type == "cpu" else _DEVICE_SCRATCH_BYTES
    fitting = budget // (buffers * logits.shape[-1] * dtype.itemsize)
    return max(1, min(fitting, math.prod(logits.shape[:-1])))


def row_blocks(tensors: Sequence[Tensor], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Matching views (up to `rows`, columns) that cover the tensors' shared leading dimensions; nothing is copied.

    Args:
        tensors: (..., columns) each; columns may differ, strides are arbitrary.
        rows: of a block, at least 1.
    """
    try:
        flat = [tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1]) for tensor in tensors]
    except RuntimeError:
        # Slices such as logits[:, :-1] have no two-dimensional view, but each of their entries has.
        for parts in zip(*tensors, strict=True):
            yield from row_blocks(parts, rows)
        return
    yield from zip(*(tensor.split(rows) for tensor in flat), strict=True)


def may_read(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's values, because nothing has to be waited for."""
    return tensor.device.type == "cpu"


def extremes(column: Tensor) -> tuple[float, float]:
    """The smallest and the largest of (rows, 1) on the host; beside NaN, either is NaN or of the other rows."""
    if column.numel() > _FEW_ROWS:
        smallest, largest = column.aminmax()
        return float(smallest), float(largest)
    values = column.tolist()
    return min(values)[0], max(values)[0]


def is_finite(column: Tensor) -> bool:
    """Whether all of (rows, 1) on the host are."""
    few = column.numel() <= _FEW_ROWS
    return math.isfinite(sum(value for (value,) in column.tolist()) if few else float(column.sum()))


def clear_rows(rows: Tensor, weights: Tensor) -> None:
    """Sets the rows (rows, columns) to 0, even where they hold NaN, whose weight, (rows, 1), is 0."""
    # Masking costs a CPU as much as a softmax, and looking whether there is anything to mask costs it nothing. On
    # other devices looking would wait.
    if not may_read(weights) or not bool(weights.all()):
        rows.masked_fill_(weights == 0, 0.0)


def attach_gradient(values: Tensor, student_logits: Tensor, *, direction: Tensor, scale: Tensor) -> Tensor:
    """The values, with d values / d student_logits = scale * direction; of a scalar, that of the sum over items.

    Backward multiplies `direction` in place and gives it away, so that no second tensor of its size exists; a graph
    that is retained gets a copy. Items whose incoming gradient is 0 get exactly 0, even where `direction` is NaN.

    Args:
        values: (...,) or a scalar, without a graph.
        student_logits: (..., classes); not kept.
        direction: (..., classes) in the dtype of `student_logits`; owned by the graph from here on.
        scale: (..., 1) in the dtype of `values`.
    """
    return _AttachedGradient.apply(student_logits, values, direction, scale)


class _AttachedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, values: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(direction, scale)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, values_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # `once_differentiable` would not do: it lets a second derivative be 0 where the incoming gradient is constant.
        if torch.is_grad_enabled():
            raise RuntimeError("This loss has no second derivative. Call backward without create_graph=True.")
        direction, scale = ctx.saved_tensors
        if _graph_is_retained():
            direction = direction.clone()
        weight = values_gradient.unsqueeze(-1) * scale
        if may_read(weight) and bool((weight == 1).all()):
            return direction, None, None, None
        rows = rows_per_block(direction, buffers=4, dtype=weight.dtype)
        for block, block_weight in row_blocks((direction, weight), rows):
            clear_rows(block.mul_(block_weight), block_weight)
        return direction, None, None, None


def attach_gradients(value: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The scalar `value`, with a gradient for each of several tensors, ready beforehand.

    Backward multiplies the gradients in place and gives them away; a graph that is retained gets copies.

    Args:
        value: a scalar without a graph.
        pairs: a tensor that asks for a gradient, and that gradient, of its shape and dtype; owned by the graph from
            here on.
    """
    tensors, gradients = zip(*pairs, strict=True)
    return _AttachedGradients.apply(value, len(tensors), *tensors, *gradients)


class _AttachedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("This loss has no second derivative. Call backward without create_graph=True.")
        gradients = ctx.saved_tensors
        if _graph_is_retained():
            gradients = [gradient.clone() for gradient in gradients]
        if not (may_read(value_gradient) and bool(value_gradient == 1)):
            gradients = [gradient.mul_(value_gradient) for gradient in gradients]
        return None, None, *gradients, *(None for _ in gradients)


# torch has no public name for this (torch 2.13's own compiled backwards ask the same question before they reuse a
# saved buffer). Without it each backward copies. Were the answer ever wrong, the version counter of the saved
# tensor would make the second backward raise, not return a wrong gradient.
_graph_is_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
