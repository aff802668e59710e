"""Cross-entropy and a divergence of rows of two heads' logits, with the gradient written over the student's."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.losses.head_blocks import (
    LOG2_E,
    Chunk,
    Labelled,
    Rows,
    cross_entropy,
    leading,
    write_apart,
    write_together,
)
from hf_distill.losses.head_device import has_kernel, proven_kernel, takes_kernel
from hf_distill.losses.head_formulas import Sums, closed_form, formula_of
from hf_distill.losses.kernel_rows import KernelCase, KernelRows
from hf_distill.losses.mixtures import Mixture
from hf_distill.losses.row_gradient import extremes, may_read, row_blocks, rows_per_block
from hf_distill.signals import LogitFactors

# A block's logits are read from further away, so that fewer of its rows fit the cache than its scratch alone.
_CACHED_BUFFERS = 9
# A cross-entropy that weighs more than the divergence by as much is added to it in its own units.
_LARGEST_BALANCE = 2.0**20
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


class Factors(NamedTuple):
    """What the logits of both sides are multiplied by."""

    student: float
    teacher: float


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
        self._item_temperature = temperature if callable(temperature) else None
        # Of all items alike, where the host knows it.
        self._one_temperature = None if isinstance(temperature, Tensor) or callable(temperature) else temperature

    def factors(self, dtypes: Collection[torch.dtype], device: torch.device) -> Factors | None:
        """What `walk` would like the logits to have been multiplied by, which costs a product nothing; None for 1.

        Args:
            dtypes: of the logits of either side.
            device: where they are.
        """
        # Elsewhere nobody can look whether the powers have a sum. In half precision other factors round otherwise.
        may_scale = device.type == "cpu" and not has_kernel(device) and all(dtype.itemsize >= 4 for dtype in dtypes)
        if self._formula is None or self._item_temperature is not None or not may_scale:
            return None
        return self._to_powers()

    def _to_powers(self) -> Factors:
        """What makes logits powers of two, softened where all are alike."""
        factor = LOG2_E / (self._one_temperature or 1.0)
        teacher_scale = 1.0 if self._item_temperature is not None else self._divergence.teacher_scale
        return Factors(factor, factor * teacher_scale)

    def walk(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        items: HeadItems,
        direction: Tensor | None,
        *,
        has_labels: bool,
        given: Factors | None = None,
    ) -> Tensor | None:
        """Writes the values of a chunk's items, and over its logits what is proportional to their gradient.

        Args:
            logits: (items, classes) before the softcap; used up.
            teacher_logits: (items, shared) of the leading classes, likewise.
            items: the items; their values are written.
            direction: (items, classes) in the memory of `logits`, row by row; None where no gradient is asked for.
            has_labels: whether any item, of this chunk or another, counts in the cross-entropy.
            given: what both have been multiplied by, as `factors` says; None for 1.

        Returns: (items, 1) what the rows of `direction` are to be multiplied by for the gradient before scale; None
            where they are it.
        """
        share = None
        if not len(logits):
            return share
        if not self._walk_by_kernel(logits, teacher_logits, items, direction):
            share = self._walk_by_blocks(logits, teacher_logits, items, direction, given, has_labels=has_labels)
        if self._formula is not None and self._divergence.temperature_squared:
            items.divergence.mul_(items.temperature.square())
        items.cross_entropy.masked_fill_(items.task == 0, 0.0)
        items.divergence.masked_fill_(items.kd == 0, 0.0)
        return share

    def _walk_by_kernel(
        self, logits: Tensor, teacher_logits: Tensor, items: HeadItems, direction: Tensor | None
    ) -> bool:
        """Whether all rows went to a kernel of their own."""
        if self._form is None or self._item_temperature is not None or not takes_kernel(logits):
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
        kd = self._weight(items.kd, items.temperature)
        weights = [items.task * self._scale, kd * self._scale, items.temperature.reciprocal()]
        targets = items.targets.squeeze(-1).contiguous()  # of a caller's tensor they may be a view
        rows = KernelRows(logits, teacher_logits, targets, torch.cat(weights, -1), direction)
        found = kernel(rows, teacher_scale=self._divergence.teacher_scale)
        for written, column in zip(items[-3:], found, strict=True):
            written.copy_(column.unsqueeze(-1))
        return True

    def _weight(self, kd: Tensor, temperature: Tensor) -> Tensor:
        """(rows, 1) of the divergence's gradient by the softened logits: by the logits it is 1 / temperature of it."""
        return kd * temperature if self._divergence.temperature_squared else kd / temperature

    def _walk_by_blocks(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        items: HeadItems,
        direction: Tensor | None,
        given: Factors | None,
        *,
        has_labels: bool,
    ) -> Tensor | None:
        buffers, dtype = 5 if self._softcap is None else 6, items.task.dtype
        rows = rows_per_block(logits, buffers=_CACHED_BUFFERS, dtype=dtype)
        scratch = torch.empty(buffers, rows, logits.shape[-1], dtype=dtype, device=logits.device)
        chunk = self._chunk(items, scratch, direction, has_labels=has_labels)
        sides = [logits, teacher_logits] if direction is None else [logits, teacher_logits, direction]
        sums: list[Sums] = []
        labels: list[tuple[Tensor, Tensor]] = []
        start = 0
        for student, teacher, *out in row_blocks(sides, rows):
            block = Rows(student, teacher, out[0] if out else None, start, chunk)
            slope = None
            if self._softcap is not None:
                slope = block.buffer(5, student)
                _cap(student, self._softcap * (given.student if given else 1), slope=slope)
            if self._teacher_softcap is not None:
                _cap(teacher, self._teacher_softcap * (given.teacher if given else 1))
            found, labelled = self._block(block, given, has_labels=has_labels)
            if found is not None:
                sums.append(found)
            if labelled is not None:
                labels.append(labelled[-2:])
            if slope is not None and out:
                out[0].mul_(slope)
            start += student.shape[0]
        if labels:
            items.cross_entropy.copy_(cross_entropy(*map(torch.cat, zip(*labels, strict=True))))
        if self._formula is None:
            return None
        columns = Sums(*map(torch.cat, zip(*sums, strict=True)))
        items.divergence.copy_(self._formula.value(columns))
        if not chunk.has_shares:
            return None
        share = chunk.weight * self._formula.factor(columns)
        return share.masked_fill_(chunk.kd == 0, 0.0) if chunk.may_weigh_nothing else share  # a factor may be NaN

    def _chunk(self, items: HeadItems, scratch: Tensor, direction: Tensor | None, *, has_labels: bool) -> Chunk:
        task, kd = items.task * self._scale, items.kd * self._scale
        weight = self._weight(kd, items.temperature)
        may_weigh_nothing = not may_read(kd) or not bool(kd.all())
        has_shares = self._formula is not None and direction is not None and direction.dtype == scratch.dtype
        balance = None
        if has_shares and has_labels:
            balance = None if may_weigh_nothing else self._balance(task, weight)
            has_shares = balance is not None
        return Chunk(
            items.targets,
            items.targets.masked_fill(task == 0, 0),
            task,
            kd,
            weight,
            items.temperature,
            items.temperature.reciprocal(),
            *items[-2:],
            scratch.unbind(),
            may_weigh_nothing,
            has_shares,
            balance,
        )

    def _balance(self, task: Tensor, weight: Tensor) -> Tensor | None:
        """(items, 1) task / weight, of weights above 0; None where gradients had better be weighed one by one."""
        if self._item_temperature is not None:  # the weight is yet to be known
            return None
        balance = task / weight
        return balance if extremes(balance)[1] <= _LARGEST_BALANCE else None

    def _block(self, rows: Rows, given: Factors | None, *, has_labels: bool) -> tuple[Sums | None, Labelled | None]:
        chunk, student, teacher = rows.chunk, leading(rows.student, rows.teacher.shape[-1]), rows.teacher
        if self._agreement:
            agrees = rows.of(chunk.agreement)
            torch.eq(student.argmax(-1, keepdim=True), teacher.argmax(-1, keepdim=True), out=agrees)
        if self._formula is None or self._item_temperature is not None:
            if self._divergence.teacher_scale != 1:
                teacher.mul_(self._divergence.teacher_scale)
            if self._formula is None:
                return None, write_apart(rows, functools.partial(self._values, rows), has_labels=has_labels)
            if self._item_temperature is not None:
                rows.soften(self._item_temperature(student, teacher))
                rows.of(chunk.weight).copy_(self._weight(rows.of(chunk.kd), rows.of(chunk.temperature)))
        return write_together(
            rows,
            self._formula,
            factors=self._to_powers() if given is None else None,
            temperature=self._one_temperature,
            has_labels=has_labels,
        )

    def _values(self, rows: Rows, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """(rows,) values of a divergence without a formula."""
        if self._divergence.transform is not None:
            student, teacher = self._divergence.transform(student), self._divergence.transform(teacher)
        if self._item_temperature is not None:
            rows.soften(self._item_temperature(student.detach(), teacher))
        temperature = rows.of(rows.chunk.temperature)
        return self._divergence(student, teacher, temperature=temperature.squeeze(-1), targets=targets)


def _cap(logits: Tensor, softcap: float, *, slope: Tensor | None = None) -> None:
    """Caps (rows, classes) logits in place, and writes the derivative at each of them to `slope`."""
    logits.div_(softcap).tanh_()
    if slope is not None:
        slope.copy_(logits).square_().neg_().add_(1)
    logits.mul_(softcap)
