"""The scores as `evaluate.Metric` classes, and `load_metric`, which finds them by name without network."""

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from hf_distill.metrics import scores

_CLASS = datasets.Value("int64")
_LOGITS = datasets.Sequence(datasets.Value("float32"))


class _OfflineMetric(evaluate.Metric):
    """A metric whose code is here. Subclasses say what their inputs are; `_compute` says what they return."""

    inputs: dict[str, Any]
    meaning: str
    citation_text: str = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.meaning,
            citation=self.citation_text,
            inputs_description=", ".join(f"{name}: {feature}" for name, feature in self.inputs.items()),
            features=datasets.Features(self.inputs),
        )


class _Classification(_OfflineMetric):
    """Class indices against class indices; rows whose reference is -100 do not count.

    The configuration `multilabel` takes rows of 0 and 1 instead, as in the metrics of the Hub.
    """

    @property
    def inputs(self) -> dict[str, Any]:  # type: ignore[override]  # depends on the configuration
        feature = datasets.Sequence(_CLASS) if self.config_name == "multilabel" else _CLASS
        return {"predictions": feature, "references": feature}


class Accuracy(_Classification):
    """`evaluate.load("accuracy")`, offline."""

    meaning = "Fraction of rows whose class is right."

    def _compute(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        normalize: bool = True,
        sample_weight: ArrayLike | None = None,
    ) -> dict[str, float]:
        predictions, references, weights = _labelled(predictions, references, sample_weight)
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=weights)
        return {"accuracy": float(score)}


class _PerClass(_Classification):
    """Precision, recall or F1, with the arguments of the metric of that name on the Hub."""

    score: str

    def _compute(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        labels: list[int] | None = None,
        pos_label: int = 1,
        average: str | None = "binary",
        sample_weight: ArrayLike | None = None,
        zero_division: str | float = "warn",
    ) -> dict[str, Any]:
        predictions, references, weights = _labelled(predictions, references, sample_weight)
        values = precision_recall_fscore_support(
            references,
            predictions,
            labels=labels,
            pos_label=pos_label,
            average=average,
            sample_weight=weights,
            zero_division=zero_division,
        )
        score = values[("precision", "recall", "f1").index(self.score)]
        return {self.score: score if average is None else float(score)}


class Precision(_PerClass):
    """`evaluate.load("precision")`, offline."""

    meaning = "True positives / (true positives + false positives)."
    score = "precision"


class Recall(_PerClass):
    """`evaluate.load("recall")`, offline."""

    meaning = "True positives / (true positives + false negatives)."
    score = "recall"


class F1(_PerClass):
    """`evaluate.load("f1")`, offline."""

    meaning = "Harmonic mean of precision and recall."
    score = "f1"


class Agreement(_OfflineMetric):
    """How often the student's class (predictions) is the teacher's (references)."""

    meaning = "Fraction of rows on which student (predictions) and teacher (references) choose the same class."
    inputs: dict[str, Any] = {"predictions": _CLASS, "references": _CLASS}  # noqa: RUF012

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        predictions, references, _ = _labelled(predictions, references, None)
        return {"agreement": scores.accuracy(predictions, references)}


class KLToTeacher(_OfflineMetric):
    """KL(teacher || student) from the student's logits (predictions) and the teacher's (references)."""

    meaning = (
        "Mean KL(teacher || student) in nats, from the student's (predictions) and the teacher's logits (references)."
    )
    inputs: dict[str, Any] = {"predictions": _LOGITS, "references": _LOGITS}  # noqa: RUF012

    def _compute(self, predictions: ArrayLike, references: ArrayLike, temperature: float = 1.0) -> dict[str, float]:
        return {"kl_to_teacher": scores.kl_to_teacher(predictions, references, temperature=temperature)}


class Perplexity(_OfflineMetric):
    """Perplexity from what an evaluation loop has: summed negative log-likelihoods and token counts."""

    meaning = (
        "exp(sum of `nll` / sum of `tokens`): summed negative log-likelihoods in nats and the tokens they are over."
    )
    inputs: dict[str, Any] = {"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}  # noqa: RUF012

    def _compute(self, nll: ArrayLike, tokens: ArrayLike) -> dict[str, float]:
        return {"perplexity": scores.perplexity(nll, tokens)}


class ExpectedCalibrationError(_OfflineMetric):
    """How far confidence and accuracy lie apart, from logits (predictions) and classes (references)."""

    meaning = "Mean gap between confidence and accuracy over bins of confidence."
    citation_text = "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599"
    inputs: dict[str, Any] = {"predictions": _LOGITS, "references": _CLASS}  # noqa: RUF012

    def _compute(self, predictions: ArrayLike, references: ArrayLike, bins: int = 15) -> dict[str, float]:
        predictions, references, _ = _labelled(predictions, references, None)
        return {"expected_calibration_error": scores.expected_calibration_error(predictions, references, bins=bins)}


METRICS: dict[str, type[_OfflineMetric]] = {
    "accuracy": Accuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "agreement": Agreement,
    "kl_to_teacher": KLToTeacher,
    "perplexity": Perplexity,
    "expected_calibration_error": ExpectedCalibrationError,
}


def load_metric(name: str, config_name: str | None = None, **kwargs: Any) -> evaluate.EvaluationModule:
    """Returns the metric of this name: the one built in here, else what `evaluate.load` finds.

    Args:
        name: a key of `METRICS`, or any name or path that `evaluate.load` knows. `perplexity` here takes sums and
            counts; `evaluate.load("perplexity")` is another, which runs a language model.
        config_name: a configuration of the metric; `multilabel` for accuracy, precision, recall and f1.
        kwargs: to the metric's constructor or to `evaluate.load`, as `keep_in_memory` and `experiment_id`.
    """
    if name not in METRICS:
        return evaluate.load(name, config_name, **kwargs)
    metric = METRICS[name]
    if config_name is not None and not (config_name == "multilabel" and issubclass(metric, _Classification)):
        raise ValueError(f"Metric '{name}' has no configuration '{config_name}'.")
    return metric(config_name=config_name, **kwargs)


def _labelled(
    predictions: ArrayLike, references: ArrayLike, sample_weight: ArrayLike | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Drops the rows whose reference is -100 or NaN (for rows of numbers: any of them)."""
    references = np.asarray(references)
    kept = scores.is_labelled(references).reshape(len(references), -1).all(axis=-1)
    weights = None if sample_weight is None else np.asarray(sample_weight)[kept]
    return np.asarray(predictions)[kept], references[kept], weights
