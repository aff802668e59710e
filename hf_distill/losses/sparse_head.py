"""Task and logit term of a language model from its last hidden states and a teacher's most likely classes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype
from hf_distill.losses.chunked_head import HeadTerms, _head, _places, _weighed, check_items, chunk_items
from hf_distill.losses.head_products import ChunkedHead, Workspace
from hf_distill.losses.head_rows import Divergence, _cap
from hf_distill.losses.row_gradient import attach_gradients, row_blocks, rows_per_block
from hf_distill.losses.sparse import bucket_divergence, sparse_form, teacher_buckets, without_classes
from hf_distill.signals import LogitFactors, SparseLogits

_LOG_2, _LOG2_E = math.log(2), math.log2(math.e)


def sparse_head_loss(
    student: LogitFactors,
    teacher: SparseLogits,
    targets: Tensor,
    *,
    task_weights: Tensor,
    kd_weights: Tensor,
    divergence: Divergence | None = None,
    classes: int | None = None,
    agreement: bool = False,
    chunk_bytes: int | None = None,
    float32_logits: bool | None = None,
    kept: Tensor | None = None,
    workspace: Workspace | None = None,
) -> HeadTerms:
    """The weighted sum of cross-entropy and `sparse_divergence` of a head's logits, and both per item, in nats.

    As `chunked_head_loss`, with one head to project on. The gradient reaches the student's whole vocabulary: those of
    the classes in the tail are formed in the chunk, each in proportion to its probability.

    Args:
        student: (..., width) hidden states and a head of all its classes.
        teacher: (..., k) of the same items; its temperature is the divergence's.
        targets: (...,) int64 in [0, classes of the student); any number where the task weight is 0.
        task_weights: (...,) >= 0, of each cross-entropy.
        kd_weights: (...,) >= 0, of each divergence.
        divergence: one of `losses.sparse.SPARSE_LOSSES`; None for `forward_kl`.
        classes: how many leading classes the divergence compares; None for all of the student's.
        agreement: whether to say on which items both sides choose the same of these.
        chunk_bytes: of the logits at once, though never of less than 256 items; None: as suits the device.
        float32_logits: whether logits are float32 where operands are not; None: where it costs no time, not on CPUs.
        kept: (any,) int64, in order, the places among all items of those with a weight; None makes the host find them.
        workspace: as of `chunked_head_loss`.
    """
    divergence, teacher = sparse_form(divergence or Divergence(), teacher)
    check_items({"student": student}, targets, task_weights=task_weights, kd_weights=kd_weights)
    if teacher.indices.shape[:-1] != targets.shape:
        raise ValueError(
            f"The teacher's classes have shape {tuple(teacher.indices.shape)} beside items {tuple(targets.shape)}; "
            "expected (*items, k). Give both models the same positions."
        )
    device = targets.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needs_gradient = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head = _head(student, len(student.weight), autocast, float32_logits)
        items = _items(teacher, targets, task_weights, kd_weights, dtype=compute_dtype(student.hidden))
        kept = _weighed(items.task, items.kd) if kept is None else kept
        block = _RowLosses(divergence, student, teacher.temperature, classes, agreement=agreement)
        chunk = chunk_items(kept, head.row_bytes, chunk_bytes)
        head.reserve(chunk, workspace, is_student=True, gradients=needs_gradient)
        _walk(head, items, block, kept, chunk)
        loss = (items.task * items.cross_entropy + items.kd * items.divergence).sum()
    if pairs := head.attached():
        loss = attach_gradients(loss, pairs)
    cross_entropy, value, agrees = (column.view(targets.shape) for column in items[-3:])
    temperature = torch.full_like(value, teacher.temperature)
    return HeadTerms(loss, cross_entropy, value, temperature, agrees if agreement else None)


class _Items(NamedTuple):
    """(items, 1), or (items, k) of the teacher: what an item has beside its hidden states, and its values."""

    indices: Tensor
    log_probs: Tensor
    targets: Tensor
    task: Tensor
    kd: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    agreement: Tensor


def _items(
    teacher: SparseLogits, targets: Tensor, task_weights: Tensor, kd_weights: Tensor, *, dtype: torch.dtype
) -> _Items:
    task, kd = (weights.to(dtype).reshape(-1, 1) for weights in (task_weights, kd_weights))
    return _Items(
        teacher.indices.flatten(0, -2),
        teacher.log_probs.flatten(0, -2),
        targets.reshape(-1, 1).masked_fill(task == 0, 0),
        task,
        kd,
        cross_entropy=torch.zeros_like(task),
        divergence=torch.zeros_like(task),
        agreement=torch.zeros_like(task, dtype=torch.bool),
    )


def _walk(
    student: ChunkedHead,
    items: _Items,
    block: "_RowLosses",
    kept: Tensor,
    chunk: int,
) -> None:
    """Fills in the values of the items that are kept, and the student's gradients."""
    for places in _places(kept, chunk, len(items.task)):
        hidden = student.hidden(places)
        logits = student.logits(hidden)
        direction = student.direction(logits) if student.gradients else None
        chosen = _Items(*(column[places] for column in items))
        block.walk(logits, chosen, direction)
        for column, part in zip(items[-3:], chosen[-3:], strict=True):
            column[places] = part
        if direction is not None:
            student.collect(places, hidden, direction)


