"""Cross-entropy and a divergence of a few rows of two heads' logits, with the gradient written over the student's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.losses.head_device import proven_kernel, takes_kernel
from hf_distill.losses.head_formulas import Exponentials, Formula, closed_form, formula_of
from hf_distill.losses.kernel_rows import KernelCase, KernelRows
from hf_distill.losses.mixtures import Mixture
from hf_distill.losses.row_gradient import clear_rows, may_read, row_blocks, rows_per_block
from hf_distill.signals import LogitFactors

_NO_TARGET = -100
_LOG_2, _LOG2_E = math.log(2), math.log2(math.e)


# (rows, classes) logits of student and teacher -> (rows,) temperatures without a graph.
ItemTemperature = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """A registered loss of logits that compares position by position, with its options and what is done around it.

    Attributes:
        spec: the loss; by default `forward_kl`.
        options: its own keywords.
        transform: of the logits of either side before they are compared, (rows, classes) -> as many; None leaves them.
        teacher_scale: what the teacher's logits are multiplied by, before the transform.
        temperature_squared: whether the values keep the temperature² that the loss multiplies them by.

    Raises:
        ValueError: a loss of something else, or one that compares items with each other.
    """

    spec: LossSpec = field(default_factory=lambda: LOSSES.get("forward_kl"))
    options: Mapping[str, Any] = field(default_factory=dict)
    transform: Callable[[Tensor], Tensor] | None = None
    teacher_scale: float = 1.0
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if self.spec.feature != "logits" or self.spec.compares_rows:
            raise ValueError(
                f"{self.spec.name} compares more than the logits of one position, so it cannot be formed chunk by "
                "chunk. Form the logits of all items and call the loss itself."
            )

    @property
    def form(self) -> Mixture | str | None:
        """What it is formed by in place of its function; None where it is not."""
        return None if self.transform is not None else closed_form(self.spec.name, self.options)

    def __call__(self, student: Tensor, teacher: Tensor, *, temperature: Tensor, targets: Tensor) -> Tensor:
        """(rows,) values of (rows, classes) logits, scaled and transformed."""
        filled: dict[str, Any] = {"temperature": temperature} if self.spec.takes_temperature else {}
        if self.spec.takes_targets:
            filled["targets"] = targets
        values = self.spec.function(student, teacher, **filled, **self.options)
        return values if self.temperature_squared else values / temperature.square()


class HeadItems(NamedTuple):
    """(items, 1) each: what an item has beside its hidden states, and its values."""

    targets: Tensor
    task: Tensor
    kd: Tensor
    temperature: Tensor  # written, where it is made of the logits
    cross_entropy: Tensor
    divergence: Tensor
    agreement: Tensor  # bool, written where it is asked for


class RowLosses:
    """The two terms of rows of logits, a block of rows at a time, while they are in the processor's cache.

    Args:
        divergence: the divergence.
        student: whose scale and softcap the gradient passes.
        teacher: with as many classes as are compared, or more.
        temperature: as the items have it, or what makes each item's of its logits.
        agreement: whether to write down where both sides choose the same class.
    """

    def __init__(
        self,
        divergence: Divergence,
        student: LogitFactors,
        teacher: LogitFactors,
        *,
        temperature: float | Tensor | ItemTemperature,
        agreement: bool = False,
    ) -> None:
        self._divergence, self._form, self._agreement = divergence, divergence.form, agreement
        self._formula = None if self._form is None else formula_of(self._form)
        self._scale, self._softcap, self._teacher_softcap = student.scale, student.softcap, teacher.softcap
        self._temperature = temperature if callable(temperature) else None
        self._soften = isinstance(temperature, Tensor) or callable(temperature) or temperature != 1

    def walk(self, logits: Tensor, teacher_logits: Tensor, items: HeadItems, direction: Tensor | None) -> None:
        """Writes the values of a chunk's items, and over its logits their gradient before scale.

        Args:
            logits: (items, classes) before the softcap; used up.
            teacher_logits: (items, shared) of the leading classes, likewise.
            items: the items; their values are written.
            direction: (items, classes) in the memory of `logits`, row by row; None where no gradient is asked for.
        """
        if not self._walk_by_kernel(logits, teacher_logits, items, direction):
            self._walk_by_blocks(logits, teacher_logits, items, direction)
        if self._formula is not None and self._divergence.temperature_squared:
            items.divergence.mul_(items.temperature.square())
        items.cross_entropy.masked_fill_(items.task == 0, 0.0)
        items.divergence.masked_fill_(items.kd == 0, 0.0)

    def _walk_by_kernel(
        self, logits: Tensor, teacher_logits: Tensor, items: HeadItems, direction: Tensor | None
    ) -> bool:
        """Whether all rows went to a kernel of their own."""
        if self._form is None or self._temperature is not None or not takes_kernel(logits) or not len(logits):
            return False
        if items.task.dtype != torch.float32:  # of hidden states in float64: sums in float32 would not do
            return False
        kernel = proven_kernel(
            KernelCase(
                self._form,
                self._softcap,
                self._teacher_softcap,
                dtypes=(logits.dtype, teacher_logits.dtype),
                gradient_dtype=None if direction is None else direction.dtype,
                is_wider=teacher_logits.shape[-1] < logits.shape[-1],
                find_agreement=self._agreement,
                device=logits.device,
            )
        )
        if kernel is None:
            return False
        weights = [items.task * self._scale, self._weight(items) * self._scale, items.temperature.reciprocal()]
        targets = items.targets.squeeze(-1).contiguous()  # of a caller's tensor they may be a view
        rows = KernelRows(logits, teacher_logits, targets, torch.cat(weights, -1), direction)
        found = kernel(rows, teacher_scale=self._divergence.teacher_scale)
        for written, column in zip(items[-3:], found, strict=True):
            written.copy_(column.unsqueeze(-1))
        return True

    def _weight(self, rows: "HeadItems | _Rows") -> Tensor:
        """(rows, 1) of the divergence's gradient by the softened logits: by the logits it is 1 / temperature of it."""
        return rows.kd * rows.temperature if self._divergence.temperature_squared else rows.kd / rows.temperature

    def _walk_by_blocks(
        self, logits: Tensor, teacher_logits: Tensor, items: HeadItems, direction: Tensor | None
    ) -> None:
        buffers = 5 if self._softcap is None else 6
        rows = rows_per_block(logits, buffers=buffers, dtype=items.task.dtype)
        scratch = torch.empty(buffers, rows * logits.shape[-1], dtype=items.task.dtype, device=logits.device)
        weights = [items.task * self._scale, items.kd * self._scale]
        columns = [items.targets, *weights, items.temperature, items.temperature.reciprocal(), *items[-3:]]
        tensors = [logits, teacher_logits, *columns, *([] if direction is None else [direction])]
        for student, teacher, *rest in row_blocks(tensors, rows):
            out = None if direction is None else rest.pop()
            slope = None
            if self._softcap is not None:
                slope = _cap(student, self._softcap, slope=scratch[5])
            if self._teacher_softcap is not None:
                _cap(teacher, self._teacher_softcap)
            targets, task, kd, temperature, inverse, cross_entropy, value, agrees = rest
            values = (cross_entropy, value, agrees)
            self._block(_Rows(student, teacher, targets, task, kd, temperature, inverse, *values, out, scratch))
            if out is not None and slope is not None:
                out.mul_(slope)

    def _block(self, rows: "_Rows") -> None:
        student, teacher = rows.student[:, : rows.teacher.shape[-1]], rows.teacher
        if self._agreement:
            torch.eq(student.argmax(-1, keepdim=True), teacher.argmax(-1, keepdim=True), out=rows.agreement)
        if self._divergence.teacher_scale != 1:
            teacher.mul_(self._divergence.teacher_scale)
        if self._formula is None:
            _apart(rows, self._divergence, self._temperature)
            return
        if self._temperature is not None:
            rows.soften(self._temperature(student, teacher))
        _together(rows, self._formula, kd=self._weight(rows), soften=self._soften)


