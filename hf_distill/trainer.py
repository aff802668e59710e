"""`Trainer` with a teacher: the overrides, and nothing else."""

import inspect
from collections import Counter
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    default_data_collator,
)
from transformers.utils.import_utils import is_in_notebook

from hf_distill.accounting import StepCounts, TermMeter, mark_repeated_rows
from hf_distill.adapters import add_adapters, check_adapters
from hf_distill.arguments import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
from hf_distill.batches import TEACHER_OUTPUT, Batch, split_batch
from hf_distill.checkpoints import checkpoint_to_resume
from hf_distill.chunked_terms import ChunkedTerms
from hf_distill.collator import TEACHER_POSITIONS, TEACHER_PREFIX, DistillationCollator
from hf_distill.dataset_checks import check_batch, find_label, label_filler
from hf_distill.evidence import EvidenceMixin
from hf_distill.fused_terms import FusedTerms
from hf_distill.histograms import write_histogram
from hf_distill.items import LABEL_MASK
from hf_distill.logit_setup import check_logits, known_problem_type, make_weights
from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.models.heads import frame_mask, input_names
from hf_distill.objective import loss_name
from hf_distill.on_policy import make_on_policy
from hf_distill.pairing import ModelPair, pair_models, special_tokens
from hf_distill.publishing import PublishingMixin
from hf_distill.setup import (
    check_arguments,
    check_label_names,
    check_teacher,
    check_trainer_arguments,
    make_student,
    make_teacher,
    teacher_tokenizer,
)
from hf_distill.teacher_scores import TeacherScoresMixin, check_teacher_scores
from hf_distill.teachers import Teacher
from hf_distill.temperature import TemperaturePolicy
from hf_distill.temperature_log import Histogram, TemperatureMeter
from hf_distill.text_setup import TextMixin
from hf_distill.weighting import ItemWeighting, weighting_columns


