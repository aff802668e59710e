"""Scores: arrays in, one number (or one for each average) out. Rows without a label must be dropped before."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from scipy.stats import spearmanr
from sklearn.metrics import precision_recall_fscore_support

IGNORED_LABEL = -100
AVERAGES = ("macro", "micro", "weighted")


def is_labelled(labels: ArrayLike) -> NDArray[np.bool_]:
    """True where a label is neither -100 nor NaN; the shape of the labels."""
    labels = np.asarray(labels)
    labelled: NDArray[np.bool_] = (labels != IGNORED_LABEL) & ~np.isnan(labels)
    return labelled


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction of items whose class is right; if the references are a teacher's classes, the agreement with it.

    Args:
        predictions: (items,) class indices.
        references: (items,) class indices.
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def averaged_precision_recall_f1(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Precision, recall and F1, each as `_macro`, `_micro` and `_weighted`; where nothing is to be divided by, 0.

    Averages run over the classes that occur in predictions or references, as in scikit-learn.

    Args:
        predictions: (items,) class indices, or (items, classes) of 0 and 1.
        references: as the predictions.
    """
    scores: dict[str, float] = {}
    for average in AVERAGES:
        values = precision_recall_fscore_support(references, predictions, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            scores[f"{name}_{average}"] = float(value)
    return scores


def kl_to_teacher(student_logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: float = 1.0) -> float:
    """Mean of KL(teacher || student) over the items, in nats; no T² factor, for this is a distance and not a loss.

    Args:
        student_logits: (items, classes).
        teacher_logits: (items, classes).
        temperature: > 0; both distributions are softmax(logits / temperature).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, but is {temperature}.")
    student = log_softmax(np.asarray(student_logits, dtype=np.float64) / temperature, axis=-1)
    teacher = log_softmax(np.asarray(teacher_logits, dtype=np.float64) / temperature, axis=-1)
    return float((np.exp(teacher) * (teacher - student)).sum(axis=-1).mean())


def perplexity(nll: ArrayLike, tokens: ArrayLike) -> float:
    """exp(summed negative log-likelihood / token count), in whatever parts the two were summed.

    Args:
        nll: (parts,) summed negative log-likelihoods in nats.
        tokens: (parts,) how many tokens each part holds.
    """
    count = float(np.sum(tokens))
    if count == 0:
        raise ValueError("Perplexity needs at least one token, but the token counts sum to 0.")
    return math.exp(float(np.sum(np.asarray(nll, dtype=np.float64))) / count)


def expected_calibration_error(logits: ArrayLike, references: ArrayLike, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, over equally wide bins of confidence weighted by their items.

    Args:
        logits: (items, classes).
        references: (items,) class indices.
        bins: how many bins [0, 1] is cut into.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    probabilities = np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=-1))
    confidence = probabilities.max(axis=-1)
    correct = probabilities.argmax(axis=-1) == np.asarray(references)
    # Bins are open below and closed above, as in the paper: confidence 1 falls into the last.
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def pearson(predictions: NDArray[np.floating], references: NDArray[np.floating]) -> float:
    """Linear correlation of two (items,) arrays, in [-1, 1]; NaN if one of them is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(predictions, references)[0, 1])


def spearman(predictions: NDArray[np.floating], references: NDArray[np.floating]) -> float:
    """Rank correlation of two (items,) arrays, in [-1, 1]; NaN (with scipy's warning) if one of them is constant."""
    return float(spearmanr(predictions, references).statistic)
