"""One `compute_metrics` for each task, ready for a Trainer. Items without a label (-100 or NaN) never count."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from hf_distill.metrics.scores import (
    accuracy,
    averaged_precision_recall_f1,
    is_labelled,
    pearson,
    perplexity,
    spearman,
)
from hf_distill.metrics.spans import best_span, entity_precision_recall_f1, span_f1
from hf_distill.metrics.tokens import next_token_predictions, token_predictions
from hf_distill.registry import Registry

if TYPE_CHECKING:
    from transformers import EvalPrediction

Scores = dict[str, float]
ComputeMetrics = Callable[["EvalPrediction"], Scores]
PreprocessLogits = Callable[[Tensor | tuple[Tensor, ...], Tensor], tuple[Tensor, Tensor]]


def compute_metrics_for(task: str, **options: Any) -> ComputeMetrics:
    """Returns the function that a Trainer takes as `compute_metrics`.

    | task | scores | options |
    |---|---|---|
    | single_label_classification | accuracy; precision, recall, f1: macro, micro, weighted | |
    | multi_label_classification | accuracy of whole rows; precision, recall, f1 as above | threshold=0.5 |
    | regression | mse, pearson, spearman; mean over targets | |
    | token_classification | accuracy; f1 macro, micro, weighted; with names entity scores | label_names=None |
    | question_answering | exact_match and f1 of the answer's token positions | max_answer_tokens=30 |
    | multiple_choice | accuracy | |
    | masked_lm, causal_lm, seq2seq_lm | token accuracy and perplexity, under teacher forcing | |

    Language models need `preprocess_logits_for(task)` too, or the Trainer keeps every logit of the evaluation set.
    """
    compute = TASKS.get(task)
    known = [name for name, p in signature(compute).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"The metrics of {task} take no {', '.join(unknown)}; they take {', '.join(known) or 'no option'}."
        )
    return partial(compute, **options)


def preprocess_logits_for(task: str) -> PreprocessLogits | None:
    """Returns a Trainer's `preprocess_logits_for_metrics`: two numbers a token for language models, else None."""
    TASKS.get(task)  # refuses an unknown name
    return _PREPROCESS.get(task)


def _some(items: NDArray[Any]) -> NDArray[Any]:
    if len(items) == 0:
        raise ValueError("No item of the evaluation set has a label. Give one that has labels, or no compute_metrics.")
    return items


def _array(output: Any) -> NDArray[Any]:
    """Returns the array, or the first of a tuple of outputs."""
    return np.asarray(output[0] if isinstance(output, tuple | list) else output)


def _shaped(output: Any, *, ndim: int, shape: str) -> NDArray[Any]:
    """As `_array`, after a look at the dimensions."""
    array = _array(output)
    if array.ndim != ndim:
        raise ValueError(f"Expected an array of shape {shape}, but got {array.shape}. Is this the right task?")
    return array


