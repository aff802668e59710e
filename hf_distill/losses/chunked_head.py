"""Task and logit term of a language model from its last hidden states: no tensor of items x vocabulary.

The items are projected chunk by chunk. The gradient of the logits is formed while a chunk's logits are at hand, over
them, and goes into those of hidden states and head at once, so that nothing is computed twice and no graph is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import LOSSES, LossSpec, compute_dtype, item_temperature
from hf_distill.losses.fused import fused_block, write_cross_entropy
from hf_distill.losses.head_products import ChunkedHead
from hf_distill.losses.row_gradient import attach_gradients, clear_rows, may_read, row_blocks, rows_per_block
from hf_distill.signals import LogitFactors

# For the logits of a chunk, of both sides together.
_CPU_CHUNK_BYTES = 128 * 2**20
_DEVICE_CHUNK_BYTES = 2**30
# With fewer items the products wait for the memory of the head.
_SMALLEST_CHUNK = 256
_NO_TARGET = -100


@dataclass(frozen=True)
class Divergence:
    """A registered loss of logits that compares position by position, with its options.

    Attributes:
        spec: the loss; by default `forward_kl`.
        options: its own keywords.

    Raises:
        ValueError: a loss of something else, or one that compares items with each other.
    """

    spec: LossSpec = field(default_factory=lambda: LOSSES.get("forward_kl"))
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.spec.feature != "logits" or self.spec.compares_rows:
            raise ValueError(
                f"{self.spec.name} compares more than the logits of one position, so it cannot be formed chunk by "
                "chunk. Form the logits of all items and call the loss itself."
            )

    def __call__(self, student: Tensor, teacher: Tensor, *, temperature: Tensor, targets: Tensor) -> Tensor:
        """(rows,) values of (rows, classes) logits."""
        filled: dict[str, Any] = {"temperature": temperature} if self.spec.takes_temperature else {}
        if self.spec.takes_targets:
            filled["targets"] = targets
        return self.spec.function(student, teacher, **filled, **self.options)


class _Items(NamedTuple):
    """(items, 1) each: what an item has beside its hidden states, and its values."""

    targets: Tensor
    task: Tensor
    kd: Tensor
    temperature: Tensor
    cross_entropy: Tensor
    divergence: Tensor


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
        chunk_bytes: of both sides' logits at once, though never of less than 256 items; None for what suits the device.
        float32_logits: whether logits are float32 where operands are not; None for where it costs no time, not on CPUs.
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
        block = _Block(divergence, student, teacher.softcap, one_softmax=is_one and shared == len(student.weight))
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
) -> _Items:
    dtype = compute_dtype(student.hidden)
    task, kd = (weights.to(dtype).reshape(-1, 1) for weights in (task_weights, kd_weights))
    return _Items(
        targets.reshape(-1, 1).masked_fill(task == 0, 0),
        task,
        kd,
        item_temperature(temperature, student.hidden, dtype).reshape(-1, 1),
        *task.new_zeros(2, *task.shape),
    )


def _walk(
    student: ChunkedHead,
    teacher: ChunkedHead,
    items: _Items,
    block: "_Block",
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
        chosen = _Items(*(column[places] for column in items))
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


class _Block:
    """Values and gradient of a few rows of logits at a time, while they are in the processor's cache."""

    def __init__(
        self, divergence: Divergence, student: LogitFactors, teacher_softcap: float | None, *, one_softmax: bool
    ) -> None:
        self._divergence, self._one_softmax = divergence, one_softmax
        self._scale, self._softcap, self._teacher_softcap = student.scale, student.softcap, teacher_softcap
        self._is_kl = divergence.spec.name == "forward_kl"

    def walk(self, logits: Tensor, teacher_logits: Tensor, items: _Items, direction: Tensor | None) -> None:
        """Writes the values of a chunk's items, and over its logits their gradient before scale."""
        buffers = 5 if self._softcap is None else 6
        rows = rows_per_block(logits, buffers=buffers, dtype=items.task.dtype)
        scratch = torch.empty(buffers, rows * logits.shape[-1], dtype=items.task.dtype, device=logits.device)
        tensors = [logits, teacher_logits, *items, *(() if direction is None else (direction,))]
        for student, teacher, *columns in row_blocks(tensors, rows):
            part, out = _Items(*columns[:6]), columns[6] if direction is not None else None
            slope = None
            if self._softcap is not None:
                slope = _cap(student, self._softcap, slope=scratch[5])
            if self._teacher_softcap is not None:
                _cap(teacher, self._teacher_softcap)
            form = self._fused if self._is_kl else self._apart
            form(student, teacher, part, out, scratch)
            if out is not None and slope is not None:
                out.mul_(slope)
            part.cross_entropy.masked_fill_(part.task == 0, 0.0)
            part.divergence.masked_fill_(part.kd == 0, 0.0)

    def _fused(
        self, student: Tensor, teacher: Tensor, items: _Items, direction: Tensor | None, scratch: Tensor
    ) -> None:
        square = items.temperature.square()
        weights = (items.task * self._scale, items.kd * items.temperature * self._scale)
        fused_block(
            student,
            teacher,
            items.targets,
            *weights,
            items.temperature.reciprocal(),
            items.cross_entropy,
            items.divergence,
            direction,
            scratch=scratch,
            one_softmax=self._one_softmax,
        )
        items.divergence.mul_(square)

    def _apart(
        self, student: Tensor, teacher: Tensor, items: _Items, direction: Tensor | None, scratch: Tensor
    ) -> None:
        """The two terms one after the other; the divergence forms its own gradient."""
        (rows, classes), shared = student.shape, teacher.shape[-1]
        # A label beyond the shared classes is none to the divergence.
        targets = items.targets.masked_fill((items.task == 0) | (items.targets >= shared), _NO_TARGET)
        leaf = student[:, :shared].detach().requires_grad_(direction is not None)
        with torch.set_grad_enabled(direction is not None):
            values = self._divergence(
                leaf, teacher, temperature=items.temperature.squeeze(-1), targets=targets.squeeze(-1)
            )
        items.divergence.copy_(values.detach().unsqueeze(-1))
        gradient = None
        if direction is not None:
            (gradient,) = torch.autograd.grad(values, leaf, (items.kd * self._scale).squeeze(-1).to(values.dtype))
            clear_rows(gradient, items.kd)
        if may_read(items.task) and not bool(items.task.any()):
            if direction is not None and gradient is not None:
                direction[:, :shared] = gradient
                direction[:, shared:] = 0
            return
        shifted, probs = (buffer[: rows * classes].view(rows, classes) for buffer in scratch[:2])
        write_cross_entropy(student, items.targets, student=shifted, probs=probs, out=items.cross_entropy)
        if direction is not None and gradient is not None:
            task = items.task * self._scale
            clear_rows(probs.mul_(task), task)
            probs.scatter_add_(-1, items.targets, -task)
            probs[:, :shared] += gradient
            direction.copy_(probs)


def _cap(logits: Tensor, softcap: float, *, slope: Tensor | None = None) -> Tensor | None:
    """Caps (rows, classes) logits in place; returns its derivative at each of them, in the memory of `slope`."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        slope = slope[: logits.numel()].view(logits.shape)
        slope.copy_(logits).square_().neg_().add_(1)
    logits.mul_(softcap)
    return slope


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
