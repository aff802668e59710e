"""What one model is worth, summed up batch by batch: no language model's logits outlive their batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from hf_distill.batches import Batch
from hf_distill.config import LogitTerm
from hf_distill.metrics.tasks import TASKS, compute_metrics_for, preprocess_logits_for
from hf_distill.objective import LogitObjective, agreement_sum
from hf_distill.pairing import LogitPairs, ModelPair
from hf_distill.report.calibration import Calibration
from hf_distill.report.results import Quality
from hf_distill.signals import Task
from hf_distill.targets import class_targets, has_class_targets

MAX_CLASSES = 50  # of a table that a reader can take in
_MULTI_LABEL, _REGRESSION = "multi_label_classification", "regression"
# The score that retention refers to, unless another is named.
DEFAULT_METRIC = {
    "single_label_classification": "accuracy",
    _MULTI_LABEL: "f1_micro",
    _REGRESSION: "mse",
    "token_classification": "accuracy",
    "question_answering": "f1",
    "multiple_choice": "accuracy",
    "masked_lm": "perplexity",
    "causal_lm": "perplexity",
    "seq2seq_lm": "perplexity",
}


class Scorer:
    """The task's scores of a set of rows.

    Args:
        task: what the heads predict.
        problem_type: Transformers' name of the kind of sequence classification.
        class_names: of heads with named labels; else None.
        compute_metrics: as of `Trainer`, given the labelled rows alone; None takes `compute_metrics_for` the task,
            with entity scores where all labels are IOB2 tags.
        preprocess: as `Trainer`'s `preprocess_logits_for_metrics`. A language model's `compute_metrics` gets what it
            returns; without it the likeliest tokens and their labels' negative log-likelihoods.
    """

    def __init__(
        self,
        task: Task,
        problem_type: str,
        *,
        class_names: Sequence[str] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        preprocess: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.task, self.problem_type, self.class_names = task, problem_type, class_names
        self.sums_tokens = task.is_language_model and task is not Task.CTC
        name = problem_type if task is Task.SEQUENCE_CLASSIFICATION else str(task)
        is_tagger = task is Task.TOKEN_CLASSIFICATION and _are_tags(class_names)
        self._usual = (*(("entity_f1",) if is_tagger else ()), DEFAULT_METRIC.get(name))
        if compute_metrics is None and not self.sums_tokens and name in TASKS:
            options: dict[str, Any] = {"label_names": class_names} if is_tagger else {}
            compute_metrics = compute_metrics_for(name, **options)
        if compute_metrics is not None and preprocess is None and self.sums_tokens:
            preprocess = preprocess_logits_for(name)
        self.compute_metrics, self.preprocess = compute_metrics, preprocess

    def metric(self, wanted: str | None, scores: Mapping[str, float]) -> str | None:
        """The name of the score that retention refers to: the one wanted, the task's usual one, or the first.

        Raises:
            ValueError: the one wanted is not among the scores.
        """
        if wanted is None:
            return next((name for name in (*self._usual, *scores) if name in scores), None)
        if wanted not in scores:
            known = ", ".join(scores) or "none, as no row has a label"
            raise ValueError(f"metric={wanted!r} is none of the scores; there is {known}.")
        return wanted


class QualitySums:
    """One model beside the teacher, over batches.

    Args:
        scorer: the task's scores.
        pair: how the model's logits line up with the teacher's.
    """

    def __init__(self, scorer: Scorer, pair: ModelPair) -> None:
        self._scorer, self._pair = scorer, pair
        self._objective = LogitObjective(LogitTerm(temperature=1.0), scorer.task, scorer.problem_type)
        self._items, self._labelled, self._kl, self._agreement = 0, 0, 0.0, 0.0
        self._compares = scorer.problem_type != _REGRESSION
        self._of_labels, self._of_teacher = Calibration(), Calibration()
        names = scorer.class_names
        classes = len(names) if names is not None and len(names) <= MAX_CLASSES and self._compares else 0
        self._classes = classes
        self._by_label = np.zeros((classes, classes), dtype=np.int64)
        self._by_teacher = np.zeros_like(self._by_label)
        self._hits = np.zeros((3, classes), dtype=np.int64)  # of many labels: right, chosen, wanted
        self._nll, self._right, self._tokens = 0.0, 0, 0
        self._kept: list[Any] = []

    def add(self, logits: tuple[Tensor, ...], pairs: LogitPairs, batch: Batch, *, labelled: bool = True) -> None:
        """Adds a batch.

        Args:
            logits: of the model, (rows, classes) or (rows, length, classes), in the student's order of classes; for
                question answering start and end scores.
            pairs: the same beside the teacher's, aligned.
            batch: the batch.
            labelled: whether its labels are of the model's tokens.
        """
        self._items += int(batch.items.kd.sum())
        if self._compares:
            self._compare(pairs, batch)
        if labelled and batch.labels:
            self._labelled += int(batch.items.labelled.sum())
            self._score(logits, batch)

    def _compare(self, pairs: LogitPairs, batch: Batch) -> None:
        signals = self._objective.signals(pairs, batch)
        kept, task, kind = batch.items.kd, self._scorer.task, self._scorer.problem_type
        self._kl += float(self._objective.total(signals, batch))
        choices = self._pair.choices(pairs)
        agreement = agreement_sum(choices, batch, task=task, problem_type=kind)
        self._agreement += 0.0 if agreement is None else float(agreement)
        classes = choices[0][0].shape[-1]
        for own, teacher in signals.pairs:
            for own_items, teacher_items in _blocks(kept, own, teacher):
                if kind == _MULTI_LABEL:
                    self._of_teacher.add(*_binary(own_items, teacher_items > 0))
                    continue
                chosen, confidence, _ = _choices(own_items, classes)
                wanted = teacher_items[..., :classes].argmax(-1)
                self._of_teacher.add(confidence, chosen == wanted)
                if self._classes:
                    self._by_teacher += _table(wanted, chosen, self._classes)

    def _score(self, logits: tuple[Tensor, ...], batch: Batch) -> None:
        task, kind = self._scorer.task, self._scorer.problem_type
        # Of question answering without what no answer may begin at, as in the loss: where a row ends is no answer.
        real = tuple(own for own, _ in self._objective.signals([(each, each) for each in logits], batch).pairs)
        self._keep(real, batch)
        if kind == _MULTI_LABEL:
            kept = batch.items.labelled
            own, wanted = logits[0][kept], batch.labels["labels"][kept] > 0.5
            self._of_labels.add(*_binary(own, wanted))
            if self._classes:
                chosen = own > 0
                self._hits += torch.stack([(chosen & wanted).sum(0), chosen.sum(0), wanted.sum(0)]).cpu().numpy()
        if not has_class_targets(task, kind):
            return
        targets = class_targets(batch, task, classes=logits[0].shape[-1])
        for side, labels, mask in zip(real, targets, batch.items.task, strict=True):
            for own, wanted in _blocks(mask & (labels >= 0), side, labels):
                chosen, confidence, log_probs = _choices(own, own.shape[-1])
                right = chosen == wanted
                self._of_labels.add(confidence, right)
                self._right, self._tokens = self._right + int(right.sum()), self._tokens + len(right)
                if self._scorer.sums_tokens:
                    self._nll -= float(log_probs.gather(-1, wanted.unsqueeze(-1)).sum(dtype=torch.float32))
                if self._classes:
                    self._by_label += _table(wanted, chosen, self._classes)

    def _keep(self, logits: tuple[Tensor, ...], batch: Batch) -> None:
        """Keeps the labelled rows for `compute_metrics`."""
        if self._scorer.compute_metrics is None:
            return
        labels: Any = batch.labels.get("labels", next(iter(batch.labels.values())))
        kept = batch.items.labelled
        if self._scorer.task is Task.QUESTION_ANSWERING:
            # What is no target here would be one among the longer rows of another batch.
            names = ("start_positions", "end_positions")
            labels = tuple(
                torch.where(mask, batch.labels[name].flatten(), -100)
                for name, mask in zip(names, batch.items.task, strict=True)
            )
            logits = tuple(each.masked_fill(each == -math.inf, -100.0) for each in logits)
            kept = batch.items.task[0] & batch.items.task[1]
        outputs: Any = logits[0] if len(logits) == 1 else logits
        if self._scorer.preprocess is not None:
            outputs = self._scorer.preprocess(outputs, labels)
        if bool(kept.any()):
            self._kept.append((_rows(outputs, kept), _rows(labels, kept)))

    def quality(self) -> Quality:
        """What the sums say. A score that is no finite number is left out."""
        compared = self._items > 0 and self._compares
        classes_of_items = self._classes and self._scorer.problem_type != _MULTI_LABEL
        has_labels = self._of_labels.error is not None
        return Quality(
            metrics=self._metrics(),
            agreement=self._agreement / self._items if compared else None,
            kl_to_teacher=_finite(self._kl / self._items) if compared else None,
            calibration_error=_finite(self._of_labels.error),
            calibration_error_to_teacher=_finite(self._of_teacher.error),
            f1_by_class=self._f1_by_class() if self._classes and has_labels else None,
            confusion_with_teacher=self._by_teacher.tolist() if compared and classes_of_items else None,
            items=self._items,
            labelled=self._labelled if self._scorer.task.one_item_per_row else None,
        )

    def _metrics(self) -> dict[str, float]:
        scores: dict[str, Any] = {}
        if self._scorer.sums_tokens and self._tokens:
            mean = self._nll / self._tokens
            scores = {"accuracy": self._right / self._tokens, "perplexity": math.exp(mean) if mean < 700 else math.inf}
        if self._kept and self._scorer.compute_metrics is not None:
            predictions, labels = nested_numpify(_joined(self._kept))
            found = self._scorer.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
            scores |= {name.removeprefix("eval_"): value for name, value in found.items()}
        numbers = {name: _number(value) for name, value in scores.items()}
        return {name: value for name, value in numbers.items() if value is not None}

    def _f1_by_class(self) -> dict[str, float]:
        right, chosen, wanted = self._hits
        if self._scorer.problem_type != _MULTI_LABEL:
            right, chosen, wanted = np.diagonal(self._by_label), self._by_label.sum(0), self._by_label.sum(1)
        values = 2 * right / np.maximum(chosen + wanted, 1)
        return dict(zip(self._scorer.class_names or (), values.tolist(), strict=True))


def _are_tags(names: Sequence[str] | None) -> bool:
    return names is not None and "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def _blocks(mask: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The items that the mask keeps, row by row where a row has many: in float32 a whole batch might not fit."""
    if mask.dim() == 1:
        yield tuple(tensor[mask] for tensor in tensors)
        return
    for row in range(len(mask)):
        yield tuple(tensor[row][mask[row]] for tensor in tensors)


