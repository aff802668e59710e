"""The part of a step that does without a language model's logits."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_distill.accounting import StepCounts
from hf_distill.batches import Batch
from hf_distill.chunked_terms import ChunkedTerms
from hf_distill.evaluation import EvaluationMixin
from hf_distill.progress import ActiveTerms
from hf_distill.signals import TeacherOutput
from hf_distill.temperature_log import TemperatureMeter

# The weighted loss with its graph, and the shares of the task and the logit term before their weights.
Shares = tuple[Tensor, Tensor | None, Tensor | None]


class ChunkedStepMixin(EvaluationMixin):
    """The decision for hidden states in place of logits, and the two terms that are made of them."""

    model: Any
    _chunked: ChunkedTerms
    _temperatures: TemperatureMeter | None
    _forward: Callable[..., Any]
    _student_arguments: Callable[..., dict[str, Any]]
    _weights_of: Callable[..., Tensor | None]

    def _can_be_chunked(self, batch: Batch, terms: ActiveTerms) -> bool:
        """Whether the terms of this batch are formed without logits; the first such batch decides."""
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        weighs = self._item_weights is not None and self._item_weights.needs_teacher
        if not is_plain or weighs or not self._chunked.suit(self._pair.task, terms, batch, self.teacher):
            return False
        return self._chunked.settle(
            self.model,
            self._student_arguments(batch, own_loss=False),
            self.teacher,
            task=self._pair.task,
            with_task=terms.task.weight > 0,
            mask=batch.items.kd | batch.items.task[0],
        )

    def _usable(self, teacher_output: TeacherOutput | None, batch: Batch) -> TeacherOutput | None:
        """What the teacher says, with its logits where its head is elsewhere or has read other positions."""
        if teacher_output is None or teacher_output.factors is None:
            return teacher_output
        factors, items = teacher_output.factors, batch.items.kd
        fits = factors.hidden.shape[:-1] == items.shape and factors.weight.device == items.device
        return teacher_output if fits else teacher_output.formed()

    def _chunked_shares(
        self,
        model: nn.Module,
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        teacher_output: TeacherOutput,
        weights: Mapping[str, Any],
    ) -> tuple[Shares, Any, dict[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
        """As `_dense_shares`, from what the logits are made of; the student's are those of one position."""
        assert teacher_output.factors is not None
        if self._temperatures is not None:
            temperature: Any = terms.logits.temperature  # a number by now
            self._temperatures.add_all([temperature], batch.items.kd)
        forming = self._chunked.forming(
            teacher_output.factors,
            batch,
            counts,
            terms,
            weights,
            task=self._pair.task,
            item_weights=self._weights_of(batch, None),
            classes=self._pair.classes,
        )
        with forming:
            arguments = self._student_arguments(batch, own_loss=False)
            outputs, matched, learned = self._forward(model, arguments, batch, counts, terms, teacher_output)
        return self._chunked.take(), outputs, matched, learned
