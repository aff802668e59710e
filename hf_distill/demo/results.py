"""What the demo found: one row for each kind of model, as JSON and as a table."""

import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table

from hf_distill.demo.measurement import Cost, Scores
from hf_distill.demo.settings import DemoSettings
from hf_distill.provenance import write_json


@dataclass(frozen=True)
class ModelResult:
    """One kind of model over its runs.

    Attributes:
        model: what it is, in words.
        labels: labelled training rows it saw; None for a teacher that came fine-tuned.
        unlabelled: training rows it saw as text without a label.
        runs: its scores, one for each seed.
        cost: what one such model costs; the same for every run.
    """

    model: str
    labels: int | None
    unlabelled: int
    runs: tuple[Scores, ...]
    cost: Cost

    def values(self, score: str) -> list[float]:
        """Returns the score of that name in each run."""
        return [getattr(run, score) for run in self.runs]

    def summary(self) -> dict[str, Any]:
        """Returns a description for JSON: each score with mean, standard deviation and its runs."""
        scores = {
            name: {
                "mean": statistics.mean(self.values(name)),
                "sd": statistics.stdev(self.values(name)) if len(self.runs) > 1 else None,
                "runs": self.values(name),
            }
            for name in ("accuracy", "f1_macro", "agreement")
        }
        return {
            "model": self.model,
            "labels": self.labels,
            "unlabelled": self.unlabelled,
            **scores,
            **asdict(self.cost),
        }


@dataclass(frozen=True)
class DemoResults:
    """The teacher and the students, in the order of the table."""

    settings: DemoSettings
    teacher: ModelResult
    students: tuple[ModelResult, ...]
    test_rows: int
    seconds: float

    def retention(self, student: ModelResult) -> float:
        """Returns the student's mean accuracy as a fraction of the teacher's."""
        return statistics.mean(student.values("accuracy")) / statistics.mean(self.teacher.values("accuracy"))

    def speed_up(self, student: ModelResult) -> float:
        """Returns how many times faster than the teacher the student answers."""
        return self.teacher.cost.latency_ms / student.cost.latency_ms

    def write_json(self, path: Path) -> None:
        """Writes the settings, the environment and every number behind the table."""
        report = {
            "settings": asdict(self.settings),
            "environment": {
                "python": platform.python_version(),
                "machine": f"{platform.system()} {platform.machine()}",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "test_rows": self.test_rows,
            "seconds": round(self.seconds, 1),
            "models": [
                self.teacher.summary(),
                *(
                    student.summary() | {"retention": self.retention(student), "speed_up": self.speed_up(student)}
                    for student in self.students
                ),
            ],
        }
        write_json(path, report)

    def tables(self) -> tuple[Table, Table]:
        """Returns what the models are worth and what they cost, each narrow enough for 80 columns."""
        quality = _table(
            f"{self.settings.dataset}: {self.test_rows} test rows",
            ("labels", "accuracy %", "macro F1 %", "retention %", "agreement %"),
        )
        for result in (self.teacher, *self.students):
            is_teacher = result is self.teacher
            quality.add_row(
                result.model,
                "-" if result.labels is None else f"{result.labels:,}",
                percent(result.values("accuracy")),
                percent(result.values("f1_macro")),
                "" if is_teacher else f"{100 * self.retention(result):.1f}",
                "" if is_teacher else percent(result.values("agreement")),
            )
        cost = _table("what they cost on the CPU", ("parameters", "weights MB", "latency ms", "speed-up"))
        for name, result in (("teacher", self.teacher), ("student", self.students[0])):
            cost.add_row(
                name,
                f"{result.cost.parameters:,}",
                f"{result.cost.size_bytes / 1e6:.1f}",
                f"{result.cost.latency_ms:.2f}",
                f"{self.speed_up(result):.1f}x",
            )
        return quality, cost


def _table(title: str, headers: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=0)
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def percent(fractions: list[float]) -> str:
    """Returns the mean in percent, with the standard deviation where there are two runs or more."""
    mean = f"{100 * statistics.mean(fractions):.1f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.1f}" if len(fractions) > 1 else mean