def _choices(logits: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is chosen among the first classes of (items, any), its probability among all, and all logarithms."""
    log_probs = logits.float().log_softmax(-1)
    # By the logits: what differs by their last bit may have equal probabilities.
    chosen = logits[..., :classes].argmax(-1)
    return chosen, log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).exp(), log_probs


def _binary(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(items,) confidence in each yes or no of (rows, labels), and whether it is right."""
    return logits.float().abs().sigmoid().flatten(), ((logits > 0) == wanted).flatten()


def _table(rows: Tensor, columns: Tensor, classes: int) -> NDArray[np.int64]:
    counts = torch.bincount(rows * classes + columns, minlength=classes * classes)
    return counts.view(classes, classes).cpu().numpy()


def _rows(values: Any, kept: Tensor) -> Any:
    """The rows that are kept of a tensor or of each of several, on the CPU; numpy has no bfloat16."""
    if not isinstance(values, Tensor):
        return tuple(_rows(value, kept) for value in values)
    values = values.detach()[kept.to(values.device)].cpu()
    return values.float() if values.is_floating_point() and values.dtype != torch.float64 else values


def _joined(parts: list[Any]) -> Any:
    """One batch of all, padded as `Trainer` pads; two by two, so that no row is copied once for every batch."""
    while len(parts) > 1:
        left, right = parts[::2], parts[1::2]
        joined = [nested_concat(one, other, padding_index=-100) for one, other in zip(left, right, strict=False)]
        parts = joined + left[len(right) :]
    return parts[0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: Any) -> float | None:
    """A user's score as a finite number; None of whatever else they return, such as texts, tables and None."""
    is_number = isinstance(value, Real) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
    return _finite(float(value)) if is_number else None
