"""One batch through both models, and the loss that comes of it."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.accounting import StepCounts, TermMeter
from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.batches import Batch
from hf_distill.evaluation import EvaluationMixin
from hf_distill.fused_terms import FusedTerms
from hf_distill.matching import LayerTerms
from hf_distill.models.heads import decoder_inputs, problem_type, task_model
from hf_distill.objective import agreement_sum, kd_sum
from hf_distill.pairing import ModelPair
from hf_distill.progress import ActiveTerms, terms_at
from hf_distill.signals import Task, TeacherOutput, read_logits
from hf_distill.task_loss import check_smoothing, is_sum, span_sums, task_loss
from hf_distill.teachers import Teacher


class StepMixin(EvaluationMixin):
    """`Trainer.compute_loss` with a teacher, in training and in evaluation."""

    args: DistillationTrainingArguments
    model: Any
    teacher: Teacher | None
    _pair: ModelPair
    _meter: TermMeter
    _fused: FusedTerms
    _layers: LayerTerms | None

    def active_terms(self) -> ActiveTerms:
        """The terms that are on at this step."""
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        return terms_at(self.args.distillation, progress)

    def count(self, batch: Batch) -> Tensor:
        """(5 + units,) int64: the items of a batch, in the order of `StepCounts.counts`."""
        items = batch.items.counts()
        if self._layers is None or not self._layers.is_attached:
            return items
        return torch.cat([items, torch.stack(self._layers.counts(self.model, batch))])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms, each a share of its mean over the window and all ranks.

        Args:
            model: the student as wrapped for training.
            inputs: the batch with labels and `teacher_*` columns; left as it is.
            return_outputs: whether to return the student's output too.
            num_items_in_batch: the window's counts from `get_batch_samples`; without them the batch stands alone.

        Returns: the loss, scalar; in evaluation the task loss alone, or None without labels.
        """
        loss: Tensor | None
        terms = self.active_terms()
        batch = self.split(inputs)
        teacher_output = None
        if self.teacher is not None and (terms.need_teacher or not model.training):
            records = model.training and any(match.asks_teacher for match in terms.matches)
            # Not every teacher can be asked for more than logits; those that cannot have been refused by now.
            asked: dict[str, Any] = {"record": True} if records else {}
            teacher_output = self.teacher(batch.teacher, **asked)
        if model.training:
            known = isinstance(num_items_in_batch, StepCounts)
            counts = num_items_in_batch if known else StepCounts.of_batch(self.count(batch))
            loss, outputs = self._training_loss(model, batch, counts, terms, teacher_output, fuse=not return_outputs)
        else:
            loss, outputs = self._evaluation_loss(model, batch, terms, teacher_output)
        return (loss, outputs) if return_outputs else loss

    def _training_loss(
        self,
        model: nn.Module,
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        teacher_output: TeacherOutput | None,
        *,
        fuse: bool,
    ) -> tuple[Tensor, Any]:
        with_task = bool(batch.labels) and terms.task.weight > 0
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        fuse = fuse and is_plain and self._fused.suits(self._pair.task, terms, batch)
        arguments = self._student_arguments(batch, own_loss=with_task and not (fuse and self._fused.accepted))
        outputs, matched = self._forward(model, arguments, batch, counts, terms, teacher_output)
        pairs = self._aligned(outputs, teacher_output) if terms.logits.weight > 0 else []
        result: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        if fuse and teacher_output is not None:
            overwrite = teacher_output.overwritable
            result = self._fused(
                outputs, pairs[0][1], batch, counts, terms, task=self._pair.task, overwrite_teacher=overwrite
            )
        if result is None:
            result = self._terms_apart(outputs, pairs, batch, counts, terms)
        loss, task_share, kd_share = result
        weights = {match.name: match.weight for match in terms.matches}
        if matched:
            loss = torch.stack([loss, *(weights[name] * share for name, share in matched.items())]).sum()
        for name, share in {"task": task_share, "kd": kd_share, **matched}.items():
            if share is not None:
                self._meter.add(f"loss_{name}", share * counts.world_scale)
        return loss if counts.world_scale == 1 else loss * counts.world_scale, outputs

    def _forward(
        self,
        model: nn.Module,
        arguments: dict[str, Any],
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        teacher_output: TeacherOutput | None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The student's output, and its shares of the matches that are on."""
        if self._layers is None or not terms.matches:
            return model(**arguments), {}
        if not self._layers.is_attached:
            raise RuntimeError(
                "The student is in training mode outside train(), and terms between layers exist inside train() "
                "alone. Call model.eval() before compute_loss to look at a loss."
            )
        masks = self._layers.masks(self.model, batch)
        with self._layers.recording(terms.matches, masks):
            recorded = model(**arguments, **self._layers.forward_arguments)
        teacher_features = {} if teacher_output is None else teacher_output.features
        shares = self._layers.shares(
            terms.matches,
            recorded["features"],
            teacher_features,
            batch,
            masks,
            counts.units,
            epoch=int(self.state.epoch or 0),
        )
        return recorded["student"], shares

    def _terms_apart(
        self,
        outputs: Any,
        pairs: list[tuple[Tensor, Tensor]],
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weighted loss of a batch, and its shares of the terms before their weights."""
        weighted, task, kd = [], None, None
        if terms.task.weight > 0:
            task = self._task_loss(outputs, batch, counts) if batch.labels else self._nothing(outputs)
            weighted.append(task if terms.task.weight == 1 else terms.task.weight * task)
        if pairs:
            total = kd_sum(pairs, batch, terms.logits, task=self._pair.task, problem_type=self._problem_type(batch))
            kd = total / counts.kd.clamp(min=1)
            weighted.append(terms.logits.weight * kd)
        return torch.stack(weighted or [self._nothing(outputs)]).sum(), task, kd

    def _nothing(self, outputs: Any) -> Tensor:
        """0 with a graph, since DDP waits for the head's gradient whatever the terms read; 0 * (-inf) would be NaN."""
        return read_logits(self._pair.task, outputs)[0][:0].sum()

    def _evaluation_loss(
        self, model: nn.Module, batch: Batch, terms: ActiveTerms, teacher_output: TeacherOutput | None
    ) -> tuple[Tensor | None, Any]:
        """The task loss of a batch, with the sums of all metrics in the meter."""
        outputs = model(**self._student_arguments(batch, own_loss=bool(batch.labels)))
        counts, kind = StepCounts.of_batch(batch.items.counts()), self._problem_type(batch)
        task = self._task_loss(outputs, batch, counts) if batch.labels else None
        if task is not None:
            self._add_task_loss(task, outputs, batch, counts)
        if pairs := self._aligned(outputs, teacher_output):
            self._eval_meter.add("kd", kd_sum(pairs, batch, terms.logits, task=self._pair.task, problem_type=kind))
            self._eval_meter.add("kd_items", counts.kd)
            agreement = agreement_sum(pairs, batch, task=self._pair.task, problem_type=kind)
            if agreement is not None:
                self._eval_meter.add("agreement", agreement)
        return task, outputs

    def _add_task_loss(self, mean: Tensor, outputs: Any, batch: Batch, counts: StepCounts) -> None:
        sums = [mean if is_sum(self._pair.task, self._student_config) else mean * counts.task[0]]
        if self._pair.task is Task.QUESTION_ANSWERING and self.compute_loss_func is None:
            sums = [*span_sums(outputs, batch)]
        for side, total in enumerate(sums):
            self._eval_meter.add(f"task_{side}", total)
            self._eval_meter.add(f"task_items_{side}", counts.task[side])

    @property
    def _student_config(self) -> Any:
        return task_model(self.model).config

    def _problem_type(self, batch: Batch) -> str:
        return problem_type(self._student_config, batch.labels.get("labels"), default=self._pair.problem_type)

    def _aligned(self, outputs: Any, teacher_output: TeacherOutput | None) -> list[tuple[Tensor, Tensor]]:
        if teacher_output is None:
            return []
        return self._pair.align(read_logits(self._pair.task, outputs), teacher_output.logits)

    def _student_arguments(self, batch: Batch, *, own_loss: bool) -> dict[str, Any]:
        """What the student's forward gets: with the labels only where it is to form the loss itself."""
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        if not batch.labels or (own_loss and (is_plain or "labels" not in batch.labels)):
            return batch.student
        arguments = batch.unlabelled_student
        if self._pair.task is Task.SEQ2SEQ_LM and "decoder_input_ids" not in arguments:
            arguments = {**arguments, **decoder_inputs(self.model, batch.labels["labels"])}
        return arguments

    def _task_loss(self, outputs: Any, batch: Batch, counts: StepCounts) -> Tensor:
        labels, kind = batch.labels.get("labels"), self._problem_type(batch)
        items = counts.task[0].clamp(min=1)
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=items)
        if self.label_smoother is not None:
            check_smoothing(self._pair.task, kind, labels)
            shifts = self._pair.task is Task.CAUSAL_LM
            return self.label_smoother(outputs, labels, shift_labels=shifts, num_items_in_batch=items)
        return task_loss(outputs, batch, counts, task=self._pair.task, problem_type=kind, config=self._student_config)
