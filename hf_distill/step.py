"""One batch through both models, and the loss that comes of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.accounting import StepCounts, TermMeter, divisor, with_item_weights
from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.balancing import Balancer
from hf_distill.batches import TEACHER_OUTPUT, Batch
from hf_distill.chunked_step import ChunkedStepMixin, Shares
from hf_distill.config import DistillationConfig, LogitTerm
from hf_distill.fused_terms import FusedTerms
from hf_distill.gathering import gather_rows
from hf_distill.item_weights import ItemWeights
from hf_distill.learned import BALANCE, TEMPERATURE, temperature_module
from hf_distill.losses.base import LOSSES, masked_sum
from hf_distill.matching import LEARNED, LayerTerms
from hf_distill.models.heads import decoder_inputs, problem_type, task_model
from hf_distill.objective import LogitObjective, LogitSignals
from hf_distill.objective_checks import check_logit_term
from hf_distill.pairing import ModelPair
from hf_distill.progress import ActiveTerms, terms_at
from hf_distill.signals import Task, TeacherOutput, read_logits
from hf_distill.sparse_terms import align_sparse
from hf_distill.task_loss import check_smoothing, task_loss
from hf_distill.teachers import Teacher, takes_factored
from hf_distill.temperature import LearnedTemperature
from hf_distill.temperature_log import TemperatureMeter


class StepMixin(ChunkedStepMixin):
    """`Trainer.compute_loss` with a teacher, in training and in evaluation."""

    args: DistillationTrainingArguments
    model: Any
    teacher: Teacher | None
    _pair: ModelPair
    _meter: TermMeter
    _temperatures: TemperatureMeter | None
    _fused: FusedTerms
    _layers: LayerTerms | None
    _balancer: Balancer | None
    _item_weights: ItemWeights | None
    _step_weights: dict[str, Any]
    _active: tuple[DistillationConfig, ActiveTerms] | None

    def active_terms(self) -> ActiveTerms:
        """The terms that are on at this step."""
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0
        config = self.args.distillation
        # Asked for with every micro-batch, and each term that a schedule changes is checked anew.
        if self._active is None or self._active[0] is not config or self._active[1].progress != progress:
            self._active = config, terms_at(config, progress)
        return self._active[1]

    def count(self, batch: Batch, teacher_output: TeacherOutput | None = None) -> Tensor:
        """(5 + units,) the items of a batch, in the order of `StepCounts.counts`.

        Args:
            batch: the batch.
            teacher_output: what the teacher says about it, where items are weighed by that.
        """
        counts = batch.items.counts()
        weights = self._weights_of(batch, teacher_output)
        if weights is not None:
            counts = with_item_weights(counts, masked_sum(weights, batch.items.kd))
        units = [] if self._layers is None or not self._layers.is_attached else self._layers.counts(self.model, batch)
        return torch.cat([counts, torch.stack(units)]) if units else counts

    def _weights_of(self, batch: Batch, teacher_output: TeacherOutput | None) -> Tensor | None:
        """The weights of the KD items in their shape; None where all weigh alike."""
        if self._item_weights is None:
            return None
        if teacher_output is None:  # the term is off where it is not asked, and nothing reads what it weighs by
            return None if self._item_weights.needs_teacher else self._item_weights(batch)
        return self._item_weights(batch, self._pair.align_teacher(teacher_output.logits, batch.items.kd.device))

    def ask_teacher(
        self, batch: Batch, terms: ActiveTerms, *, training: bool, factored: bool = False
    ) -> TeacherOutput | None:
        """What the teacher says about a batch, with `factored` without forming its logits; None where nobody asks."""
        if self.teacher is None or (training and not terms.need_teacher):
            return None
        if not training and self._pair.task is Task.EMBEDDING:  # matches are not evaluated
            return None
        records = training and any(match.asks_teacher for match in terms.matches)
        # Not every teacher can be asked for more than logits; those that cannot have been refused by now.
        asked: dict[str, Any] = {"record": True} if records else {}
        asked |= {"factored": True} if factored and takes_factored(self.teacher) else {}
        output = self.teacher(batch.teacher, **asked)
        return output if output.sparse is None else self._named_classes(output, batch, terms)

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
        batch = self.split(inputs)
        terms = self.active_terms() if model.training else self._evaluation_terms(batch)
        teacher_output = inputs.get(TEACHER_OUTPUT)
        if not isinstance(teacher_output, TeacherOutput):  # a data set may have a column of that name
            self._chunked.forget()  # what an interrupted step left
            factored = not return_outputs and self._can_be_chunked(batch, terms, training=model.training)
            teacher_output = self.ask_teacher(batch, terms, training=model.training, factored=factored)
        teacher_output = self._usable(teacher_output, batch)
        if model.training:
            known = isinstance(num_items_in_batch, StepCounts)
            counts = num_items_in_batch if known else StepCounts.of_batch(self.count(batch, teacher_output))
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
        weights = self._weights(terms)
        if teacher_output is not None and self._is_from_head(teacher_output):
            result, outputs, matched, learned = self._chunked_shares(
                model, batch, counts, terms, teacher_output, weights
            )
        else:
            result, outputs, matched, learned = self._dense_shares(
                model, batch, counts, terms, teacher_output, weights, fuse=fuse
            )
        loss, task_share, kd_share = result
        shares = {"task": None if batch.is_on_policy else task_share, "kd": kd_share, **matched}
        known = {name: share for name, share in shares.items() if share is not None}
        if matched:
            loss = torch.stack([loss, *(weights[name] * share for name, share in matched.items())]).sum()
        if learned:  # DDP waits for the gradient of what came out of the forward, also where a term is off
            unread = [value.flatten()[:0].sum() for values in learned.values() for value in values.values()]
            loss = torch.stack([loss, *(value.to(loss.dtype) for value in unread)]).sum()
        if self._balancer is not None:
            loss = self._balanced(loss, known, batch, counts, terms, learned.get(BALANCE, {}))
        for name, share in known.items():
            self._meter.add(f"loss_{name}", share * counts.world_scale)
        return loss if counts.world_scale == 1 else loss * counts.world_scale, outputs

    def _dense_shares(
        self,
        model: nn.Module,
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        teacher_output: TeacherOutput | None,
        weights: Mapping[str, Any],
        *,
        fuse: bool,
    ) -> tuple[Shares, Any, dict[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
        """The shares of both terms; the student's output, its shares of the matches, and what else is learned."""
        with_task = batch.has_targets and terms.task.weight > 0
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        is_sparse = teacher_output is not None and teacher_output.sparse is not None
        fuse = fuse and is_plain and not is_sparse and self._fused.suits(self._pair.task, terms, batch)
        arguments = self._student_arguments(batch, own_loss=with_task and not (fuse and self._fused.accepted))
        outputs, matched, learned = self._forward(model, arguments, batch, counts, terms, teacher_output)
        objective, signals = None, None
        if terms.logits.weight > 0:
            objective = self._objective(terms.logits, batch, terms.progress, learned)
            pairs = self._aligned(outputs, teacher_output, batch)
            signals = objective.signals(pairs, batch, self._weights_of(batch, teacher_output))
            if self._temperatures is not None:
                self._temperatures.add_all(signals.temperatures, batch.items.kd)
        result: Shares | None = None
        if fuse and teacher_output is not None and signals is not None:
            overwrite = teacher_output.overwritable
            result = self._fused(
                outputs, signals, batch, counts, weights, task=self._pair.task, overwrite_teacher=overwrite
            )
        if result is None:
            result = self._terms_apart(outputs, objective, signals, batch, counts, weights)
        return result, outputs, matched, learned

    def _weights(self, terms: ActiveTerms) -> dict[str, Any]:
        """The weight of each term now: numbers, or scalars without a graph where the terms are balanced."""
        weights: dict[str, Any] = terms.weights
        if self._balancer is None:
            return weights
        factors = self._balancer.factors().items()
        return weights | {name: weights[name] * factor for name, factor in factors if weights.get(name, 0) > 0}

    def _balanced(
        self,
        loss: Tensor,
        shares: Mapping[str, Tensor],
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss with what the balance adds to it; the shares are taken down for the next steps."""
        assert self._balancer is not None
        self._balancer.note(shares)
        part = batch.items.counts()[4] / divisor(counts.rows)
        penalty = self._balancer.penalty(parameters, shares, terms.weights, part)
        return loss if penalty is None else loss + penalty

    def _objective(
        self, term: LogitTerm, batch: Batch, progress: float, learned: Mapping[str, Mapping[str, Tensor]]
    ) -> LogitObjective:
        """The logit term for this batch's kind of head."""
        temperature = None
        if isinstance(term.temperature, LearnedTemperature):
            temperature = self._learned_temperature(term.temperature, progress, learned.get(TEMPERATURE))
        kind = self._problem_type(batch)
        check_logit_term(self.args.distillation.logits, self._pair.task, kind, None)
        return LogitObjective(
            term,
            self._pair.task,
            kind,
            learned=temperature,
            gather=lambda rows: gather_rows(rows, self.accelerator),
            rank=self.accelerator.process_index,
            reduce=lambda numbers: self.accelerator.reduce(numbers, "sum"),
        )

    def _learned_temperature(
        self, policy: LearnedTemperature, progress: float, parameters: Mapping[str, Tensor] | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """T as a function of student and teacher logits, with the parameters that came out of the forward."""
        modules: Any = {} if self._layers is None else self._layers.modules
        if TEMPERATURE in modules:
            module = modules[TEMPERATURE]
        else:  # an evaluation where none is trained: T as a training would begin with it
            module = temperature_module(policy, seed=self.args.seed).to(self.args.device)
        return partial(module.of, reversal=policy.reversal(progress), parameters=parameters)

    def _forward(
        self,
        model: nn.Module,
        arguments: dict[str, Any],
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        teacher_output: TeacherOutput | None,
    ) -> tuple[Any, dict[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
        """The student's output, its shares of the matches that are on, and the parameters of what else is learned."""
        if self._layers is None or not (terms.matches or self._layers.learned):
            return model(**arguments), {}, {}
        if not self._layers.is_attached:
            raise RuntimeError(
                "The student is in training mode outside train(), and terms between layers, learned temperatures and "
                "balanced weights exist inside train() alone. Call model.eval() before compute_loss to look at a loss."
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
        return recorded["student"], shares, recorded["features"][LEARNED]

    def _terms_apart(
        self,
        outputs: Any,
        objective: LogitObjective | None,
        signals: LogitSignals | None,
        batch: Batch,
        counts: StepCounts,
        weights: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weighted loss of a batch, and its shares of the terms before their weights."""
        weighted, task, kd = [], None, None
        if isinstance(weights["task"], Tensor) or weights["task"] > 0:
            task = self._task_loss(outputs, batch, counts) if batch.has_targets else self._nothing(outputs)
            is_one = not isinstance(weights["task"], Tensor) and weights["task"] == 1
            weighted.append(task if is_one else weights["task"] * task)
        if objective is not None and signals is not None:
            kd = objective.total(signals, batch) / divisor(counts.kd)
            weighted.append(weights["kd"] * kd)
        return torch.stack(weighted or [self._nothing(outputs)]).sum(), task, kd

    def _nothing(self, outputs: Any) -> Tensor:
        """0 with a graph, since DDP waits for the head's gradient whatever the terms read; 0 * (-inf) would be NaN."""
        first, *_ = read_logits(self._pair.task, outputs) or (outputs[0],)
        return first[:0].sum()

    @property
    def _student_config(self) -> Any:
        return task_model(self.model).config

    def _problem_type(self, batch: Batch) -> str:
        return problem_type(self._student_config, batch.labels.get("labels"), default=self._pair.problem_type)

    def _aligned(
        self, outputs: Any, teacher_output: TeacherOutput | None, batch: Batch
    ) -> list[tuple[Tensor, Tensor]]:
        if teacher_output is None or self._pair.task is Task.EMBEDDING:
            return []
        if teacher_output.sparse is not None:
            return [align_sparse(read_logits(self._pair.task, outputs), teacher_output.sparse, self._pair)]
        any_classes = LOSSES.get(self.args.distillation.logits.loss).any_classes
        student_logits, positions = read_logits(self._pair.task, outputs), batch.teacher_positions
        return self._pair.align(student_logits, teacher_output.logits, positions=positions, any_classes=any_classes)

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
