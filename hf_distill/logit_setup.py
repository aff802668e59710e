"""From the logit term asked for to what a training needs for it, refusing before the first step what cannot work."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_distill.dataset_checks import is_indexed, kind_of_label, label_columns
from hf_distill.item_weights import ItemWeights
from hf_distill.losses.base import LOSSES
from hf_distill.models.heads import task_model
from hf_distill.objective import loss_name
from hf_distill.objective_checks import check_head, check_logit_term
from hf_distill.row_weights import RowWeights
from hf_distill.signals import Task
from hf_distill.sparse_terms import are_all_classes, check_sparse_pair, check_sparse_term
from hf_distill.teachers import SparseTeacher
from hf_distill.weighting_checks import check_weights, find_groups


def check_logits(trainer: Any, label: Any) -> None:
    """Refuses a logit term that does not fit the head, and any term of a head where there is none.

    Args:
        trainer: a `DistillationTrainer` with its pair of models.
        label: some label of its data, or None.

    Raises:
        ValueError: with what would fit.
    """
    config, pair = task_model(trainer.model).config, trainer._pair
    terms = trainer.args.distillation
    check_head(pair.task, kd_weight=terms.logits.weight, task_weight=terms.task.weight)
    kind, term = known_problem_type(trainer, label), terms.logits
    if trainer.teacher is not None and pair.task is not Task.EMBEDDING:
        term = replace(term, weight=1.0)  # an evaluation measures it, whatever it weighs
    classes, teacher = compared_classes(config, pair), trainer.teacher
    check_logit_term(term, pair.task, kind, classes)
    if isinstance(teacher, SparseTeacher) and term.weight > 0 and pair.task is not Task.EMBEDDING:
        check_sparse_pair(pair)
        spec = LOSSES.get(loss_name(term, pair.task, kind or "single_label_classification"))
        if not are_all_classes(teacher.sparse_k, named_classes(config, pair), spec):
            check_sparse_term(term, spec, k=teacher.sparse_k, temperature=teacher.sparse_temperature)


def known_problem_type(trainer: Any, label: Any) -> str | None:
    """The kind of sequence classification, as far as it can be told before the first batch."""
    config, pair = task_model(trainer.model).config, trainer._pair
    if pair.task is not Task.SEQUENCE_CLASSIFICATION:
        return None
    if config.problem_type is None and pair.problem_type is not None:
        return pair.problem_type
    is_told = label is not None or config.problem_type is not None or config.num_labels == 1
    return kind_of_label(pair.task, config, label) if is_told else None


def compared_classes(config: Any, pair: Any) -> int | None:
    """How many classes are compared; None where the input decides, as with choices and positions."""
    if pair.task.has_named_labels:
        return config.num_labels
    if pair.task.is_language_model:
        return pair.classes or config.get_text_config(decoder=True).vocab_size
    return None


def named_classes(config: Any, pair: Any) -> int | None:
    """How many classes a teacher has to name to say all: its own too that are not compared; None as above."""
    classes = compared_classes(config, pair)
    return classes if classes is None or pair.vocabulary is None else max(classes, pair.vocabulary.teacher_size)


def make_weights(trainer: Any, label: Any) -> tuple[RowWeights | None, ItemWeights | None]:
    """What weighs the items of the logit term: in the collator, and in the step; None each where all weigh alike.

    Args:
        trainer: as in `check_logits`, with its data sets.
        label: some label of its data, or None.

    Raises:
        ValueError: a column that the data do not have, or weights that the head or the data cannot have.
    """
    term = trainer.args.distillation.logits
    if not term.item_weights or term.weight == 0 or trainer.train_dataset is None:
        return None, None
    looks_for_labels = (
        label_columns(trainer._pair.task) and is_indexed(trainer.train_dataset) and trainer._common_collator
    )
    check_weights(term.item_weights, trainer.train_dataset, has_labels=label is not None if looks_for_labels else None)
    follows = any(getattr(setting, "follow", None) for setting in term.item_weights)
    if follows and trainer.args.eval_strategy == "no":
        raise ValueError(
            "Weights that follow the loss of each group need evaluations during the training, and eval_strategy is "
            "'no'. Set eval_strategy='steps' or 'epoch'."
        )
    if follows and isinstance(trainer.eval_dataset, Mapping):
        raise ValueError(
            "Weights that follow the loss of each group need one eval_dataset, and here is a dict of several. Join "
            "them (datasets.concatenate_datasets)."
        )
    sizes = find_groups(term.item_weights, trainer.train_dataset, trainer.eval_dataset)
    task = trainer._pair.task
    by_row = [setting for setting in term.item_weights if setting.columns]
    rows = RowWeights(
        by_row,
        task=task,
        tokenizer=trainer.processing_class,
        group_sizes=sizes,
        kept=trainer._match_columns,
    )
    kind = known_problem_type(trainer, label) or "single_label_classification"
    return rows if by_row else None, ItemWeights(term.item_weights, task=task, problem_type=kind, group_sizes=sizes)
