"""Task and logit term of a language model from its last hidden states: no tensor of items x vocabulary.

The items are projected chunk by chunk. The gradient of the logits is formed while a chunk's logits are at hand, over
them, and goes into those of hidden states and head at once, so that nothing is computed twice and no graph is kept.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype, item_temperature
from hf_distill.losses.head_products import ChunkedHead
from hf_distill.losses.head_rows import Divergence, HeadItems, RowLosses
from hf_distill.losses.row_gradient import attach_gradients, may_read
from hf_distill.signals import LogitFactors

# For the logits of a chunk, of both sides together.
_CPU_CHUNK_BYTES = 128 * 2**20
_DEVICE_CHUNK_BYTES = 2**30
# With fewer items the products wait for the memory of the head.
_SMALLEST_CHUNK = 256


def chunked_head_loss(
    student: LogitFactors,
    teacher: LogitFactors,
    targets: Tensor,
    *,
    task_weights: Tensor,
    kd_weights: Tensor,
    temperature: float | Tensor = 1.0,
    divergence: Divergence | None = None,
    chunk_bytes: int | None = None,
    float32_logits: bool | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of cross-entropy and a divergence between two heads' logits, and both per item, in nats.

    Value and gradients are those of `cross_entropy_and_forward_kl` on the dense logits, or for another divergence
    those of the two terms apart. Items of weight 0 in both are left out before anything of them is projected, and may
    hold anything. The student's hidden states, weight and bias get gradients, each where it asks for one; they are
    formed here, so there is no second derivative, and backward reads neither head.

    The operands of all products have the dtype that autocast asks for, or else that of their side's weight.

    Args:
        student: (..., width) hidden states and a head of `classes`.
        teacher: (..., a width of its own) and a head; gets no gradient. The divergence compares the distributions over
            the leading classes that both have; the cross-entropy is over all of the student's.
        targets: (...,) int64 in [0, classes); any number where the task weight is 0.
        task_weights: (...,) >= 0, of each cross-entropy.
        kd_weights: (...,) >= 0, of each divergence.
        temperature: > 0, of the divergence alone; a number, a scalar tensor or one value per item, (...,).
        divergence: None for `forward_kl`.
        chunk_bytes: of both sides' logits at once, though never of less than 256 items; None: as suits the device.
        float32_logits: whether logits are float32 where operands are not; None: where it costs no time, not on CPUs.
        kept: (any,) int64, in order, the places among all items of those with a weight; None makes the host find them.

    Returns: the loss, a float32 scalar, sum(task_weights * cross_entropy + kd_weights * divergence); the cross-entropy
        and the divergence, (...,) float32 each, without a graph and 0 where their weight is 0.
    """
    divergence = Divergence() if divergence is None else divergence
    _check(student, teacher, targets, task_weights=task_weights, kd_weights=kd_weights)
    device = targets.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needs_gradient = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        shared = min(len(student.weight), len(teacher.weight))
        student_head = _head(student, len(student.weight), autocast, float32_logits)
        teacher_head = _head(teacher, shared, autocast, float32_logits)
        items = _items(student, targets, task_weights, kd_weights, temperature)
        is_one = not isinstance(temperature, Tensor) and temperature == 1
        block = RowLosses(divergence, student, teacher.softcap, one_softmax=is_one and shared == len(student.weight))
        if kept is None:
            kept = ((items.task > 0) | (items.kd > 0)).squeeze(-1).nonzero().squeeze(-1)
        _walk(student_head, teacher_head, items, block, kept, chunk_bytes, needs_gradient=needs_gradient)
        loss = (items.task * items.cross_entropy + items.kd * items.divergence).sum()
    if pairs := student_head.attached():
        loss = attach_gradients(loss, pairs)
    return loss, items.cross_entropy.view(targets.shape), items.divergence.view(targets.shape)


def _head(
    factors: LogitFactors, classes: int, autocast: torch.dtype | None, float32_logits: bool | None
) -> ChunkedHead:
    products = factors.weight.dtype if autocast is None else autocast
    if float32_logits is None:  # from bfloat16 they cost a CPU 2.8 times as much
        float32_logits = factors.weight.device.type != "cpu"
    logits = torch.promote_types(products, torch.float32) if float32_logits else products
    return ChunkedHead(factors, classes=classes, dtype=products, logits_dtype=logits)


def _items(
    student: LogitFactors, targets: Tensor, task_weights: Tensor, kd_weights: Tensor, temperature: float | Tensor
) -> HeadItems:
    dtype = compute_dtype(student.hidden)
    task, kd = (weights.to(dtype).reshape(-1, 1) for weights in (task_weights, kd_weights))
    return HeadItems(
        targets.reshape(-1, 1).masked_fill(task == 0, 0),
        task,
        kd,
        item_temperature(temperature, student.hidden, dtype).reshape(-1, 1),
        *task.new_zeros(2, *task.shape),
    )


def _walk(
    student: ChunkedHead,
    teacher: ChunkedHead,
    items: HeadItems,
    block: RowLosses,
    kept: Tensor,
    chunk_bytes: int | None,
    *,
    needs_gradient: bool,
) -> None:
    """Fills in the values of the items that are kept, and the student's gradients."""
    budget = chunk_bytes or (_CPU_CHUNK_BYTES if may_read(kept) else _DEVICE_CHUNK_BYTES)
    chunk = max(budget // (student.row_bytes + teacher.row_bytes), _SMALLEST_CHUNK)
    chunks = -(-len(kept) // chunk)
    chunk = -(-len(kept) // max(chunks, 1))  # of equal size
    for head, gradients in ((student, needs_gradient), (teacher, False)):
        head.reserve(chunk, gradients=gradients)
    for places in _places(kept, chunk, len(items.task)):
        hidden = student.hidden(places)
        logits, teacher_logits = student.logits(hidden), teacher.logits(teacher.hidden(places))
        direction = student.direction(logits) if student.gradients else None
        chosen = HeadItems(*(column[places] for column in items))
        block.walk(logits, teacher_logits, chosen, direction)
        items.cross_entropy[places], items.divergence[places] = chosen.cross_entropy, chosen.divergence
        if direction is not None:
            student.collect(places, hidden, direction)


def _places(kept: Tensor, chunk: int, items: int) -> Iterator[Tensor | slice]:
    """The indices of the kept items, chunk by chunk; slices, which copy nothing, where all are kept."""
    if len(kept) < items:
        yield from kept.split(max(chunk, 1))
        return
    for start in range(0, items, max(chunk, 1)):
        yield slice(start, start + chunk)


def _check(student: LogitFactors, teacher: LogitFactors, targets: Tensor, **weights: Tensor) -> None:
    items = student.hidden.shape[:-1]
    for name, side in {"student": student, "teacher": teacher}.items():
        if side.hidden.shape[:-1] != items or side.hidden.shape[-1] != side.weight.shape[-1] or not len(side.weight):
            raise ValueError(
                f"The {name}'s hidden states have shape {tuple(side.hidden.shape)} and its head "
                f"{tuple(side.weight.shape)} beside items {tuple(items)}; expected (*items, width) and (classes, "
                "width). Give both models the same positions."
            )
        if torch.float16 in (side.weight.dtype, side.hidden.dtype):
            raise ValueError(
                f"The {name}'s head is in float16, whose range does not hold gradients of 1 / (items * vocabulary). "
                "Use bfloat16, or form the dense logits."
            )
    for name, tensor in {"targets": targets, **weights}.items():
        if tensor.shape != items:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one value per item, {tuple(items)}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets have dtype {targets.dtype}; expected torch.int64. Pass targets.long().")