class DistillationMixin(EvidenceMixin, PublishingMixin, TeacherScoresMixin, TextMixin):
    """What a distillation changes in `Trainer`; put it before the trainer class it extends.

    Takes `Trainer`'s arguments and these:

    Args:
        model: the student: a module, or a name or path, which is loaded with the teacher's kind of head.
        args: `DistillationTrainingArguments`.
        teacher_model: a module; a name or path, loaded with the student's kind of head; a `Teacher`; or None for a
            PEFT student, whose base model with the adapters off then teaches.
        teacher_processing_class: the teacher's tokenizer or processor, where it is not the student's. It pads the
            `teacher_*` columns, which a teacher with inputs of its own reads.
        peft_config: the adapters that the student trains in place of its weights, as `peft.LoraConfig(r=16)`. The
            task type and the heads trained beside them follow the student's head where it does not name them.

    Raises:
        ValueError: before the first step, for anything that cannot be distilled as asked, with the remedy.
    """

    # Our loss is normalised over the whole accumulation window; Trainer must not divide it again.
    loss_is_scaled_for_ga: bool | None = True
    _arguments_class: type[DistillationTrainingArguments] = DistillationTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: DistillationTrainingArguments | None = None,
        *trainer_args: Any,
        teacher_model: PreTrainedModel | nn.Module | Teacher | str | None = None,
        teacher_processing_class: Any | None = None,
        peft_config: PeftConfig | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        check_trainer_arguments(trainer_kwargs, inspect.signature(super().__init__).parameters)
        if args is None:
            args = self._arguments_class(output_dir="tmp_trainer")
        check_arguments(args, self._arguments_class)
        student, teacher_model = make_student(model, teacher_model, args, peft_config)
        self._peft_config = peft_config
        self._meter, self._eval_meter, self._windows = TermMeter(), TermMeter(), 0
        self._fused, self._chunked, self._temperatures = FusedTerms(), ChunkedTerms(), None
        self._layers, self._balancer, self._item_weights = None, None, None
        self._term_steps: Counter[str] = Counter()
        self._starts, self._step_weights, self._active = True, {}, None
        self._teacher_tokenizer = teacher_processing_class
        super().__init__(student, args, *trainer_args, **trainer_kwargs)
        self.model_accepts_loss_kwargs = False
        if is_in_notebook():
            from hf_distill.callbacks import use_notebook_table  # IPython is not everywhere

            use_notebook_table(self.callback_handler)
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
        collator = self.data_collator
        self._common_collator = collator is default_data_collator or type(collator) is DataCollatorWithPadding
        self._prepare_text()
        required = args.task_weight > 0 and self._common_collator
        self._some_label = label = find_label(self.train_dataset, self._pair.task, required=required)
        self._has_labels = label is not None
        self.data_collator = DistillationCollator(
            self.data_collator,
            task=self._pair.task,
            filler=label_filler(self._pair.task, self._student_config, label),
            teacher_processing_class=teacher_processing_class,
            # The main process may make the batches of all (`dispatch_batches`, the default for streams).
            always_mask=self.accelerator.num_processes > 1 and self.accelerator.dispatch_batches is not False,
        )
        check_logits(self, self._some_label)
        check_teacher_scores(self)
        self._on_policy = make_on_policy(self)
        self._plan_weights()
        self._plan_layers(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; True goes on from the last whole checkpoint, with a warning of newer ones that are not.

        Raises:
            ValueError: True, where no checkpoint is whole; a damaged file in the one to go on from.
        """
        if resume_from_checkpoint is True:
            folder = Path(self.args.output_dir)
            found = checkpoint_to_resume(folder)
            if found is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({folder}). Leave resume_from_checkpoint out to "
                    "begin, or name a checkpoint."
                )
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _plan_weights(self) -> None:
        """Makes ready what weighs the items of the logit term."""
        self._weighted_by = self._weights_wanted
        collator: Any = self.data_collator
        collator.row_weights, self._item_weights = make_weights(self, self._some_label)
        self._signature_columns = None  # other weights read other columns

    @property
    def _weights_wanted(self) -> tuple[ItemWeighting, ...]:
        term = self.args.distillation.logits
        return term.item_weights if term.weight > 0 else ()

    def _pair_with(self, student: nn.Module) -> ModelPair:
        check_adapters(student, self.teacher)
        term = self.args.distillation.logits
        return pair_models(
            student,
            None if self.teacher is None else self.teacher.model,
            student_tokenizer=self.processing_class,
            teacher_tokenizer=self._teacher_tokenizer,
            token_alignment=term.token_alignment,
            any_classes=LOSSES.get(term.loss).any_classes,
            device=self.args.device,
        )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh student, checked against the teacher like the first."""
        model = super().call_model_init(trial)
        if self._peft_config is not None:
            model = add_adapters(model, self._peft_config)
        if hasattr(self, "_pair"):
            self._pair, self._fused = self._pair_with(model), FusedTerms()
            self._plan_layers(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            teacher_names = frozenset() if self.teacher is None else input_names(self.teacher.model)
            own = [*(TEACHER_PREFIX + name for name in sorted(teacher_names)), *sorted(self._pair.teacher_only_inputs)]
            columns: Any = self._signature_columns  # declared as None, whatever it holds
            weighting = frozenset() if self._item_weights is None else weighting_columns(self._weighted_by)
            columns += [*own, TEACHER_POSITIONS, LABEL_MASK, *sorted(self._extra_columns | weighting)]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` and a hyperparameter search come here anew: nothing of the last try may be logged.
        self._reset_logs()
        self._starts = True
        check_logits(self, self._some_label)
        if self._balancer is not None:
            self._balancer.forget()
        if self._weights_wanted != self._weighted_by:
            self._plan_weights()
        if self._weights_wanted and self._item_weights is None:
            raise ValueError(
                "The item weights are planned on train_dataset, which is None. Pass train_dataset, even where "
                "get_train_dataloader is your own."
            )
        check_arguments(self.args, self._arguments_class)
        self._check_text_settings()
        check_teacher(self.teacher, self.args)
        self._on_policy = make_on_policy(self)
        return super()._inner_training_loop(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        collator: Any = self.data_collator
        weights = getattr(collator, "row_weights", None)  # the user may have set a collator of their own since
        if weights is None or kwargs.get("is_training", False):
            return super()._get_dataloader(*args, **kwargs)
        evaluating = copy(collator)
        evaluating.row_weights = weights.for_evaluation()
        self.data_collator = evaluating
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def split(self, inputs: Mapping[str, Any]) -> Batch:
        """A collated batch, taken apart into what the student reads, what the teacher reads, and which items count."""
        return split_batch(
            inputs,
            self._pair,
            frames=lambda student: frame_mask(self.model, student),
            special_tokens=self._special_tokens,
            extra_columns=self._extra_columns,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """A window of micro-batches, with its items counted over the window and all ranks in place of a number."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        batches[-1] = mark_repeated_rows(batches[-1], self.accelerator)
        if self._windows == 0 and not self._has_labels:
            check_batch(batches[0], self._pair.task, self.args.task_weight)
        if self._balancer is not None:
            self._balancer.settle(self.accelerator)
        if self._starts and self._item_weights is not None:
            self._item_weights.replay(self.state.log_history)
        if self._on_policy is not None:
            batches = self._on_policy.replace(batches, self, check=self._starts)
        self._starts = False
        terms, items, has_targets = self.active_terms(), [], False
        for number, inputs in enumerate(batches):
            batch, output = self.split(self._prepare_inputs(inputs)), None
            if self._item_weights is not None and self._item_weights.needs_teacher and terms.logits.weight > 0:
                output = self.ask_teacher(batch, terms, training=True)
                batches[number] = {**inputs, TEACHER_OUTPUT: output}
            items.append(self.count(batch, output))
            has_targets |= not batch.is_on_policy
            if self._on_policy is not None:
                self._on_policy.note(self._meter, batch)
            if self._item_weights is not None:
                self._meter.add("item_weights", items[-1][2])
                self._meter.add("weighed_items", batch.items.kd.sum())
        counts = StepCounts.of_window(items, self.accelerator, across_devices=self.args.average_tokens_across_devices)
        self._windows += 1
        self._step_weights = self._weights(terms)
        # A match is computed while its scheduled weight is 0, too.
        weighed = [name for name, weight in terms.weights.items() if weight > 0]
        on = dict.fromkeys([*weighed, *(match.name for match in terms.matches)])  # in one order in every run
        self._term_steps.update(f"loss_{name}" for name in on if has_targets or name != "task")
        self._meter.add("labelled", counts.labelled)
        self._meter.add("rows", counts.rows)
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Nothing: `get_batch_samples` counts every kind of item, with one gather."""
        return

    def _reset_logs(self) -> None:
        """Forgets what was summed up for the next log."""
        self._meter.reset()
        self._windows, self._term_steps = 0, Counter()
        policy = self.args.distillation.logits.temperature
        self._temperatures = None
        if isinstance(policy, TemperaturePolicy):
            self._temperatures = TemperatureMeter(policy.lowest, policy.highest)

    def _now(self) -> tuple[dict[str, float], Histogram | None]:
        """The temperatures since the last log, the weights that change as they were last, and a histogram."""
        logs: dict[str, float] = {}
        histogram, config = None, self.args.distillation
        temperature = config.logits.temperature
        if isinstance(temperature, TemperaturePolicy):
            if self._temperatures is not None:
                logs, histogram = self._temperatures.totals(self.accelerator)
                histogram = histogram if temperature.is_per_item else None
        elif self._term_steps["loss_kd"] and self._loss_of_logits().takes_temperature:
            logs["temperature"] = temperature
        for name, term in config.terms.items():
            if term.weight > 0 and (term.weight_schedule is not None or self._balancer is not None):
                logs[f"weight_{name}"] = float(self._step_weights.get(name, 0.0))
        return logs, histogram

    def _loss_of_logits(self) -> LossSpec:
        kind = known_problem_type(self, self._some_label) or "single_label_classification"
        return LOSSES.get(loss_name(self.args.distillation.logits, self._pair.task, kind))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the terms beside the training loss: exact over micro-batches and ranks."""
        histogram = None
        if self._item_weights is not None:
            self._item_weights.update(logs)
        if "loss" in logs and self._windows > 0:
            totals = self._meter.totals(self.accelerator)
            processes = self.accelerator.num_processes
            steps = {name: number * processes for name, number in self._term_steps.items() if name in totals}
            logs |= {name: totals[name] / number for name, number in steps.items()}
            changing, histogram = self._now()
            logs |= changing
            if totals.get("weighed_items"):
                logs["item_weight"] = totals["item_weights"] / totals["weighed_items"]
            if self._item_weights is not None:
                logs |= self._item_weights.describe()
            if self._on_policy is not None:
                logs |= self._on_policy.describe(totals)
            logs["labelled_fraction"] = totals["labelled"] / totals["rows"]
            self._reset_logs()
        super().log(logs, start_time)
        if histogram is not None:
            write_histogram(self.callback_handler, self.state, "train/temperature", histogram)


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that distils: the same arguments, plus `teacher_model` (see `DistillationMixin`)."""


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that distils: its arguments plus `teacher_model` (see `DistillationMixin`)."""

    _arguments_class = Seq2SeqDistillationTrainingArguments
