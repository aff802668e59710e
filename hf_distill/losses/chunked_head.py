"""Task and logit term of a language model from its last hidden states: no tensor of items x vocabulary.

The items are projected chunk by chunk. The gradient of the logits is formed while a chunk's logits are at hand, over
them, and goes into those of hidden states and head at once, so that nothing is computed twice and no graph is kept.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype, item_temperature
from hf_distill.losses.head_products import ChunkedHead, Workspace
from hf_distill.losses.head_rows import Divergence, HeadItems, ItemTemperature, RowLosses
from hf_distill.losses.row_gradient import attach_gradients, may_read
from hf_distill.signals import LogitFactors

# For the logits of a chunk, of both sides together.
_CPU_CHUNK_BYTES = 96 * 2**20
_DEVICE_CHUNK_BYTES = 2**30
# With fewer items the products wait for the memory of the head.
_SMALLEST_CHUNK = 256
# The products work in blocks: on a CPU 391 items cost 6 % more each than 384.
_BLOCK = 128
_FLOAT16 = (
    "{} float16, whose range does not hold gradients of 1 / (items * vocabulary). Use bfloat16, or form the dense "
    "logits."
)


class HeadTerms(NamedTuple):
    """What `chunked_head_loss` forms; all but the loss has a value per item, (...,), and no graph.

    Attributes:
        loss: a float32 scalar, sum(task_weights * cross_entropy + kd_weights * divergence).
        cross_entropy: float32, 0 where its weight is 0.
        divergence: float32, 0 where its weight is 0.
        temperature: float32, 1 where it is made of the logits of an item that was left out.
        agreement: bool, whether both sides choose the same of the leading classes; None where nobody asked.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    temperature: Tensor
    agreement: Tensor | None = None


def chunked_head_loss(
    student: LogitFactors,
    teacher: LogitFactors,
    targets: Tensor,
    *,
    task_weights: Tensor,
    kd_weights: Tensor,
    temperature: float | Tensor | ItemTemperature = 1.0,
    divergence: Divergence | None = None,
    agreement: bool = False,
    chunk_bytes: int | None = None,
    float32_logits: bool | None = None,
    kept: Tensor | None = None,
    workspace: Workspace | None = None,
) -> HeadTerms:
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
        targets: (...,) int64 in [0, classes), also of a divergence that takes labels; any other number, for none,
            where the task weight is 0.
        task_weights: (...,) >= 0, of each cross-entropy.
        kd_weights: (...,) >= 0, of each divergence.
        temperature: > 0, of the divergence alone; a number, a scalar tensor, one value per item, (...,), or what makes
            each item's of its logits.
        divergence: None for `forward_kl`.
        agreement: whether to say on which items both sides choose the same class.
        chunk_bytes: of both sides' logits at once, though never of less than 256 items; None: as suits the device.
        float32_logits: whether logits are float32 where operands are not; None: where it costs no time, not on CPUs.
        kept: (any,) int64, in order, the places among all items of those with a weight; None makes the host find them.
        workspace: memory of the call before, which saves a training time; None takes new.
    """
    check_items({"student": student, "teacher": teacher}, targets, task_weights=task_weights, kd_weights=kd_weights)
    device = targets.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needs_gradient = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        student_head = _head(student, len(student.weight), autocast, float32_logits)
        teacher_head = _head(teacher, min(len(student.weight), len(teacher.weight)), autocast, float32_logits)
        items = _items(student, targets, task_weights, kd_weights, temperature)
        block = RowLosses(divergence or Divergence(), student, teacher, temperature=temperature, agreement=agreement)
        kept = _weighed(items.task, items.kd) if kept is None else kept
        chunk = chunk_items(kept, student_head.row_bytes + teacher_head.row_bytes, chunk_bytes)
        for head, gradients in ((student_head, needs_gradient), (teacher_head, False)):
            head.reserve(chunk, workspace, is_student=head is student_head, gradients=gradients)
        _walk(student_head, teacher_head, items, block, kept, chunk)
        loss = (items.task * items.cross_entropy + items.kd * items.divergence).sum()
    if pairs := student_head.attached():
        loss = attach_gradients(loss, pairs)
    temperatures, cross_entropy, value, agrees = (column.view(targets.shape) for column in items[-4:])
    return HeadTerms(loss, cross_entropy, value, temperatures, agrees if agreement else None)


def _weighed(task: Tensor, kd: Tensor) -> Tensor:
    """(any,) the places of the items, (items, 1), that have a weight."""
    return ((task > 0) | (kd > 0)).squeeze(-1).nonzero().squeeze(-1)


def _head(
    factors: LogitFactors, classes: int, autocast: torch.dtype | None, float32_logits: bool | None
) -> ChunkedHead:
    products = factors.weight.dtype if autocast is None else autocast
    if products == torch.float16:
        raise ValueError(_FLOAT16.format("Autocast asks for"))
    if float32_logits is None:  # from bfloat16 they cost a CPU 2.8 times as much
        float32_logits = factors.weight.device.type != "cpu"
    logits = torch.promote_types(products, torch.float32) if float32_logits else products
    return ChunkedHead(factors, classes=classes, dtype=products, logits_dtype=logits)


def _items(
    student: LogitFactors,
    targets: Tensor,
    task_weights: Tensor,
    kd_weights: Tensor,
    temperature: float | Tensor | ItemTemperature,
) -> HeadItems:
    dtype = compute_dtype(student.hidden)
    task, kd = (weights.to(dtype).reshape(-1, 1) for weights in (task_weights, kd_weights))
    given: float | Tensor = 1.0 if callable(temperature) else temperature
    return HeadItems(
        targets.reshape(-1, 1),
        task,
        kd,
        item_temperature(given, student.hidden, dtype).reshape(-1, 1).contiguous(),  # it may be written
        torch.zeros_like(task),
        torch.zeros_like(task),
        torch.zeros_like(task, dtype=torch.bool),
    )


def _walk(
    student: ChunkedHead,
    teacher: ChunkedHead,
    items: HeadItems,
    block: RowLosses,
    kept: Tensor,
    chunk: int,
) -> None:
    """Fills in the values of the items that are kept, and the student's gradients."""
    has_labels = not may_read(items.task) or bool(items.task.any())
    dtypes = (student.logits_dtype, teacher.logits_dtype)
    given = block.factors(dtypes, items.task.device)
    for places in _places(kept, chunk, len(items.task)):
        hidden = student.hidden(places)
        logits = student.logits(hidden, factor=given.student if given else 1.0)
        teacher_logits = teacher.logits(teacher.hidden(places), factor=given.teacher if given else 1.0)
        direction = student.direction(logits) if student.gradients else None
        chosen = HeadItems(*(column[places] for column in items))
        share = block.walk(logits, teacher_logits, chosen, direction, has_labels=has_labels, given=given)
        if isinstance(places, Tensor):  # else they are the items' own memory
            for column, written in zip(items[-4:], chosen[-4:], strict=True):
                column[places] = written
        if direction is not None:
            student.collect(places, hidden, direction, share)


