"""Evaluation that is exact over batches and ranks, with the teacher's view beside the labels'."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import BestRun, EvalLoopOutput
from transformers.utils import logging

from hf_distill.accounting import StepCounts, TermMeter, divisor, mark_repeated_rows
from hf_distill.arguments import FLAT_FIELDS
from hf_distill.batches import TARGETS, Batch, student_inputs
from hf_distill.chunked_terms import ChunkedTerms
from hf_distill.item_weights import ItemWeights
from hf_distill.losses.base import masked_sum
from hf_distill.losses.chunked_head import HeadTerms
from hf_distill.matching.plan import batch_columns
from hf_distill.models.heads import input_names
from hf_distill.objective import LogitObjective, agreement_sum
from hf_distill.pairing import ModelPair
from hf_distill.progress import ActiveTerms, evaluation_term
from hf_distill.signals import Task, TeacherOutput
from hf_distill.task_loss import is_sum, item_losses, span_sums
from hf_distill.teachers import Teacher
from hf_distill.weighting import ITEM_GROUP

if TYPE_CHECKING:  # the mixins call and override what a trainer class beside them has
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object

logger = logging.get_logger(__name__)


def _loss_of(metrics: Mapping[str, float]) -> float:
    if "eval_loss" not in metrics:
        raise ValueError(
            f"The search minimises eval_loss, but the evaluation gave {', '.join(metrics)}: its rows have no labels, "
            'or eval_dataset is a dict. Pass compute_objective, e.g. lambda metrics: metrics["eval_kd"].'
        )
    return metrics["eval_loss"]


class EvaluationMixin(TrainerBase):
    """`Trainer`'s evaluation, with `eval_loss`, `eval_kd` and `eval_agreement` as sums over global counts.

    `Trainer` averages the batches' means, and repeats rows where ranks do not come out even; here each item counts
    once.
    """

    _eval_meter: TermMeter
    _pair: ModelPair
    teacher: Teacher | None
    split: Callable[[Mapping[str, Any]], Batch]
    _item_weights: ItemWeights | None
    _chunked: ChunkedTerms
    _chunked_values: Callable[..., tuple[HeadTerms | None, Any]]
    _is_from_head: Callable[[TeacherOutput | None], bool]
    _aligned: Callable[..., list[tuple[Tensor, Tensor]]]
    _objective: Callable[..., LogitObjective]
    _problem_type: Callable[[Batch], str]
    _student_config: Any
    _student_arguments: Callable[..., dict[str, Any]]
    _task_loss: Callable[[Any, Batch, StepCounts], Tensor]

    @property
    def _extra_columns(self) -> frozenset[str]:
        """The columns of a batch that neither model reads."""
        columns = self._match_columns
        return columns if self._item_weights is None else columns | self._item_weights.columns

    @property
    def _match_columns(self) -> frozenset[str]:
        args: Any = self.args
        columns = batch_columns(args.distillation.matches)
        if not columns:  # read several times a step
            return columns
        models: Any = [self.model, *(() if self.teacher is None else (self.teacher.model,))]
        read = frozenset(TARGETS).union(*map(input_names, models))
        return columns - read

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # An evaluation before the training prepares the bare student, and accelerate (1.15) then takes it for one that
        # is prepared for training too: without DDP around it, each rank would train a model of its own, unnoticed.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        student: Any = self.model
        if self.accelerator.num_processes > 1 and not sharded and hasattr(student, "_is_accelerate_prepared"):
            del student._is_accelerate_prepared
            if not isinstance(self.model_wrapped, DistributedDataParallel):
                self.model_wrapped = student
        return super()._inner_training_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels of one evaluation batch, as `Trainer` gives them; the sums go into the meter."""
        inputs = mark_repeated_rows(self._prepare_inputs(inputs), self.accelerator)
        student = student_inputs(inputs, self._pair, self._extra_columns)
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        # Text can be generated where there is no target for a loss, and nothing for a decoder to read.
        if not generates or {"labels", "decoder_input_ids"} & {*student}:
            with torch.no_grad(), self.compute_loss_context_manager():
                # Without them a language model's logits need not be formed.
                with_outputs = not prediction_loss_only
                result: Any = self.compute_loss(model, inputs, return_outputs=with_outputs)
                loss, outputs = result if with_outputs else (result, {})
        if generates:
            return super().prediction_step(model, student, prediction_loss_only, ignore_keys, **gen_kwargs)
        loss = None if loss is None else loss.detach()
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            ignore_keys = getattr(
                getattr(self.model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"]
            )
        logits = nested_detach(tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"]))
        return loss, logits[0] if len(logits) == 1 else logits, self.given_labels(inputs)

    def given_labels(self, inputs: Mapping[str, Any]) -> Any:
        """A batch's labels as `Trainer` hands them to metrics: a tensor or several, None unless all are there."""
        labels: Any = nested_detach(tuple(inputs[name] for name in self.label_names if name in inputs))
        if len(labels) < len(self.label_names) or not labels:
            return None
        return labels[0] if len(labels) == 1 else labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop; the exact sums replace its loss and add the teacher's metrics."""
        self._eval_meter = TermMeter()
        student: Any = self.model
        with self._chunked.attached(student):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        totals = self._eval_meter.totals(self.accelerator)
        metrics = {} if output.metrics is None else output.metrics
        # Question answering has two targets, the start and the end, and its loss is the mean of their means.
        losses = [totals[f"task_{i}"] / totals[f"task_items_{i}"] for i in (0, 1) if totals.get(f"task_items_{i}")]
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        else:  # the mean over no label at all is no loss of 0
            metrics.pop(f"{metric_key_prefix}_loss", None)
            args: Any = self.args
            if args.task_weight > 0 and self._pair.task.is_language_model and metric_key_prefix.startswith("eval"):
                logger.warning_once(
                    f"There is no {metric_key_prefix}_loss, as no row of this evaluation set has a label. Give it a "
                    "labels column, or a data collator that makes one (DataCollatorForLanguageModeling)."
                )
        for metric in ("kd", "agreement"):
            if metric in totals and totals.get("kd_items"):
                metrics[f"{metric_key_prefix}_{metric}"] = totals[metric] / totals["kd_items"]
        for name in () if self._item_weights is None else self._item_weights.group_names.values():
            if totals.get(f"group_items_{name}"):
                metrics[f"{metric_key_prefix}_loss_{name}"] = totals[f"group_{name}"] / totals[f"group_items_{name}"]
        return output._replace(metrics=metrics)

    def _evaluation_terms(self, batch: Batch) -> ActiveTerms:
        """The terms as evaluations measure them."""
        args: Any = self.args
        config = args.distillation
        task = replace(config.task, weight=float(batch.has_targets), weight_schedule=None)
        return ActiveTerms(task, evaluation_term(config))

    def _evaluation_loss(
        self, model: nn.Module, batch: Batch, terms: ActiveTerms, teacher_output: TeacherOutput | None
    ) -> tuple[Tensor | None, Any]:
        """The task loss of a batch, with the sums of all metrics in the meter."""
        counts, kind = StepCounts.of_batch(batch.items.counts()), self._problem_type(batch)
        if teacher_output is not None and self._is_from_head(teacher_output):
            found, outputs = self._chunked_values(model, batch, terms, teacher_output)
            if found is not None:
                return self._add_values(found, batch, counts), outputs
            teacher_output = teacher_output.formed()
        outputs = model(**self._student_arguments(batch, own_loss=bool(batch.labels)))
        task = self._task_loss(outputs, batch, counts) if batch.labels else None
        if task is not None:
            self._add_task_loss(task, outputs, batch, counts)
            if self._has_groups(batch):
                config = self._student_config
                losses = item_losses(outputs, batch, task=self._pair.task, problem_type=kind, config=config)
                self._add_group_losses(losses, batch)
        if pairs := self._aligned(outputs, teacher_output, batch):
            objective = self._objective(terms.logits, batch, 1.0, {})
            self._eval_meter.add("kd", objective.total(objective.signals(pairs, batch), batch))
            self._eval_meter.add("kd_items", counts.kd)
            choices = self._pair.choices(pairs, any_classes=objective.spec.any_classes)
            agreement = agreement_sum(choices, batch, task=self._pair.task, problem_type=kind)
            if agreement is not None:
                self._eval_meter.add("agreement", agreement)
        return task, outputs

    def _add_values(self, found: HeadTerms, batch: Batch, counts: StepCounts) -> Tensor | None:
        """Takes down what was formed without logits; returns the task loss, the mean."""
        assert found.agreement is not None
        self._eval_meter.add("kd", found.divergence.sum())
        self._eval_meter.add("kd_items", counts.kd)
        self._eval_meter.add("agreement", masked_sum(found.agreement.float(), batch.items.kd))
        if not batch.labels:
            return None
        total = found.cross_entropy.sum()
        self._eval_meter.add("task_0", total)
        self._eval_meter.add("task_items_0", counts.task[0])
        if self._has_groups(batch):
            self._add_group_losses([(found.cross_entropy, batch.items.task[0])], batch)
        return total / divisor(counts.task[0])

    def _add_task_loss(self, mean: Tensor, outputs: Any, batch: Batch, counts: StepCounts) -> None:
        sums = [mean if is_sum(self._pair.task, self._student_config) else mean * counts.task[0]]
        if self._pair.task is Task.QUESTION_ANSWERING and self.compute_loss_func is None:
            sums = [*span_sums(outputs, batch)]
        for side, total in enumerate(sums):
            self._eval_meter.add(f"task_{side}", total)
            self._eval_meter.add(f"task_items_{side}", counts.task[side])

    def _has_groups(self, batch: Batch) -> bool:
        return self._item_weights is not None and ITEM_GROUP in batch.extras

    def _add_group_losses(self, losses: Iterable[tuple[Tensor, Tensor]], batch: Batch) -> None:
        """The sums of the task loss in each group of rows, where weights follow them."""
        assert self._item_weights is not None
        for values, mask in losses:
            groups = self._item_weights.groups(batch, mask)
            for number, name in enumerate(self._item_weights.group_names.values()):
                self._eval_meter.add(f"group_{name}", masked_sum(values, mask & (groups == number)))
                self._eval_meter.add(f"group_items_{name}", (mask & (groups == number)).sum())

    def _hp_search_setup(self, trial: Any) -> None:
        # `Trainer` casts what a trial tries to the type of what was there: 3.8 becomes 3 beside temperature=4.
        args: Any = self.args
        before = {name: getattr(args, name) for name in FLAT_FIELDS}
        for name in before:
            setattr(args, name, None)
        try:
            super()._hp_search_setup(trial)
        finally:
            for name, value in before.items():
                if getattr(args, name) is None:
                    setattr(args, name, value)

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """`Trainer.hyperparameter_search`, whose objective is `eval_loss` unless another is given.

        `Trainer` would add up every metric there is, agreement and distance alike.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _loss_of, *args, **kwargs)
