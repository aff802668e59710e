"""`Trainer` with a teacher: the overrides, and nothing else."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_distill.accounting import StepCounts, TermMeter, mark_repeated_rows
from hf_distill.arguments import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
from hf_distill.batches import Batch, split_batch
from hf_distill.collator import TEACHER_PREFIX, DistillationCollator
from hf_distill.config import DistillationConfig
from hf_distill.dataset_checks import check_batch, find_label, label_filler
from hf_distill.evaluation import EvaluationMixin
from hf_distill.items import LABEL_MASK
from hf_distill.models.heads import decoder_inputs, frame_mask, input_names, problem_type, task_model
from hf_distill.objective import agreement_sum, kd_sum
from hf_distill.pairing import ModelPair, pair_models, special_tokens
from hf_distill.setup import check_arguments, check_label_names, make_teacher, teacher_tokenizer
from hf_distill.signals import Task, read_logits
from hf_distill.task_loss import check_smoothing, is_sum, task_loss
from hf_distill.teachers import Teacher, load_student, load_teacher


class DistillationMixin(EvaluationMixin):
    """What a distillation changes in `Trainer`; put it before the trainer class it extends.

    Takes `Trainer`'s arguments and these:

    Args:
        model: the student: a module, or a name or path, which is loaded with the teacher's kind of head.
        args: `DistillationTrainingArguments`.
        teacher_model: a module; a name or path, loaded with the student's kind of head; a `Teacher`; or None for a
            PEFT student, whose base model with the adapters off then teaches.
        teacher_processing_class: the teacher's tokenizer or processor, where it is not the student's. It pads the
            `teacher_*` columns, which a teacher with inputs of its own reads.

    Raises:
        ValueError: before the first step, for anything that cannot be distilled as asked, with the remedy.
    """

    # Our loss is normalised over the whole accumulation window; Trainer must not divide it again.
    loss_is_scaled_for_ga: bool | None = True
    _arguments_class: type[DistillationTrainingArguments] = DistillationTrainingArguments
    args: DistillationTrainingArguments
    model: Any
    teacher: Teacher | None
    _pair: ModelPair

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: DistillationTrainingArguments | None = None,
        *trainer_args: Any,
        teacher_model: PreTrainedModel | nn.Module | Teacher | str | None = None,
        teacher_processing_class: Any | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if args is None:
            args = self._arguments_class(output_dir="tmp_trainer")
        check_arguments(args, self._arguments_class)
        if isinstance(model, str | os.PathLike):
            if isinstance(teacher_model, str | os.PathLike):
                teacher_model = load_teacher(os.fspath(teacher_model), None, args.teacher_model_init_kwargs)
            teacher_module = teacher_model if isinstance(teacher_model, nn.Module) else None
            set_seed(args.seed)  # a new head is part of the run, and `Trainer` seeds too late for it
            model = load_student(os.fspath(model), teacher_module, args.model_init_kwargs)
        self._meter, self._eval_meter, self._windows = TermMeter(), TermMeter(), 0
        self._teacher_tokenizer = teacher_processing_class
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        self.model_accepts_loss_kwargs = False
        if args.task_weight > 0:
            check_label_names(self.label_names)
        self.teacher = make_teacher(
            teacher_model, student=lambda: self.model, args=args, autocast=self.accelerator.autocast
        )
        if self.teacher is not None:
            self.teacher.place(args.device)
            if self._teacher_tokenizer is None:
                self._teacher_tokenizer = teacher_tokenizer(teacher_model, self.teacher, self.processing_class)
        self._pair = self._pair_with(self.model)
        self._special_tokens = special_tokens(self.processing_class, args.device)
        # A collator of the user's own may make labels of columns by any name: then the first batch tells.
        common = self.data_collator is default_data_collator or type(self.data_collator) is DataCollatorWithPadding
        required = args.task_weight > 0 and common
        label = find_label(self.train_dataset, self._pair.task, required=required)
        self._has_labels = label is not None
        self.data_collator = DistillationCollator(
            self.data_collator,
            task=self._pair.task,
            filler=label_filler(self._pair.task, self._student_config, label),
            teacher_processing_class=teacher_processing_class,
        )

    def _pair_with(self, student: nn.Module) -> ModelPair:
        return pair_models(
            student,
            None if self.teacher is None else self.teacher.model,
            student_tokenizer=self.processing_class,
            teacher_tokenizer=self._teacher_tokenizer,
            device=self.args.device,
        )

    @property
    def _student_config(self) -> Any:
        return task_model(self.model).config

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh student, checked against the teacher like the first."""
        model = super().call_model_init(trial)
        if hasattr(self, "_pair"):
            self._pair = self._pair_with(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            teacher_names = frozenset() if self.teacher is None else input_names(self.teacher.model)
            own = [*(TEACHER_PREFIX + name for name in sorted(teacher_names)), *sorted(self._pair.teacher_only_inputs)]
            columns: Any = self._signature_columns  # declared as None, whatever it holds
            columns += [*own, LABEL_MASK]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` and a hyperparameter search come here anew: nothing of the last try may be logged.
        self._meter.reset()
        self._windows = 0
        check_arguments(self.args, self._arguments_class)
        return super()._inner_training_loop(*args, **kwargs)

    def split(self, inputs: Mapping[str, Any]) -> Batch:
        """A collated batch, taken apart into what the student reads, what the teacher reads, and which items count."""
        return split_batch(
            inputs,
            self._pair,
            frames=lambda student: frame_mask(self.model, student),
            special_tokens=self._special_tokens,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """A window of micro-batches, with its items counted over the window and all ranks in place of a number."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        batches[-1] = mark_repeated_rows(batches[-1], self.accelerator)
        if self._windows == 0 and not self._has_labels:
            check_batch(batches[0], self._pair.task, self.args.task_weight)
        counts = StepCounts.of_window(
            [self.split(self._prepare_inputs(batch)).items for batch in batches],
            self.accelerator,
            across_devices=self.args.average_tokens_across_devices,
        )
        self._windows += 1
        self._meter.add("labelled", counts.counts[3])
        self._meter.add("rows", counts.counts[4])
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Nothing: `get_batch_samples` counts every kind of item, with one gather."""
        return

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
        terms = self.args.distillation
        batch = self.split(inputs)
        counts = num_items_in_batch if isinstance(num_items_in_batch, StepCounts) else StepCounts.of_batch(batch.items)
        teacher_output = None
        if self.teacher is not None and (terms.logits.weight > 0 or not model.training):
            teacher_output = self.teacher(batch.teacher)
        with_task = bool(batch.labels) and (terms.task.weight > 0 or not model.training)
        outputs = model(**self._student_arguments(batch, with_task=with_task))
        kind = problem_type(self._student_config, batch.labels.get("labels"), default=self._pair.problem_type)
        task = self._task_loss(outputs, batch, counts, kind) if with_task else None
        kd = None
        if teacher_output is not None:
            pairs = self._pair.align(read_logits(self._pair.task, outputs), teacher_output.logits)
            kd = kd_sum(pairs, batch, terms.logits, task=self._pair.task, problem_type=kind)
        if not model.training:
            agreement = None if kd is None else agreement_sum(pairs, batch, task=self._pair.task, problem_type=kind)
            self._add_to_evaluation(batch, task, kd, agreement)
            return (task, outputs) if return_outputs else task
        loss = self._weighted(terms, counts, task, kd, outputs)
        return (loss, outputs) if return_outputs else loss

    def _student_arguments(self, batch: Batch, *, with_task: bool) -> dict[str, Any]:
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        own_loss = with_task and (is_plain or "labels" not in batch.labels)
        if own_loss or not batch.labels:
            return batch.student
        arguments = batch.unlabelled_student
        if self._pair.task is Task.SEQ2SEQ_LM and "decoder_input_ids" not in arguments:
            arguments = {**arguments, **decoder_inputs(self.model, batch.labels["labels"])}
        return arguments

    def _task_loss(self, outputs: Any, batch: Batch, counts: StepCounts, kind: str) -> Tensor:
        labels = batch.labels.get("labels")
        items = counts.task[0].clamp(min=1)
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=items)
        if self.label_smoother is not None:
            check_smoothing(self._pair.task, kind, labels)
            shifts = self._pair.task is Task.CAUSAL_LM
            return self.label_smoother(outputs, labels, shift_labels=shifts, num_items_in_batch=items)
        return task_loss(outputs, batch, counts, task=self._pair.task, problem_type=kind, config=self._student_config)

    def _weighted(
        self,
        terms: DistillationConfig,
        counts: StepCounts,
        task: Tensor | None,
        kd: Tensor | None,
        outputs: Any,
    ) -> Tensor:
        """The loss to minimise, with each term in the meter before its weight."""
        parts = []
        if terms.task.weight > 0:
            # A batch of unlabelled rows alone must still give a number and a graph; 0 * (a sum of -inf) would be NaN.
            task = read_logits(self._pair.task, outputs)[0][:0].sum() if task is None else task
            parts.append(("loss_task", terms.task.weight, task))
        if kd is not None:
            parts.append(("loss_kd", terms.logits.weight, kd / counts.kd.clamp(min=1)))
        for name, _, value in parts:
            self._meter.add(name, value * counts.world_scale)
        loss = torch.stack([value if weight == 1 else weight * value for _, weight, value in parts]).sum()
        return loss if counts.world_scale == 1 else loss * counts.world_scale

    def _add_to_evaluation(
        self, batch: Batch, task: Tensor | None, kd: Tensor | None, agreement: Tensor | None
    ) -> None:
        items = batch.items.counts()
        if task is not None:
            is_mean = not is_sum(self._pair.task, self._student_config)
            self._eval_meter.add("loss", task * items[0] if is_mean else task)
            self._eval_meter.add("task_items", items[0])
        if kd is not None:
            self._eval_meter.add("kd", kd)
            self._eval_meter.add("kd_items", items[2])
        if agreement is not None:
            self._eval_meter.add("agreement", agreement)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the terms beside the training loss: exact over micro-batches and ranks."""
        if "loss" in logs and self._windows > 0:
            totals = self._meter.totals(self.accelerator)
            shares = {name: totals[name] for name in ("loss_task", "loss_kd") if name in totals}
            steps = self._windows * self.accelerator.num_processes
            logs |= {name: total / steps for name, total in shares.items()}
            if "loss_kd" in shares:
                logs["temperature"] = self.args.temperature
            logs["labelled_fraction"] = totals["labelled"] / totals["rows"]
            self._meter.reset()
            self._windows = 0
        super().log(logs, start_time)


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that distils: the same arguments, plus `teacher_model` (see `DistillationMixin`)."""


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):  # type: ignore[misc]
    """`transformers.Seq2SeqTrainer` that distils: its arguments plus `teacher_model` (see `DistillationMixin`)."""

    _arguments_class = Seq2SeqDistillationTrainingArguments
