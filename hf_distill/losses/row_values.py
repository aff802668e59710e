"""Values per item from a function of a block of rows, which forms the gradient at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype
from hf_distill.losses.divergence import FLOAT16_HEADROOM
from hf_distill.losses.row_gradient import attach_gradient, row_blocks, rows_per_block


def values_by_rows(
    block: Callable[..., tuple[Tensor, Tensor]],
    student_logits: Tensor,
    teacher_logits: Tensor,
    *columns: Tensor,
    buffers: int,
) -> Tensor:
    """(...,) values whose gradient by the student's logits is the only tensor of their size that outlives a block.

    Args:
        block: (student, teacher, *columns) -> (rows, 1) values and their (rows, classes) gradient by `student`. The
            logits arrive as (rows, classes) in float32 or float64, to be read.
        student_logits: (..., classes).
        teacher_logits: (..., classes); carries no gradient.
        columns: (..., 1) each, what an item has beside its logits.
        buffers: how many tensors of its logits' size `block` holds at once.
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        values = torch.empty((*student_logits.shape[:-1], 1), dtype=dtype, device=student_logits.device)
        scale = torch.ones_like(values)
        tensors = [student_logits, teacher_logits, values, scale, *columns]
        if needs_gradient:
            direction = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=values.device)
            tensors.append(direction)
        rows = rows_per_block(student_logits, buffers=buffers, dtype=dtype)
        for student, teacher, value, size, *rest in row_blocks(tensors, rows):
            formed, gradient = block(student.to(dtype), teacher.to(dtype), *rest[: len(columns)])
            value.copy_(formed)
            if needs_gradient:
                _write_gradient(gradient, out=rest[-1], scale=size)
    if not needs_gradient:
        return values.squeeze(-1)
    return attach_gradient(values.squeeze(-1), student_logits, direction=direction, scale=scale)


def _write_gradient(gradient: Tensor, *, out: Tensor, scale: Tensor) -> None:
    """Writes `out` and, where the range of its dtype asks for it, `scale`: the gradient is their product."""
    if out.dtype == torch.float16:
        size = torch.linalg.vector_norm(gradient, math.inf, -1, keepdim=True) / FLOAT16_HEADROOM
        # A factor that is not finite would also reach an item that nobody asks for.
        scale.copy_(torch.where((size > 0) & size.isfinite(), size, 1.0))
        gradient = gradient / scale
    out.copy_(gradient)
