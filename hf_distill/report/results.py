"""What a report holds: plain numbers by model, as `report.json` has them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_distill.files import whole_file
from hf_distill.metrics.direction import retention

FORMAT = 1
TEACHER, STUDENT, UNDISTILLED, BASELINE = "teacher", "student", "undistilled", "baseline"


@dataclass(frozen=True)
class Quality:
    """What one model is worth on the rows of the report.

    Attributes:
        metrics: of the task, against the labels; empty where no row has a label.
        agreement: share of items on which the model chooses as the teacher does, in [0, 1].
        kl_to_teacher: mean KL(teacher || model) of an item, in nats, at T = 1.
        calibration_error: expected calibration error against the labels, in [0, 1].
        calibration_error_to_teacher: the same with the teacher's choices in place of the labels.
        f1_by_class: by the class's name.
        confusion_with_teacher: rows are the teacher's choices, columns the model's, in the order of `f1_by_class`.
        items: how many were compared: rows, tokens with a label, or predicted positions.
        labelled: how many of them have a label, where items are rows.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    kl_to_teacher: float | None = None
    calibration_error: float | None = None
    calibration_error_to_teacher: float | None = None
    f1_by_class: Mapping[str, float] | None = None
    confusion_with_teacher: Sequence[Sequence[int]] | None = None
    items: int = 0
    labelled: int | None = None


@dataclass(frozen=True)
class Timing:
    """One cell of the latency grid.

    Of a baseline: its time over the teacher's in turns with it, times the teacher's in this report. On a machine whose
    speed is steady that is the time that it took.

    Attributes:
        batch_size: rows in a batch.
        length: tokens in a row (samples, for sound); None where inputs have one size, as images.
        p50_ms: median time of a forward pass.
        p95_ms: 95th percentile.
        repeats: timed passes, after the warm-up.
        rows_per_second: batch_size / the median.
    """

    batch_size: int
    length: int | None
    p50_ms: float
    p95_ms: float
    repeats: int
    rows_per_second: float


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: all of them, shared ones once.
        size_bytes: of the files that hold its weights, as `save_pretrained` writes them.
        peak_memory_bytes: of one forward pass of the grid's largest cell, above the level before it.
        flops: floating-point operations of one forward pass of one row of the grid's longest length; None where
            they cannot be counted.
        timings: the grid.
    """

    parameters: int
    size_bytes: int
    peak_memory_bytes: int | None = None
    flops: int | None = None
    timings: Sequence[Timing] = ()


@dataclass(frozen=True)
class ModelResult:
    """One model of the report.

    Attributes:
        name: as tables and plots call it: "teacher", "student", "student, undistilled", "teacher, int8".
        kind: "teacher", "student", "undistilled" or "baseline".
        source: Hub name, or the last part of a path; never the path itself.
        quality: None where it could not be measured, for the reason in `note`.
        cost: likewise.
        note: what a reader must know, such as why a baseline is missing.
    """

    name: str
    kind: str
    source: str | None = None
    quality: Quality | None = None
    cost: Cost | None = None
    note: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was measured of a teacher, its student and what one would try instead.

    Attributes:
        task: the kind of head, as `Task` names it.
        data: name, split, rows and fingerprint of the data set.
        metric: the task metric that retention refers to.
        higher_is_better: of that metric.
        models: teacher first, then the student, the undistilled student, and the baselines.
        environment: processor, threads, device, dtype, versions, date, and how latency was measured.
        training: the run's record (`hf_distill.run_record`), with its log; None where there is none.
    """

    task: str
    data: Mapping[str, Any]
    metric: str | None
    higher_is_better: bool
    models: Sequence[ModelResult]
    environment: Mapping[str, Any]
    training: Mapping[str, Any] | None = None

    def model(self, kind: str) -> ModelResult | None:
        """The first model of a kind."""
        return next((model for model in self.models if model.kind == kind), None)

    def retention(self, model: ModelResult) -> float | None:
        """The model's score as a share of the teacher's; of a metric that is better where it is smaller, the inverse.

        None where either has no score, or there is no share of it (`hf_distill.metrics.direction.retention`, which
        `eval_retention_<metric>` of evaluations is, too).
        """
        own, reference = (
            None if one is None or one.quality is None or self.metric is None else one.quality.metrics.get(self.metric)
            for one in (model, self.model(TEACHER))
        )
        if own is None or reference is None:
            return None
        return retention(own, reference, smaller_is_better=not self.higher_is_better)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the retention of every model."""
        content = {"format": FORMAT, **asdict(self)}
        for entry, model in zip(content["models"], self.models, strict=True):
            entry["retention"] = self.retention(model)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` wrote.

        Raises:
            ValueError: it is of another format.
        """
        if content.get("format") != FORMAT:
            raise ValueError(
                f"A report of format {content.get('format')!r}; this version reads {FORMAT}. Measure it again."
            )
        known = {own.name for own in fields(cls)}
        return cls(**{**_named(content, known), "models": tuple(_model(entry) for entry in content["models"])})

    def write_json(self, path: str | os.PathLike) -> None:
        """Writes `to_dict` to a file, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        with whole_file(Path(path)) as whole:
            whole.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read_json(cls, path: str | os.PathLike) -> "Report":
        """The report in a file.

        Raises:
            ValueError: it is of another format.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _named(content: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name in names}


def _model(entry: Mapping[str, Any]) -> ModelResult:
    own = _named(entry, {one.name for one in fields(ModelResult)})
    if own.get("quality") is not None:
        own["quality"] = Quality(**own["quality"])
    if own.get("cost") is not None:
        cost = {**own["cost"]}
        own["cost"] = Cost(**{**cost, "timings": tuple(Timing(**timing) for timing in cost["timings"])})
    return ModelResult(**own)
