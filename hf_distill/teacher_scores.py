"""The teacher's own scores beside the student's, and the share of them that the student retains."""

import hashlib
import random
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import EvalLoopOutput

from hf_distill.accounting import mark_repeated_rows
from hf_distill.alignment import ordered_classes
from hf_distill.batches import Batch
from hf_distill.evaluation import EvaluationMixin
from hf_distill.metrics.direction import retention, smaller_is_better
from hf_distill.pairing import ModelPair
from hf_distill.signals import Task
from hf_distill.teachers import SparseTeacher, Teacher

if TYPE_CHECKING:  # the mixins call and override what a trainer class beside them has
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object

_NEEDS_LOGITS = (
    "evaluate_teacher=True scores all of the teacher's logits, and this one gives those of its most likely classes "
    "alone. Drop it, or use a teacher that gives all logits, as a model does."
)
_NO_SCORES = ("loss", "kd", "agreement", "model_preparation_time")


def teacher_metrics(student: Mapping[str, Any], teacher: Mapping[str, float], prefix: str) -> dict[str, float]:
    """`<prefix>_teacher_<metric>` and `<prefix>_retention_<metric>` of every metric that both have.

    Where `retention` gives no share, the metrics have no such key. `Trainer` ends with a KeyError where that is its
    `metric_for_best_model`, so follow the metric itself if its score may be 0 or NaN.

    Args:
        student: what the evaluation found, with prefixes.
        teacher: its scores, without.
        prefix: such as `eval`.
    """
    metrics: dict[str, float] = {}
    for name, score in teacher.items():
        own = student.get(f"{prefix}_{name}")
        if not _is_number(own):
            continue
        metrics[f"{prefix}_teacher_{name}"] = score
        share = retention(own, score, smaller_is_better=smaller_is_better(name))
        if share is not None:
            metrics[f"{prefix}_retention_{name}"] = share
    return metrics