class _Rows(NamedTuple):
    """A block of rows; what has one column per row is (rows, 1)."""

    student: Tensor  # (rows, classes) capped logits, used up
    classes: Tensor  # (rows, k)
    is_given: Tensor  # (rows, k)
    teacher: Tensor  # (rows, k + 1)
    choice: Tensor
    targets: Tensor
    task: Tensor  # the weights of the gradients
    kd: Tensor
    cross_entropy: Tensor  # written
    divergence: Tensor  # written
    agreement: Tensor  # written where it is asked for
    direction: Tensor | None = None  # (rows, classes), written


class _RowLosses:
    """The two terms of rows of logits, a block of rows at a time; as `head_rows.RowLosses`."""

    def __init__(
        self,
        divergence: Divergence,
        student: LogitFactors,
        temperature: float,
        classes: int | None,
        *,
        agreement: bool,
    ) -> None:
        self._divergence, self._temperature, self._agreement = divergence, temperature, agreement
        self._shared = min(classes or len(student.weight), len(student.weight))
        self._scale, self._softcap = student.scale, student.softcap
        self._one_softmax = temperature == 1 and self._shared == len(student.weight)

    def walk(self, logits: Tensor, items: _Items, direction: Tensor | None) -> None:
        """Writes the values of a chunk's items, and over its logits their gradient before scale.

        Args:
            logits: (items, classes) before the softcap; used up.
            items: the items; their values are written.
            direction: (items, classes) in the memory of `logits`, row by row; None where no gradient is asked for.
        """
        buffers, dtype = 3 if self._softcap is None else 4, items.task.dtype
        rows = rows_per_block(logits, buffers=buffers, dtype=dtype)
        scratch = torch.empty(buffers, rows * logits.shape[-1], dtype=dtype, device=logits.device)
        sparse = SparseLogits(items.indices, items.log_probs, self._temperature)
        teacher, choice = teacher_buckets(sparse, self._shared, dtype), sparse.likeliest(self._shared).unsqueeze(-1)
        weights = [items.task * self._scale, items.kd * self._scale]
        tensors = [logits, *teacher, choice, items.targets, *weights, *items[-3:]]
        for block in row_blocks([*tensors, *([] if direction is None else [direction])], rows):
            part = _Rows(*block)
            slope = None
            if self._softcap is not None:
                slope = scratch[3, : part.student.numel()].view(part.student.shape)
                _cap(part.student, self._softcap, slope=slope)
            self._block(part, scratch)
            if part.direction is not None and slope is not None:
                part.direction.mul_(slope)
        items.cross_entropy.masked_fill_(items.task == 0, 0.0)
        items.divergence.masked_fill_(items.kd == 0, 0.0)

    def _block(self, rows: _Rows, scratch: Tensor) -> None:
        """All but the cap. Logarithms are to base 2, relative to that of the likeliest class without an entry."""
        student, dtype = rows.student, scratch.dtype
        if self._agreement:
            torch.eq(student[:, : self._shared].argmax(-1, keepdim=True), rows.choice, out=rows.agreement)
        exps, powers = (buffer[: student.numel()].view(student.shape) for buffer in scratch[:2])
        label = student.gather(-1, rows.targets).to(dtype)
        named = student.gather(-1, rows.classes).to(dtype).masked_fill_(~rows.is_given, -torch.inf)
        without_classes(student, rows.classes, rows.is_given)
        base = _write_powers(student, named, out=powers)
        torch.exp2(powers, out=exps)
        total = exps.sum(-1, keepdim=True)
        parts = torch.cat([torch.add(base, named, alpha=_LOG2_E), total.log2()], -1).mul_(_LOG_2)
        log_sum = parts.logsumexp(-1, keepdim=True)
        torch.sub(log_sum, torch.add(base, label, alpha=_LOG2_E), alpha=_LOG_2, out=rows.cross_entropy)
        soft, soft_total, buckets = exps, total, parts
        if not self._one_softmax:
            soft = scratch[2, : len(student) * self._shared].view(len(student), self._shared)
            if self._shared < student.shape[-1]:
                powers = scratch[1, : soft.numel()].view(soft.shape)
                base = _write_powers(student[:, : self._shared], named, out=powers)
            torch.exp2(powers.mul_(1 / self._temperature), out=soft)
            soft_total = soft.sum(-1, keepdim=True)
            tail = soft_total.log2().mul_(self._temperature)
            buckets = torch.cat([torch.add(base, named, alpha=_LOG2_E), tail], -1).mul_(_LOG_2)
        weights = None if rows.direction is None else rows.kd
        values, gradient = bucket_divergence(buckets, rows.teacher, self._divergence, self._temperature, weights)
        rows.divergence.copy_(values)
        if rows.direction is None or gradient is None:
            return
        probs = parts.sub_(log_sum).exp_().mul_(rows.task)
        if self._one_softmax:
            exps.mul_(_share(probs[:, -1:] + gradient[:, -1:], total))
        else:
            exps.mul_(_share(probs[:, -1:], total))
            exps[:, : self._shared] += soft.mul_(_share(gradient[:, -1:], soft_total))
        of_named = probs[:, :-1] + gradient[:, :-1]  # 0 of an empty entry
        exps.scatter_add_(-1, rows.classes, of_named).scatter_add_(-1, rows.targets, -rows.task)
        rows.direction.copy_(exps)


def _write_powers(rest: Tensor, named: Tensor, *, out: Tensor) -> Tensor:
    """Writes logarithms to base 2 of what the rest is proportional to, their largest about 0; returns minus the base.

    Args:
        rest: (rows, classes) logits, -inf those of the named classes.
        named: (rows, k) theirs, of which the base is taken where nothing is left.
        out: (rows, classes).
    """
    if rest.dtype != out.dtype:  # bfloat16 costs half the time if it is converted first
        rest = out.copy_(rest)
    largest = rest.amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, named.amax(-1, keepdim=True), largest)
    base = largest.mul_(-_LOG2_E)
    torch.add(base, rest, alpha=_LOG2_E, out=out)
    return base


def _share(weight: Tensor, total: Tensor) -> Tensor:
    """(rows, 1) what the powers are multiplied by to sum to the weight; 0 where there are none."""
    return torch.where(total == 0, 0.0, weight / total)
