"""A report of a training's models, with what the training measures them by."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from transformers.utils import logging

from hf_distill.collator import DistillationCollator
from hf_distill.metrics.direction import smaller_is_better
from hf_distill.report.measuring import make_report
from hf_distill.report.results import Report
from hf_distill.run_record import RunRecord
from hf_distill.signals import Task
from hf_distill.teachers import AdapterOffTeacher

logger = logging.get_logger(__name__)
# What an evaluation tells besides the scores of `compute_metrics`.
_NO_SCORES = ("loss", "kd", "agreement", "runtime", "samples_per_second", "steps_per_second")


def report_of(trainer: Any, dataset: Any = None, **options: Any) -> Report:
    """The report of a trainer's student and teacher, on one process.

    Its collator, tokenizers, metrics, batch size and record are taken where `options` name no others, and its
    `metric_for_best_model` as the score that retention refers to, if that is one of the task. Raw text is tokenised as
    for an evaluation. A report of the saved student on the same rows gives the same numbers.

    Args:
        trainer: a `DistillationTrainer`.
        dataset: None takes its `eval_dataset`, which must be one.
        options: as of `make_report`.

    Raises:
        ValueError: there is no teacher, no data set, or only a part of the student is in this process.
    """
    if trainer.teacher is None:
        raise ValueError("There is no teacher to compare the student with. Pass teacher_model= to the trainer.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "The student is sharded, and a report measures it whole, on one process. Save it (trainer.save_model()) "
            "and call hf_distill.make_report on its folder."
        )
    rows, collator = _rows(trainer, trainer.eval_dataset if dataset is None else dataset)
    compute = _metrics(trainer)
    found = {
        "processing_class": trainer.processing_class,
        "teacher_processing_class": trainer._teacher_tokenizer,
        "data_collator": collator,
        "compute_metrics": compute,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics if compute is not None else None,
        "device": trainer.args.device,
        "batch_size": trainer.args.eval_batch_size,
        "training": RunRecord.of(trainer).to_dict(),
    }
    if compute is not None:
        found |= _wanted(trainer)
    teacher = trainer.teacher
    if isinstance(teacher, AdapterOffTeacher):
        teacher = _base_of(trainer.model)
    return make_report(teacher, trainer.model, rows, **{**found, **options})


def _base_of(student: Any) -> Any:
    """A copy of a PEFT model's base, as it is with the adapters off: it can be saved, timed and made smaller."""
    copied = copy.deepcopy(student)
    for module in copied.modules():
        if isinstance(module, ModulesToSaveWrapper):
            # `unload` (peft 0.21) puts the trained head in the place of the one that it was copied from.
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return copied.unload()


def _wanted(trainer: Any) -> dict[str, Any]:
    """The score by which the best model is told, where `compute_metrics` gives it."""
    given = trainer.args.metric_for_best_model
    if given is None or isinstance(trainer.eval_dataset, Mapping):  # whose scores have the names of the parts in front
        return {}
    name = given.removeprefix("eval_").removeprefix("retention_")
    if name in _NO_SCORES or name.startswith("teacher_"):
        return {}
    # By its default `greater_is_better` is true of all but losses, and a retention is always better where it is more.
    return {"metric": name, "higher_is_better": bool(trainer.args.greater_is_better) and not smaller_is_better(name)}


def _rows(trainer: Any, dataset: Any) -> tuple[Any, Any]:
    """The rows and the collator of an evaluation, which gets the columns that it gets in one."""
    if dataset is None:
        raise ValueError("There are no rows to measure on. Pass dataset=, or eval_dataset= to the trainer.")
    if isinstance(dataset, Mapping):
        names = ", ".join(map(str, dataset))
        raise ValueError(f"The evaluation set is a dict of {names}. Pass one of them: trainer.report(dataset=...).")
    dataset, collator = trainer._with_tokens(dataset, "eval_dataset"), trainer.data_collator
    if not isinstance(collator, DistillationCollator):  # the user has set one of their own since
        return dataset, collator
    collator = copy.copy(collator)
    if trainer._text_collator is not None:
        collator.collator = trainer._text_collator
    if hasattr(dataset, "remove_columns") and getattr(dataset, "column_names", None):
        return trainer._remove_unused_columns(dataset, description="evaluation"), collator
    collator.collator = trainer._get_collator_with_removed_columns(collator.collator, description="evaluation")
    return dataset, collator


def _metrics(trainer: Any) -> Any | None:
    """The trainer's own metrics, if they can be formed of logits and labels."""
    compute = trainer.compute_metrics
    if compute is None:
        return None
    args, task = trainer.args, trainer._pair.task
    is_text = task.is_language_model and task is not Task.CTC
    reason = None
    if getattr(args, "predict_with_generate", False):
        reason = "it reads generated text"
    elif args.batch_eval_metrics:
        reason = "it sums up batches by itself (batch_eval_metrics)"
    elif args.include_for_metrics:
        reason = f"it reads {' and '.join(args.include_for_metrics)} too (include_for_metrics)"
    elif is_text and trainer.preprocess_logits_for_metrics is None and not isinstance(compute, functools.partial):
        reason = "it reads all logits of the evaluation set (pass preprocess_logits_for_metrics to the trainer)"
    if reason is None:
        return compute
    logger.warning(f"The report takes the task's own metrics and not the trainer's compute_metrics: {reason}.")
    return None
