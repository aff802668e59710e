"""Signals of student and teacher -> summed terms. Nothing here is read back to the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_distill.batches import Batch
from hf_distill.config import LogitTerm
from hf_distill.losses.base import LOSSES, LossSpec, masked_sum
from hf_distill.losses.head_rows import Divergence
from hf_distill.losses.sparse import sparse_divergence
from hf_distill.losses.temperature_gradient import with_temperature_gradient
from hf_distill.losses.transforms import standardize
from hf_distill.signals import SparseLogits, Task
from hf_distill.targets import class_targets
from hf_distill.temperature import TemperaturePolicy

# Heads whose classes are no distribution take the forward KL's counterpart.
_COUNTERPARTS = {
    ("forward_kl", "multi_label_classification"): "binary_forward_kl",
    ("forward_kl", "regression"): "logit_mse",
}
LogitPair = tuple[Tensor, Tensor]


def loss_name(term: LogitTerm, task: Task, problem_type: str) -> str:
    """The registered loss that `term.loss` means for this head."""
    if task is not Task.SEQUENCE_CLASSIFICATION:
        return term.loss
    return _COUNTERPARTS.get((term.loss, problem_type), term.loss)


@dataclass(frozen=True)
class LogitObjective:
    """The logit term at one moment of the training, for one kind of head.

    Attributes:
        term: the loss, its options, and the temperature or its policy.
        task: what the heads predict.
        problem_type: Transformers' name of the kind of sequence classification.
        learned: (student, teacher) logits -> a learned temperature per item or a scalar, with its graph; None where
            none is learned.
        gather: rows of this rank -> rows of all ranks, in order and with their gradient.
        rank: the place of this rank's rows among them.
        reduce: a tensor -> its sum over all ranks.
    """

    term: LogitTerm
    task: Task
    problem_type: str
    learned: Callable[[Tensor, Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    rank: int = 0
    reduce: Callable[[Tensor], Tensor] = lambda numbers: numbers

    @property
    def spec(self) -> LossSpec:
        """The registered loss."""
        return LOSSES.get(loss_name(self.term, self.task, self.problem_type))

    def signals(self, pairs: list[LogitPair], batch: Batch, weights: Tensor | None = None) -> "LogitSignals":
        """What the term is made of: logits as the loss compares them, and the temperatures.

        Args:
            pairs: aligned student and teacher logits, (batch, classes) or (batch, length, classes); for question
                answering two pairs of (batch, length).
            batch: the batch.
            weights: >= 0, in the shape of the items; None weighs all alike.
        """
        if self.task is Task.QUESTION_ANSWERING:
            pairs = [(_real_positions(student, batch), _real_positions(teacher, batch)) for student, teacher in pairs]
        scale: Any = self.term.teacher_scale  # a number by now
        if scale != 1:
            pairs = [(student, teacher * scale) for student, teacher in pairs]
        if self.term.transform == "standardize":
            pairs = [(standardize(student), standardize(teacher)) for student, teacher in pairs]
        return LogitSignals(pairs, [self._temperature(*pair, batch) for pair in pairs], weights)

    def _temperature(self, student: Tensor, teacher: Tensor, batch: Batch) -> float | Tensor:
        policy = self.term.temperature
        if not isinstance(policy, TemperaturePolicy):
            return policy
        if self.learned is not None:
            return self.learned(student, teacher)
        return policy(
            0.0,  # what depends on the progress is a number by now
            student.detach(),
            teacher,
            binary=self.spec.compares == "labels",
            valid=batch.items.kd,
            reduce=self.reduce,
        )

    def total(self, signals: "LogitSignals", batch: Batch) -> Tensor:
        """The term summed over the batch's KD items, each times its weight: scalar float32.

        Of several pairs, as in question answering, the mean is one item's value.

        Raises:
            ValueError: the logits have other positions than the batch, as with prompt tuning's virtual tokens.
        """
        pairs, weights = signals.pairs, signals.weights
        targets: tuple[Tensor | None, ...] = (None,) * len(pairs)
        if self.spec.takes_targets:
            targets = class_targets(batch, self.task, classes=pairs[0][0].shape[-1])
        sums = []
        for (student, teacher), temperature, labels in zip(pairs, signals.temperatures, targets, strict=True):
            if student.shape[:-1] != batch.items.kd.shape:
                raise ValueError(
                    f"The logits have {tuple(student.shape[:-1])} items, the batch {tuple(batch.items.kd.shape)}. A "
                    "model that adds or drops positions (prompt tuning, patch merging) cannot be distilled position "
                    "by position."
                )
            values = self._values(student, teacher, temperature, labels, batch.items.kd)
            if weights is None:
                sums.append(masked_sum(values, batch.items.kd))
            else:  # what weighs nothing may be NaN
                sums.append(masked_sum(values * weights, batch.items.kd & (weights > 0)))
        return torch.stack(sums).mean()

    def _values(
        self, student: Tensor, teacher: Tensor, temperature: float | Tensor, labels: Tensor | None, kept: Tensor
    ) -> Tensor:
        spec, options = self.spec, dict(self.term.options)
        if spec.takes_temperature:
            options["temperature"] = temperature.detach() if isinstance(temperature, Tensor) else temperature
        if labels is not None:
            options["targets"] = labels
        if spec.compares_rows:
            rows = len(kept)
            gathered = (self.gather(student), self.gather(teacher))
            if isinstance(options.get("temperature"), Tensor) and options["temperature"].dim() > 0:
                options["temperature"] = self.gather(options["temperature"])
            values = spec.function(*gathered, valid=self.gather(kept), **options)
            values = values[self.rank * rows : (self.rank + 1) * rows]
        elif isinstance(teacher, SparseLogits):
            values = sparse_divergence(student, teacher, Divergence(spec, self.term.options))
        else:
            values = spec.function(student, teacher, **options)
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            values = with_temperature_gradient(values, student, teacher, temperature)
        if not self.term.temperature_squared:
            values = values / temperature**2
        return values


@dataclass(frozen=True)
class LogitSignals:
    """What a batch's logit term is made of.

    Attributes:
        pairs: student and teacher logits as the loss compares them.
        temperatures: for each pair a number, a scalar tensor or one value per item; a learned one has its graph.
        weights: of the items, in their shape; None weighs all alike.
    """

    pairs: list[LogitPair]
    temperatures: list[float | Tensor]
    weights: Tensor | None = None


def agreement_sum(pairs: list[LogitPair], batch: Batch, *, task: Task, problem_type: str) -> Tensor | None:
    """On how many KD items student and teacher choose alike: scalar; None where they choose nothing comparable."""
    if not pairs:
        return None
    if task is Task.SEQUENCE_CLASSIFICATION and problem_type == "regression":
        return None
    if task is Task.SEQUENCE_CLASSIFICATION and problem_type == "multi_label_classification":
        ((student, teacher),) = pairs
        return masked_sum(((student > 0) == (teacher > 0)).float().mean(-1), batch.items.kd)
    if task is Task.QUESTION_ANSWERING:
        pairs = [(_real_positions(student, batch), _real_positions(teacher, batch)) for student, teacher in pairs]
    same = [student.argmax(-1) == _choice(teacher, student.shape[-1]) for student, teacher in pairs]
    return masked_sum(torch.stack(same).all(0).float(), batch.items.kd)


def _choice(teacher: Tensor | SparseLogits, classes: int) -> Tensor:
    return teacher.likeliest(classes) if isinstance(teacher, SparseLogits) else teacher.argmax(-1)


def _real_positions(logits: Tensor, batch: Batch) -> Tensor:
    mask = batch.student.get("attention_mask")
    return logits if mask is None else logits.masked_fill(~mask.bool(), -math.inf)