def _labelled(predictions: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keeps the rows whose labels are all there."""
    kept = is_labelled(labels).reshape(len(labels), -1).all(axis=-1)
    return _some(predictions[kept]), labels[kept]


def _labelled_tokens(predictions: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keeps the tokens that have a label, over all rows: (rows, tokens) becomes (items,)."""
    return _labelled(predictions.reshape(-1), labels.reshape(-1))


def _single_label_classification(evaluation: "EvalPrediction") -> Scores:
    logits = _shaped(evaluation.predictions, ndim=2, shape="(rows, classes)")
    classes, labels = _labelled(logits.argmax(axis=-1), _shaped(evaluation.label_ids, ndim=1, shape="(rows,)"))
    return {"accuracy": accuracy(classes, labels), **averaged_precision_recall_f1(classes, labels)}


def _multi_label_classification(evaluation: "EvalPrediction", *, threshold: float = 0.5) -> Scores:
    logits = _shaped(evaluation.predictions, ndim=2, shape="(rows, classes)")
    chosen, labels = _labelled(
        expit(logits) > threshold, _shaped(evaluation.label_ids, ndim=2, shape="(rows, classes)")
    )
    chosen, labels = chosen.astype(int), labels.astype(int)
    return {"accuracy": float((chosen == labels).all(axis=-1).mean()), **averaged_precision_recall_f1(chosen, labels)}


def _regression(evaluation: "EvalPrediction") -> Scores:
    values, labels = (_array(part).astype(np.float64) for part in (evaluation.predictions, evaluation.label_ids))
    if values.size != labels.size:
        raise ValueError(f"Predictions {values.shape} and labels {labels.shape} must hold the same number of targets.")
    values, labels = _labelled(values.reshape(len(labels), -1), labels.reshape(len(labels), -1))
    targets = range(labels.shape[1])
    return {
        "mse": float(np.mean((values - labels) ** 2)),
        "pearson": float(np.mean([pearson(values[:, i], labels[:, i]) for i in targets])),
        "spearman": float(np.mean([spearman(values[:, i], labels[:, i]) for i in targets])),
    }


def _token_classification(evaluation: "EvalPrediction", *, label_names: Sequence[str] | None = None) -> Scores:
    logits = _shaped(evaluation.predictions, ndim=3, shape="(rows, tokens, classes)")
    labels = _shaped(evaluation.label_ids, ndim=2, shape="(rows, tokens)")
    classes = logits.argmax(axis=-1)
    flat_classes, flat_labels = _labelled_tokens(classes, labels)
    averaged = averaged_precision_recall_f1(flat_classes, flat_labels)
    scores = {"accuracy": accuracy(flat_classes, flat_labels)}
    scores |= {name: value for name, value in averaged.items() if name.startswith("f1_")}
    if label_names is None:
        return scores
    kept = is_labelled(labels)
    tags = [
        [[label_names[index] for index in row[keep]] for row, keep in zip(rows, kept, strict=True)]
        for rows in (classes, labels)
    ]
    return scores | entity_precision_recall_f1(tags[0], tags[1])


def _question_answering(evaluation: "EvalPrediction", *, max_answer_tokens: int = 30) -> Scores:
    if not isinstance(evaluation.predictions, tuple) or not isinstance(evaluation.label_ids, tuple):
        raise ValueError("Expected start and end logits and start and end positions. Set label_names to both columns.")
    start_logits, end_logits = (np.asarray(logits, dtype=np.float64) for logits in evaluation.predictions[:2])
    starts, ends = (np.asarray(positions) for positions in evaluation.label_ids[:2])
    # As in the heads of Transformers, a position beyond the sequence says that its answer was cut off.
    length = start_logits.shape[1]
    rows = _some(np.flatnonzero(is_labelled(starts) & is_labelled(ends) & (starts < length) & (ends < length)))
    spans = [best_span(start_logits[row], end_logits[row], max_tokens=max_answer_tokens) for row in rows]
    wanted = [(int(starts[row]), int(ends[row])) for row in rows]
    return {
        "exact_match": float(np.mean([span == answer for span, answer in zip(spans, wanted, strict=True)])),
        "f1": float(np.mean([span_f1(span, answer) for span, answer in zip(spans, wanted, strict=True)])),
    }


def _multiple_choice(evaluation: "EvalPrediction") -> Scores:
    logits = _shaped(evaluation.predictions, ndim=2, shape="(rows, choices)")
    chosen, labels = _labelled(logits.argmax(axis=-1), _shaped(evaluation.label_ids, ndim=1, shape="(rows,)"))
    return {"accuracy": accuracy(chosen, labels)}


def _language_model(evaluation: "EvalPrediction", *, preprocess: PreprocessLogits) -> Scores:
    labels = _shaped(evaluation.label_ids, ndim=2, shape="(rows, tokens)")
    predictions: Any = evaluation.predictions
    if _array(predictions).ndim == 3:  # the Trainer was not given the preprocessing
        predictions = preprocess(torch.from_numpy(_array(predictions)), torch.from_numpy(labels))
    if not isinstance(predictions, tuple | list):
        raise ValueError(
            "Accuracy and perplexity need logits, but the predictions are token ids. "
            "Evaluate with predict_with_generate=False."
        )
    tokens, nll = (np.asarray(part) for part in predictions)
    if preprocess is next_token_predictions:
        tokens, nll, labels = tokens[:, 1:], nll[:, 1:], labels[:, 1:]
    nll = nll[is_labelled(labels)]
    tokens, labels = _labelled_tokens(tokens, labels)
    return {"accuracy": accuracy(tokens, labels), "perplexity": perplexity(nll, len(labels))}


def _aligned_lm(evaluation: "EvalPrediction") -> Scores:
    return _language_model(evaluation, preprocess=token_predictions)


def _causal_lm(evaluation: "EvalPrediction") -> Scores:
    return _language_model(evaluation, preprocess=next_token_predictions)


TASKS: Registry[Callable[..., Scores]] = Registry("task")
TASKS.register("single_label_classification", _single_label_classification)
TASKS.register("multi_label_classification", _multi_label_classification)
TASKS.register("regression", _regression)
TASKS.register("token_classification", _token_classification)
TASKS.register("question_answering", _question_answering)
TASKS.register("multiple_choice", _multiple_choice)
TASKS.register("masked_lm", _aligned_lm)
TASKS.register("causal_lm", _causal_lm)
TASKS.register("seq2seq_lm", _aligned_lm)
_PREPROCESS: dict[str, PreprocessLogits] = {
    "masked_lm": token_predictions,
    "causal_lm": next_token_predictions,
    "seq2seq_lm": token_predictions,
}
