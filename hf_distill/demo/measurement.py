"""What a trained classifier is worth and what it costs: scores, parameters, bytes on disk, milliseconds."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.metrics import compute_metrics_for
from hf_distill.metrics.scores import accuracy

PREDICTION_BATCH = 128
TIMED_ROWS = 200
WARM_UP_ROWS = 20


@dataclass(frozen=True)
class Scores:
    """One model on the test rows; all in [0, 1]. `agreement` is how often it answers as the teacher does."""

    accuracy: float
    f1_macro: float
    agreement: float


@dataclass(frozen=True)
class Cost:
    """One model's parameters, bytes of its weights on disk, and median time of one row on the CPU."""

    parameters: int
    size_bytes: int
    latency_ms: float


def predict_logits(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.float32]:
    """Returns (rows, classes) float32 logits, computed on the CPU without dropout."""
    collate = DataCollatorWithPadding(tokenizer)
    inputs = rows.remove_columns("label")
    model.cpu().eval()
    with torch.inference_mode():
        logits = [
            model(**collate([inputs[i] for i in range(start, min(start + PREDICTION_BATCH, len(inputs)))])).logits
            for start in range(0, len(inputs), PREDICTION_BATCH)
        ]
    return torch.cat(logits).float().numpy()


def score(logits: NDArray[np.float32], teacher_logits: NDArray[np.float32], labels: list[int]) -> Scores:
    """Returns how right a model is and how much it answers as the teacher.

    Args:
        logits: (rows, classes) of the model.
        teacher_logits: (rows, classes).
        labels: one class index a row.
    """
    scores = compute_metrics_for("single_label_classification")(
        EvalPrediction(predictions=logits, label_ids=np.asarray(labels))
    )
    return Scores(
        accuracy=scores["accuracy"],
        f1_macro=scores["f1_macro"],
        agreement=accuracy(logits.argmax(axis=-1), teacher_logits.argmax(axis=-1)),
    )


def measure_cost(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: Path) -> Cost:
    """Saves the model and its tokenizer as `from_pretrained` loads them, times it row by row, and returns its cost."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        latency_ms=_median_latency_ms(model, rows),
    )


def _median_latency_ms(model: PreTrainedModel, rows: Dataset) -> float:
    model.cpu().eval()
    inputs = [
        {name: torch.tensor([value]) for name, value in row.items() if name != "label"}
        for row in rows.select(range(min(TIMED_ROWS, len(rows))))
    ]
    times = []
    with torch.inference_mode():
        for row in inputs[:WARM_UP_ROWS] + inputs:
            start = time.perf_counter()
            model(**row)
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[-len(inputs) :]))