class TeacherScoresMixin(TrainerBase):
    """With `evaluate_teacher`, the teacher is put through `Trainer`'s evaluation like the student.

    It is frozen, so once is enough for the same batches; what they hold tells whether they are the same.
    """

    _pair: ModelPair
    teacher: Teacher | None
    split: Callable[[Mapping[str, Any]], Batch]
    given_labels: Callable[[Mapping[str, Any]], Any]

    _reading: "_Reading | None" = None  # of the student's pass
    _scores_teacher: int = 0  # outputs of the student's head in the teacher's pass, 0 outside it
    _scored: tuple[Any, ...] = ()  # whose scores they are, and by which functions
    _teacher_scores: dict[tuple[int, ...], dict[str, float]]

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """`Trainer`'s, of the teacher while that is scored."""
        if self._scores_teacher:
            inputs = mark_repeated_rows(self._prepare_inputs(inputs), self.accelerator)
            return None, self._teacher_predictions(inputs), self.given_labels(inputs)
        if self._reading is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        self._reading.add(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._reading.outputs = len(logits) if isinstance(logits, tuple) else 1
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop; with `evaluate_teacher` the teacher's scores and their retention are added."""
        args: Any = self.args
        check_teacher_scores(self)
        settings = (prediction_loss_only, ignore_keys, metric_key_prefix)
        if not args.evaluate_teacher:
            return super().evaluation_loop(dataloader, description, *settings)
        states, self._reading = _random_states(), _Reading()
        try:
            output = super().evaluation_loop(dataloader, description, *settings)
            reading = self._reading
        finally:
            self._reading = None
        metrics = {} if output.metrics is None else output.metrics
        if not any(_is_score(name, value, metric_key_prefix) for name, value in metrics.items()):
            return output  # as without labels
        key = tuple(self.accelerator.gather(reading.number(args.device)).tolist())
        known = self._known_scores()
        if key not in known:
            _set_random_states(states)  # a collator that draws its masks draws those of the student's pass again
            known[key] = self._score_teacher(dataloader, reading.outputs, settings)
        return output._replace(metrics=metrics | teacher_metrics(metrics, known[key], metric_key_prefix))

    def _known_scores(self) -> dict[tuple[int, ...], dict[str, float]]:
        """The scores by what was read; none where the teacher or what scores it is another by now."""
        assert self.teacher is not None
        now = (self.teacher, self.teacher.model, self.compute_metrics, self.preprocess_logits_for_metrics)
        before = self._scored and (self._scored[0], self._scored[1](), *self._scored[2:])
        if not before or any(one is not other for one, other in zip(before, now, strict=True)):
            # Not kept alive: of a student with adapters it is the student's own base.
            self._scored = (now[0], weakref.ref(now[1]), *now[2:])
            self._teacher_scores = {}
        return self._teacher_scores

    def _score_teacher(self, dataloader: Any, outputs: int, settings: tuple[Any, ...]) -> dict[str, float]:
        """The teacher's scores by the metrics' names."""
        handler, prefix = self.callback_handler, settings[-1]
        model: Any = self.model
        # A progress bar would take its batches for the student's.
        silent: list[Any] = [DefaultFlowCallback()]  # without it the handler warns
        self.callback_handler = CallbackHandler(
            silent, model, self.processing_class, self.optimizer, self.lr_scheduler
        )
        self._scores_teacher = outputs
        try:
            # Past our own loop, which counts losses and agreement.
            output = super(EvaluationMixin, self).evaluation_loop(  # type: ignore[misc]
                dataloader, "Evaluation of the teacher", *settings
            )
        finally:
            self.callback_handler, self._scores_teacher = handler, 0
        metrics = {} if output.metrics is None else output.metrics
        scores = {name: value for name, value in metrics.items() if _is_score(name, value, prefix)}
        return {name.removeprefix(f"{prefix}_"): float(value) for name, value in scores.items()}

    def _teacher_predictions(self, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, ...]:
        """The teacher's logits with the student's order of labels, in the form of the student's outputs."""
        assert self.teacher is not None
        with torch.no_grad():
            output = self.teacher(self.split(inputs).teacher)
        if output.sparse is not None:  # of a teacher that did not say so before
            raise ValueError(_NEEDS_LOGITS)
        # A wider vocabulary stays whole: the scores are the teacher's own.
        logits = [
            ordered_classes(each.to(self.args.device), order=self._pair.order, classes=None) for each in output.logits
        ]
        # What a head gives beside its logits, such as hidden states, no metric compares.
        others = [logits[0].new_empty(len(logits[0]), 0)] * (self._scores_teacher - len(logits))
        return logits[0] if len(logits) == 1 and not others else (*logits, *others)


class _Reading:
    """What the batches of an evaluation held, and how many outputs came of each."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)
        self.outputs = 1

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Takes down a batch."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
                self._digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                self._digest.update(f"{name} {value!r}".encode())

    def number(self, device: torch.device) -> Tensor:
        """(1,) int64 that stands for all of it."""
        return torch.tensor([int.from_bytes(self._digest.digest(), "big", signed=True)], device=device)


def check_teacher_scores(trainer: Any) -> None:
    """Refuses `evaluate_teacher` where nothing would come of it.

    Raises:
        ValueError: there is no teacher, or no `compute_metrics`; the metrics read text that is generated, or losses;
            the teacher reads other tokens than those that the labels are of, or has no head.
    """
    args = trainer.args
    if not args.evaluate_teacher:
        return
    if trainer.teacher is None:
        raise ValueError("evaluate_teacher=True, but there is no teacher. Pass teacher_model=, or drop it.")
    if trainer.compute_metrics is None:
        raise ValueError(
            "evaluate_teacher=True, but without compute_metrics there is no score to compare. Pass compute_metrics="
            'compute_metrics_for("single_label_classification") or another, or drop evaluate_teacher.'
        )
    if getattr(args, "predict_with_generate", False):
        raise ValueError(
            "evaluate_teacher=True scores the teacher's logits, but predict_with_generate=True scores generated text. "
            "Drop one of them."
        )
    if isinstance(trainer.teacher, SparseTeacher):
        raise ValueError(_NEEDS_LOGITS)
    pair: ModelPair = trainer._pair
    if pair.task is Task.EMBEDDING:
        raise ValueError("evaluate_teacher=True, but a student without a head has no scores of predictions. Drop it.")
    if pair.vocabulary is not None and (pair.vocabulary.by_text or pair.vocabulary.student_only):
        raise ValueError(
            "evaluate_teacher=True, but the labels are the student's tokens, and the teacher does not have all of "
            "them. Drop it, or use a teacher with the student's tokenizer."
        )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_score(name: str, value: Any, prefix: str) -> bool:
    """Whether a metric is of `compute_metrics`, as far as its name tells, and a number."""
    return _is_number(value) and name.removeprefix(f"{prefix}_") not in _NO_SCORES


def _random_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