def chunk_items(kept: Tensor, row_bytes: int, chunk_bytes: int | None) -> int:
    """How many of the items that are kept make one of several chunks of equal size."""
    budget = chunk_bytes or (_CPU_CHUNK_BYTES if may_read(kept) else _DEVICE_CHUNK_BYTES)
    chunk = max(budget // row_bytes // _BLOCK * _BLOCK, _SMALLEST_CHUNK)
    chunks = -(-len(kept) // chunk)
    return -(-len(kept) // max(chunks, 1))


def _places(kept: Tensor, chunk: int, items: int) -> Iterator[Tensor | slice]:
    """The indices of the kept items, chunk by chunk; slices, which copy nothing, where all are kept."""
    if len(kept) < items:
        yield from kept.split(max(chunk, 1))
        return
    for start in range(0, items, max(chunk, 1)):
        yield slice(start, start + chunk)


def check_items(sides: Mapping[str, LogitFactors], targets: Tensor, **weights: Tensor) -> None:
    """Refuses what is not of the items of the student, the first side, and heads that cannot be computed with."""
    items = next(iter(sides.values())).hidden.shape[:-1]
    for name, side in sides.items():
        if side.hidden.shape[:-1] != items or side.hidden.shape[-1] != side.weight.shape[-1] or not len(side.weight):
            raise ValueError(
                f"The {name}'s hidden states have shape {tuple(side.hidden.shape)} and its head "
                f"{tuple(side.weight.shape)} beside items {tuple(items)}; expected (*items, width) and (classes, "
                "width). Give both models the same positions."
            )
        if torch.float16 in (side.weight.dtype, side.hidden.dtype):
            raise ValueError(_FLOAT16.format(f"The {name}'s head is in"))
    for name, tensor in {"targets": targets, **weights}.items():
        if tensor.shape != items:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one value per item, {tuple(items)}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets have dtype {targets.dtype}; expected torch.int64. Pass targets.long().")