class _Rows(NamedTuple):
    """A block of rows; what has one column per row is (rows, 1)."""

    student: Tensor  # (rows, classes)
    teacher: Tensor  # (rows, shared)
    targets: Tensor
    task: Tensor  # the weight of the cross-entropy
    kd: Tensor  # that of the divergence
    temperature: Tensor
    inverse_temperature: Tensor
    cross_entropy: Tensor  # written
    divergence: Tensor  # written; by a formula without temperature²
    agreement: Tensor
    direction: Tensor | None  # (rows, classes), written
    scratch: Tensor  # (5 or 6, at least rows * classes)

    @property
    def own_targets(self) -> Tensor:
        """The targets, and a class where there need not be one."""
        return self.targets.masked_fill(self.task == 0, 0)

    def buffers(self, first: int, like: Tensor, count: int) -> list[Tensor]:
        """Some of the scratch, each in the shape of `like`."""
        return [buffer[: like.numel()].view(like.shape) for buffer in self.scratch[first : first + count]]

    def soften(self, temperature: Tensor) -> None:
        """Takes (rows,) temperatures over."""
        self.temperature.copy_(temperature.unsqueeze(-1))
        torch.reciprocal(self.temperature, out=self.inverse_temperature)


def _together(rows: _Rows, formula: Formula, *, kd: Tensor, soften: bool) -> None:
    """The two terms at once; `kd` (rows, 1) is the weight of the gradient by the softened logits."""
    shared, has_labels = rows.teacher.shape[-1], _has_labels(rows)
    one_softmax = has_labels and not soften and shared == rows.student.shape[-1]
    student, exps = rows.buffers(0, rows.student, 2)
    teacher, teacher_exps, scratch = rows.buffers(2, rows.teacher, 3)
    total = _write_cross_entropy(rows, powers=student, exps=exps) if has_labels else None
    if total is None or shared < rows.student.shape[-1]:
        (student,) = rows.buffers(0, rows.teacher, 1)
        _write_powers(rows.student[:, :shared], out=student)
    _write_powers(rows.teacher, out=teacher)
    if soften:
        student.mul_(rows.inverse_temperature)
        teacher.mul_(rows.inverse_temperature)
    student_exps = exps if one_softmax else torch.exp2(student, out=scratch)
    student_total = total if one_softmax and total is not None else student_exps.sum(-1, keepdim=True)
    teacher_total = torch.exp2(teacher, out=teacher_exps).sum(-1, keepdim=True)
    needs_gradient = rows.direction is not None
    totals = (student_total, teacher_total)
    result = formula(
        Exponentials(student, teacher, student_exps, teacher_exps, *totals, scratch, rows.divergence, needs_gradient)
    )
    if rows.direction is None or result is None:
        return
    gradient, factor = result
    clear_rows(gradient, rows.kd)
    weight = (kd * factor).masked_fill_(rows.kd == 0, 0.0)  # a factor may be NaN there
    if total is None:
        torch.mul(gradient, weight, out=rows.direction[:, :shared])
        rows.direction[:, shared:] = 0
        return
    _write_cross_entropy_gradient(rows, exps, total)
    # Two passes: of three operands, one of them a column, a CPU makes one slow one.
    torch.add(exps[:, :shared], gradient.mul_(weight), out=rows.direction[:, :shared])
    rows.direction[:, shared:] = exps[:, shared:]


