"""The models of a report, each brought to the student's classes and positions, and measured on the same rows."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from hf_distill.alignment import ordered_classes
from hf_distill.batches import Batch, split_batch
from hf_distill.collator import TEACHER_PREFIX
from hf_distill.models.heads import frame_mask
from hf_distill.pairing import ModelPair
from hf_distill.report.quality import QualitySums, Scorer
from hf_distill.report.results import Quality
from hf_distill.report.rows import Rows
from hf_distill.signals import Task
from hf_distill.teachers import LocalTeacher, Teacher, in_eval_mode

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """A model and how it is read.

    Attributes:
        model: in evaluation mode, on its device.
        ask: the inputs that it reads -> its logits.
        pair: how its logits, in the student's order, line up with the teacher's.
        inputs: (collated batch, the same taken apart) -> what it reads.
        arrange: (its logits, the batch) -> the same in the student's classes and positions.
        labelled: whether the labels are of its tokens.
        is_reference: whether it is the teacher that all are compared with.
    """

    model: nn.Module
    ask: Callable[[Inputs], tuple[Tensor, ...]]
    pair: ModelPair
    inputs: Callable[[Inputs, Batch], Inputs]
    arrange: Callable[[tuple[Tensor, ...], Batch], tuple[Tensor, ...]]
    labelled: bool = True
    is_reference: bool = False


class Comparison:
    """Rows on which models are measured beside a teacher.

    Args:
        rows: the rows.
        pair: how student and teacher fit together.
        student: the student; of CTC models it says which frames there are.
        teacher: the source of the teacher's logits.
        scorer: the task's scores.
        special_tokens: (any,) ids that no label-free position may have.
        device: where batches go.
    """

    def __init__(
        self,
        rows: Rows,
        pair: ModelPair,
        *,
        student: nn.Module,
        teacher: Teacher,
        scorer: Scorer,
        special_tokens: Tensor | None,
        device: torch.device,
    ) -> None:
        self.rows, self.pair, self.scorer = rows, pair, scorer
        self._student, self._teacher, self._device = student, teacher, device
        self._special_tokens = special_tokens
        # A language model's would fill the memory; it is asked again for each model.
        self._kept: dict[int, tuple[Tensor, ...]] | None = None if pair.task.is_language_model else {}

    def split(self, inputs: Inputs) -> tuple[Inputs, Batch]:
        """A collated batch on the device, and the same taken apart."""
        placed = BatchEncoding(dict(inputs)).to(self._device).data
        batch = split_batch(
            placed,
            self.pair,
            frames=lambda student: frame_mask(self._student, student),
            special_tokens=self._special_tokens,
        )
        return placed, batch

    def quality(self, contender: Contender) -> Quality:
        """What a model is worth on the rows."""
        sums = QualitySums(self.scorer, contender.pair)
        with torch.no_grad():
            for number, collated in enumerate(self.rows.batches()):
                inputs, batch = self.split(collated)
                teacher = self._teacher_logits(number, batch)
                own = teacher if contender.is_reference else contender.ask(contender.inputs(inputs, batch))
                logits = contender.arrange(tuple(each.to(batch.items.kd.device) for each in own), batch)
                pairs = contender.pair.align(logits, teacher, positions=batch.teacher_positions)
                sums.add(logits, pairs, batch, labelled=contender.labelled)
        return sums.quality()

    def _teacher_logits(self, number: int, batch: Batch) -> tuple[Tensor, ...]:
        if self._kept is None:
            return self._teacher(batch.teacher).formed().logits
        if number not in self._kept:
            self._kept[number] = tuple(each.cpu() for each in self._teacher(batch.teacher).formed().logits)
        return tuple(each.to(batch.items.kd.device) for each in self._kept[number])


def as_student(model: nn.Module, pair: ModelPair) -> Contender:
    """The student."""
    ask = LocalTeacher(model)
    return Contender(model, lambda inputs: ask(inputs).logits, pair, lambda _, batch: batch.student, _as_they_are)


def as_undistilled(model: nn.Module, own_pair: ModelPair, pair: ModelPair) -> Contender:
    """Another model that reads what the student reads.

    Args:
        model: the model.
        own_pair: of the student and this model, as if it taught.
        pair: of the student and the teacher.
    """
    ask = LocalTeacher(model)
    return Contender(
        model,
        lambda inputs: ask(inputs).logits,
        pair,
        lambda inputs, _: {name: value for name, value in inputs.items() if not name.startswith(TEACHER_PREFIX)},
        lambda logits, _: _ordered(logits, own_pair),
    )


def as_teacher(model: nn.Module, pair: ModelPair, *, is_reference: bool = False) -> Contender:
    """The teacher, or what was made of it.

    Args:
        model: the model.
        pair: of the student and the teacher.
        is_reference: whether it is the teacher.
    """
    ask = LocalTeacher(model)
    shared, own_pair = pair.shared_tokens, pair
    if shared is not None:
        # Both sides are then the teacher's, and what is compared is what the student is compared on.
        rest = shared.teacher_rest if len(shared.student_rest) else shared.teacher_rest[:0]
        both = replace(
            shared,
            student=shared.teacher,
            student_rest=rest,
            teacher_rest=rest,
            student_rows=shared.teacher_rows,
        )
        own_pair = replace(pair, shared_tokens=both)

    def arrange(logits: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, ...]:
        if shared is None or batch.teacher_positions is None:
            return _ordered(logits, pair)
        places = batch.teacher_positions.clamp(min=0).unsqueeze(-1)
        return tuple(each.take_along_dim(places, 1) for each in logits)

    return Contender(
        model,
        lambda inputs: ask(inputs).logits,
        own_pair,
        lambda _, batch: batch.teacher,
        arrange,
        labelled=shared is None and not (pair.task is Task.CTC and pair.needs_teacher_inputs),
        is_reference=is_reference,
    )


@contextmanager
def at_work(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A model in evaluation mode and in its own dtype on a device; afterwards as and where it was."""
    origin = next(model.parameters()).device
    is_fixed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    moves = not is_fixed and origin != device
    with in_eval_mode(model), _without_autocast(model):
        if moves:
            model.to(device)
        try:
            yield
        finally:
            if moves:
                model.to(origin)


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """The forward that the model had before `Accelerator.prepare_model` put mixed precision around it."""
    own = vars(model)
    if "_original_forward" not in own:
        yield
        return
    before = own["forward"]
    model.forward = own["_original_forward"]
    try:
        yield
    finally:
        model.forward = before


def _as_they_are(logits: tuple[Tensor, ...], _: Batch) -> tuple[Tensor, ...]:
    return logits


def _ordered(logits: tuple[Tensor, ...], pair: ModelPair) -> tuple[Tensor, ...]:
    return tuple(ordered_classes(each, order=pair.order, classes=None) for each in logits)
