"""Records and reports made by hand, and what tests read off a card."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_distill.config import DistillationConfig
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, Cost, ModelResult, Quality, Report, Timing
from hf_distill.run_record import RunRecord

TERMS: dict[str, Any] = {"task": {"weight": 0.1}, "logits": {"weight": 0.9, "temperature": 4}}
STUDENT_MODEL: dict[str, Any] = {
    "name": "org/small",
    "on_hub": True,
    "revision": "0123456789abcdef0123",
    "class": "BertForSequenceClassification",
    "auto_class": "AutoModelForSequenceClassification",
    "model_type": "bert",
    "input": "input_ids",
    "labels": 3,
    "parameters": 11_000_000,
    "weights": "aaaa0000bbbb1111",
}
TEACHER_MODEL = {**STUDENT_MODEL, "name": "org/large", "parameters": 110_000_000, "weights": "cccc2222dddd3333"}
ROWS = {"name": "org/texts", "on_hub": True, "revision": None, "config": None}


def record(terms: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    """A record of a text classifier; `terms` as in a config."""
    config = DistillationConfig.from_dict(terms or TERMS)
    base = RunRecord(
        task="sequence_classification",
        student=STUDENT_MODEL,
        teacher={**TEACHER_MODEL, "kind": "LocalTeacher"},
        terms=config.to_dict(),
        name="small-distilled",
        logit_loss=config.logits.loss if config.logits.weight > 0 else None,
        arguments={"learning_rate": 5e-5, "max_steps": -1, "num_train_epochs": 3.0, "seed": 1},
        processing="BertTokenizer",
        data={
            "train": {**ROWS, "rows": 800, "fingerprint": "f00d", "split": "train"},
            "eval": {**ROWS, "rows": 90, "fingerprint": "beef", "split": "test"},
        },
        log_history=[
            {"step": 5, "epoch": 0.5, "loss": 2.5, "loss_kd": 1.5},
            {"step": 10, "epoch": 1.0, "eval_loss": 0.7, "eval_accuracy": 0.9, "eval_kd": 0.25, "eval_runtime": 3.0},
        ],
        wall_time_s=12.5,
        hardware={"device": "cpu", "name": "Some Processor", "processes": 1, "threads": 4},
        versions={"hf-distill": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0", "peft": "0.21.2"},
    )
    return replace(base, **changes)


def report(weights: str = "aaaa0000bbbb1111", fingerprint: str = "beef") -> Report:
    """A report of a teacher, its student and one baseline."""

    def model(name: str, kind: str, accuracy: float, parameters: int) -> ModelResult:
        quality = Quality({"accuracy": accuracy}, agreement=accuracy, kl_to_teacher=0.1, items=90)
        timings = [Timing(1, 16, 4.0, 5.0, 20, 250.0)]
        return ModelResult(name, kind, None, quality, Cost(parameters, 4 * parameters, timings=timings))

    return Report(
        task="sequence_classification",
        data={"name": "org/texts", "split": "test", "rows": 90, "fingerprint": fingerprint},
        metric="accuracy",
        higher_is_better=True,
        models=(
            model("teacher", TEACHER, 0.95, 110_000_000),
            model("student", STUDENT, 0.931, 11_000_000),
            model("teacher, int8", BASELINE, 0.94, 110_000_000),
        ),
        environment={"device": "cpu"},
        training={"student": {"weights": weights}, "log_history": []},
    )


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a text that is written to a file ends after its first character, with an error."""
    write = Path.write_text

    def write_some(path: Path, text: str, **options: Any) -> int:
        write(path, text[:1], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_some)
