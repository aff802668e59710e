"""The part of a step that does without a language model's logits."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.accounting import StepCounts, divisor
from hf_distill.batches import Batch
from hf_distill.evaluation import EvaluationMixin
from hf_distill.logit_setup import named_classes
from hf_distill.losses.base import LOSSES
from hf_distill.losses.chunked_head import HeadTerms
from hf_distill.models.heads import task_model
from hf_distill.objective import loss_name
from hf_distill.progress import ActiveTerms
from hf_distill.signals import TeacherOutput
from hf_distill.sparse_terms import (
    are_all_classes,
    check_sparse_pair,
    check_sparse_term,
    check_sparse_weights,
    fits_buckets,
)
from hf_distill.temperature import TemperaturePolicy
from hf_distill.temperature_log import TemperatureMeter

# The weighted loss with its graph, and the shares of the task and the logit term before their weights.
Shares = tuple[Tensor, Tensor | None, Tensor | None]


class ChunkedStepMixin(EvaluationMixin):
    """The decision for hidden states in place of logits, and the two terms that are made of them."""

    model: Any
    _temperatures: TemperatureMeter | None
    _forward: Callable[..., Any]
    _weights_of: Callable[..., Tensor | None]
    _nothing: Callable[[Any], Tensor]

    def _can_be_chunked(self, batch: Batch, terms: ActiveTerms, *, training: bool) -> bool:
        """Whether the terms of this batch are formed without logits; the first such batch decides."""
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        # Of float16 neither the gradients nor, in evaluation, the sums would have the range.
        if not is_plain or self.accelerator.mixed_precision == "fp16" or (self.args.fp16_full_eval and not training):
            return False
        if training:
            kept_dense = self._item_weights is not None and self._item_weights.needs_teacher
        else:  # where somebody looks at the loss of a model in evaluation mode, the loss may have to have a graph
            kept_dense = torch.is_grad_enabled()
        if kept_dense or not self._chunked.suit(self._pair.task, terms, batch, self.teacher):
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

    def _named_classes(self, output: TeacherOutput, batch: Batch, terms: ActiveTerms) -> TeacherOutput:
        """A teacher's most likely classes by the student's numbers; as logits, where they are all classes."""
        assert output.sparse is not None
        pair, term, sparse = self._pair, terms.logits, output.sparse
        check_sparse_pair(pair)
        spec = LOSSES.get(loss_name(term, pair.task, self._problem_type(batch)))
        classes = named_classes(task_model(self.model).config, pair)
        by_teacher = self._item_weights is not None and self._item_weights.needs_teacher
        # An entry may be empty: buckets know what its class has, and logits would not.
        apart = fits_buckets(term, spec, sparse.temperature) and not by_teacher
        if not apart and are_all_classes(sparse.k, classes, spec):
            return replace(output, logits=(sparse.dense(classes or sparse.k),), sparse=None)
        check_sparse_weights(self._item_weights)
        check_sparse_term(term, spec, k=sparse.k, temperature=sparse.temperature)
        return replace(output, sparse=sparse.placed(batch.items.kd.device).ordered(pair.order))

    def _is_from_head(self, output: TeacherOutput | None) -> bool:
        """Whether the terms with this teacher are formed without logits."""
        if output is None or (output.factors is None and output.sparse is None):
            return False
        return output.factors is not None or self._chunked.is_settled

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
        (mask,) = batch.items.task
        task_share = mask / divisor(counts.task[0]) * float(batch.has_targets)
        item_weights = self._weights_of(batch, None)
        kept = batch.items.kd if item_weights is None else torch.where(batch.items.kd, item_weights, 0.0)
        kd_share = kept / divisor(counts.kd)
        with self._forming(
            batch,
            terms,
            teacher_output,
            task_weights=weights["task"] * task_share,
            kd_weights=weights["kd"] * kd_share,
        ):
            arguments = self._student_arguments(batch, own_loss=False)
            outputs, matched, learned = self._forward(model, arguments, batch, counts, terms, teacher_output)
        found = self._chunked.take()
        assert found is not None
        if self._temperatures is not None:
            temperature: Any = terms.logits.temperature
            is_made = isinstance(temperature, TemperaturePolicy)
            self._temperatures.add_all([found.temperature if is_made else temperature], batch.items.kd)
        with_task = isinstance(weights["task"], Tensor) or weights["task"] > 0
        task = (found.cross_entropy * task_share).sum() if with_task else None
        # Without what hangs on the outputs FSDP would never learn that the backward has begun.
        loss = found.loss + self._nothing(outputs)
        return (loss, task, (found.divergence * kd_share).sum()), outputs, matched, learned

    def _chunked_values(
        self, model: nn.Module, batch: Batch, terms: ActiveTerms, teacher_output: TeacherOutput
    ) -> tuple[HeadTerms | None, Any]:
        """The values of a batch in evaluation, None where this forward did not stop before its head; the output."""
        task, kd = batch.items.task[0].float(), batch.items.kd.float()
        with self._forming(batch, terms, teacher_output, task_weights=task, kd_weights=kd, agreement=True):
            outputs = model(**self._student_arguments(batch, own_loss=False))
        return self._chunked.take(training=False), outputs

    def _forming(
        self, batch: Batch, terms: ActiveTerms, teacher_output: TeacherOutput, **options: Any
    ) -> AbstractContextManager[None]:
        teacher = teacher_output.sparse if teacher_output.factors is None else teacher_output.factors
        assert teacher is not None
        task, classes = self._pair.task, self._pair.classes
        return self._chunked.forming(teacher, batch, terms.logits, task=task, classes=classes, **options)
