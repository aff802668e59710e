"""Refuses a logit term that would say nothing, or something else than it seems to, for a head."""

from hf_distill.config import LogitTerm
from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.objective import loss_name
from hf_distill.signals import Task
from hf_distill.targets import has_class_targets
from hf_distill.temperature import LearnedTemperature, TemperaturePolicy
from hf_distill.weighting import TeacherWeights

_MULTI_LABEL, _REGRESSION = "multi_label_classification", "regression"
_LEAST_TO_STANDARDIZE = 3


def check_logit_term(term: LogitTerm, task: Task, problem_type: str | None, classes: int | None) -> None:
    """Refuses a logit term that cannot work for a head.

    Args:
        term: the term; one of weight 0 is not looked at.
        task: what the head predicts.
        problem_type: Transformers' name of the kind of sequence classification, where it is known yet.
        classes: how many classes are compared, where that is known before the first batch.

    Raises:
        ValueError: with what is wrong and what would work.
    """
    if term.weight == 0:
        return
    check_head(task, kd_weight=term.weight)
    is_row = task is Task.SEQUENCE_CLASSIFICATION
    kind = problem_type if is_row else None
    spec = LOSSES.get(loss_name(term, task, problem_type or "single_label_classification"))
    _check_kind(spec, term, kind)
    _check_classes(spec, term, classes if kind != _MULTI_LABEL or spec.compares != "labels" else None)
    if spec.takes_targets and not has_class_targets(task, problem_type or "single_label_classification"):
        what = _words(task, kind)
        raise ValueError(f"kd_loss={spec.name!r} sets the label's class apart, and {what} has no single one per item.")
    if spec.compares_rows and not task.one_item_per_row:
        raise ValueError(
            f"kd_loss={spec.name!r} compares the rows of a batch with each other, and {task} has a prediction for "
            "every position. Take a loss that looks at one position at a time, such as forward_kl or dkd."
        )
    _check_temperature(spec, term, task, kind)
    _check_token_alignment(spec, term)
    if spec.name == "nkd" and not term.temperature_squared:
        raise ValueError(
            "logits: temperature_squared: false divides the whole loss by T squared, and of nkd only a part has the "
            "factor. Leave it out, or set temperature: 1."
        )
    if term.transform == "standardize" and spec.compares == "labels":
        raise ValueError(
            f"logits: transform: standardize rescales the classes of a distribution, and {spec.name} compares "
            "independent labels. Drop it."
        )


def check_head(task: Task, *, kd_weight: float = 0.0, task_weight: float = 0.0) -> None:
    """Refuses terms that read a head where there is none.

    Args:
        task: what the head predicts.
        kd_weight: the weight of the logit term.
        task_weight: the weight of the task term.

    Raises:
        ValueError: with the terms that need no head.
    """
    weights = {"kd_weight": kd_weight, "task_weight": task_weight}
    on = [f"{name}={weight}" for name, weight in weights.items() if weight > 0]
    if task is Task.EMBEDDING and on:
        raise ValueError(
            f"The student has no head, so it has no logits and no task loss, but {' and '.join(on)} (both are 0.5 "
            "where neither they, a distillation_config nor a preset is given). Compare embeddings instead: "
            'distillation_config={"matches": [{"name": "embedding", "student": "pooled(mean)@hidden[-1]", "loss": '
            '"hidden_mse"}]}, or all layers: kd_weight=0, task_weight=0, hidden_weight=1. Or load the student with a '
            "head."
        )


def _words(task: Task, kind: str | None) -> str:
    return str(task) if kind is None else kind.replace("_", " ")


def _check_kind(spec: LossSpec, term: LogitTerm, kind: str | None) -> None:
    if spec.compares == "classes" and kind in (_MULTI_LABEL, _REGRESSION):
        fitting = [name for name in LOSSES if LOSSES.get(name).feature == "logits"]
        allowed = ("outputs",) if kind == _REGRESSION else ("labels", "outputs")
        fitting = [name for name in fitting if LOSSES.get(name).compares in allowed]
        raise ValueError(
            f"kd_loss={spec.name!r} compares distributions over classes, but the outputs of {_words(Task.CTC, kind)} "
            f"are none. Take forward_kl, which means {_counterpart(kind)} there, or one of {', '.join(fitting)}."
        )
    if spec.compares == "labels" and kind == _REGRESSION:
        raise ValueError(f"kd_loss={spec.name!r} compares probabilities of labels; for regression take logit_mse.")


def _counterpart(kind: str) -> str:
    return "logit_mse" if kind == _REGRESSION else "binary_forward_kl"


def _check_classes(spec: LossSpec, term: LogitTerm, classes: int | None) -> None:
    if classes is None:
        return
    if classes < spec.min_classes:
        raise ValueError(
            f"kd_loss={spec.name!r} needs {spec.min_classes} classes or more, and here are {classes}: with fewer it "
            f"is constant, in part at least. Take {'forward_kl' if classes > 1 else 'logit_mse'}."
        )
    if term.transform == "standardize" and classes < _LEAST_TO_STANDARDIZE:
        raise ValueError(
            f"logits: transform: standardize turns any {classes} logits into the same two numbers (+-0.71), so the "
            "teacher's certainty is lost. Take transform: none."
        )


def _check_token_alignment(spec: LossSpec, term: LogitTerm) -> None:
    if term.token_alignment == "none":
        return
    with_offsets = f"token_alignment={term.token_alignment!r}"
    if spec.compares != "classes" or spec.takes_targets:
        what = "sets the label's class apart" if spec.takes_targets else "compares the logits as numbers"
        raise ValueError(
            f"kd_loss={spec.name!r} {what}, and {with_offsets} leaves only the classes that both vocabularies have. "
            "Take forward_kl or another divergence, or uld."
        )
    if spec.any_classes and isinstance(term.temperature, TemperaturePolicy) and term.temperature.is_per_item:
        raise ValueError(
            f"A temperature for each item compares student and teacher class by class, and {spec.name} with "
            f"{with_offsets} has other classes on either side. Take a number or a schedule."
        )
    if any(isinstance(setting, TeacherWeights) for setting in term.item_weights):
        raise ValueError(
            f"item_weights by the teacher read its logits where the student's tokens are, and with {with_offsets} the "
            "teacher has others. Weigh by a column, a group or phrases."
        )


def _check_temperature(spec: LossSpec, term: LogitTerm, task: Task, kind: str | None) -> None:
    policy = term.temperature
    if not spec.takes_temperature:
        unread = {
            "temperature": isinstance(policy, TemperaturePolicy),
            "temperature_squared": not term.temperature_squared,
        }
        names = [name for name, given in unread.items() if given]
        if names:
            raise ValueError(
                f"kd_loss={spec.name!r} has no temperature, so nobody would read {' and '.join(names)}. Drop "
                f"{'it' if len(names) == 1 else 'them'}, or take a loss such as forward_kl."
            )
    if isinstance(policy, LearnedTemperature) and spec.name != "forward_kl":
        raise ValueError(
            f"temperature: {{policy: learned}} has a gradient for forward_kl alone, and the loss is {spec.name}"
            f"{'' if spec.name == term.loss else f', which {term.loss} means for {_words(task, kind)}'}. Take "
            "forward_kl, or an adaptive temperature."
        )