def _has_labels(rows: _Rows) -> bool:
    """Whether any row may count in the cross-entropy."""
    return not may_read(rows.task) or bool(rows.task.any())


def _apart(rows: _Rows, divergence: Divergence, temperature: ItemTemperature | None) -> None:
    """The two terms one after the other; the divergence forms its own gradient."""
    shared, direction = rows.teacher.shape[-1], rows.direction
    # A label beyond the shared classes is none to the divergence.
    targets = rows.targets.masked_fill((rows.targets < 0) | (rows.targets >= shared), _NO_TARGET)
    leaf = rows.student[:, :shared].detach().requires_grad_(direction is not None)
    with torch.set_grad_enabled(direction is not None):
        student, teacher = leaf, rows.teacher
        if divergence.transform is not None:
            student, teacher = divergence.transform(leaf), divergence.transform(teacher)
        if temperature is not None:
            rows.soften(temperature(student.detach(), teacher))
        values = divergence(student, teacher, temperature=rows.temperature.squeeze(-1), targets=targets.squeeze(-1))
    rows.divergence.copy_(values.detach().unsqueeze(-1))
    gradient = None
    if direction is not None:
        (gradient,) = torch.autograd.grad(values, leaf, rows.kd.squeeze(-1).to(values.dtype))
        clear_rows(gradient, rows.kd)
    if not _has_labels(rows):
        if direction is not None and gradient is not None:
            direction[:, :shared] = gradient
            direction[:, shared:] = 0
        return
    powers, exps = rows.buffers(0, rows.student, 2)
    total = _write_cross_entropy(rows, powers=powers, exps=exps)
    if direction is not None and gradient is not None:
        _write_cross_entropy_gradient(rows, exps, total)
        exps[:, :shared] += gradient
        direction.copy_(exps)


def _write_cross_entropy(rows: _Rows, *, powers: Tensor, exps: Tensor) -> Tensor:
    """Writes the cross-entropy, and both of (rows, classes); returns the sums of `exps`, (rows, 1)."""
    _write_powers(rows.student, out=powers)
    torch.exp2(powers, out=exps)
    total = exps.sum(-1, keepdim=True)
    torch.sub(total.log(), powers.gather(-1, rows.own_targets), alpha=_LOG_2, out=rows.cross_entropy)
    return total


def _write_cross_entropy_gradient(rows: _Rows, exps: Tensor, total: Tensor) -> None:
    """Writes task * (p - onehot) over `exps`."""
    clear_rows(exps.mul_(rows.task / total), rows.task)
    exps.scatter_add_(-1, rows.own_targets, -rows.task)


def _write_powers(logits: Tensor, *, out: Tensor) -> None:
    """Writes logarithms to base 2 of what is proportional to the softmax, the largest of each row about 0.

    On a CPU `exp2` costs a third of `softmax`; so does `exp`, but 30 times as much where its results are denormal or 0
    (torch 2.13 with MKL).
    """
    if logits.dtype != out.dtype:  # bfloat16 costs half the time if it is converted first
        logits = out.copy_(logits)
    # What rounding the maximum does is the same in a whole row, and so nothing to its softmax.
    torch.add(logits.amax(-1, keepdim=True).mul_(-_LOG2_E), logits, alpha=_LOG2_E, out=out)


def _cap(logits: Tensor, softcap: float, *, slope: Tensor | None = None) -> Tensor | None:
    """Caps (rows, classes) logits in place; returns its derivative at each of them, in the memory of `slope`."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        slope = slope[: logits.numel()].view(logits.shape)
        slope.copy_(logits).square_().neg_().add_(1)
    logits.mul_(softcap)
    return slope
