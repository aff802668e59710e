"""What tables and plots read from a report beyond its own numbers: speed-ups, series of the log, pairs confused."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.report.results import STUDENT, TEACHER, ModelResult, Report, Timing

Cell = tuple[int, int | None]

# What the student's loss on the labels and on the teacher's outputs is called in evaluations.
EVALUATIONS = {"loss_task": "eval_loss", "loss_kd": "eval_kd"}
_SAME = 1e-6
_NOT_FINITE = ("nan", "inf", "-inf", "NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Series:
    """One value of the log over the steps.

    Attributes:
        name: its key in the log.
        steps: of the optimizer, or the number of the entry where the log has none.
        values: one a step; NaN where the log has no finite number.
    """

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> tuple[float, ...]:
        """The values that are finite."""
        return tuple(value for value in self.values if math.isfinite(value))

    @property
    def changes(self) -> bool:
        """Whether the values differ by more than rounding."""
        values = self.finite
        return bool(values) and max(values) - min(values) > _SAME * max(map(abs, values))


@dataclass(frozen=True)
class Confused:
    """How often the student says `student` where the teacher says `teacher`, and what share that is."""

    teacher: str
    student: str
    items: int
    share: float


def typical_cell(report: Report) -> Cell | None:
    """The cell that stands for the grid: the smallest batch, and the middle one of its lengths (the lower of two).

    Of cells that all models have, if there are any, and else of the student's.
    """
    found: set[Cell] = set()
    for model in (report.model(STUDENT), report.model(TEACHER), *report.models):
        own = set(grid(model))
        found = found & own or found or own
    smallest = min((batch for batch, _ in found), default=0)
    cells = sorted((cell for cell in found if cell[0] == smallest), key=lambda cell: cell[1] or 0)
    return cells[(len(cells) - 1) // 2] if cells else None


def shape(cell: Cell) -> str:
    """The cell in words."""
    return f"batch {cell[0]}" + ("" if cell[1] is None else f", length {cell[1]}")


def grid(model: ModelResult | None) -> dict[Cell, Timing]:
    """A model's timings by batch size and length."""
    timings = () if model is None or model.cost is None else model.cost.timings
    return {(timing.batch_size, timing.length): timing for timing in timings}


def speed_up(report: Report, model: ModelResult, cell: Cell | None) -> float | None:
    """The teacher's median time as a multiple of the model's, in that cell."""
    own, reference = grid(model).get(cell), grid(report.model(TEACHER)).get(cell)  # type: ignore[arg-type]
    if own is None or reference is None or not own.p50_ms > 0:
        return None
    return reference.p50_ms / own.p50_ms


def score_name(report: Report) -> str:
    """What `score` is."""
    return report.metric or "agreement with the teacher"


def score(report: Report, model: ModelResult | None) -> float | None:
    """The metric that the report is about; without one, how often the model chooses as the teacher does."""
    if model is None or model.quality is None:
        return None
    if report.metric is not None:
        return model.quality.metrics.get(report.metric)
    return 1.0 if model.kind == TEACHER else model.quality.agreement


def class_names(report: Report) -> list[str]:
    """Of the student's confusion with the teacher: as F1 names them, else numbers."""
    student = report.model(STUDENT)
    if student is None or student.quality is None or student.quality.confusion_with_teacher is None:
        return []
    names = list(student.quality.f1_by_class or ())
    size = len(student.quality.confusion_with_teacher)
    return names if len(names) == size else [str(index) for index in range(size)]


def most_confused(counts: Sequence[Sequence[int]], names: Sequence[str], at_most: int) -> list[Confused]:
    """The pairs of classes that student and teacher tell apart differently, most items first.

    Args:
        counts: (classes, classes), rows the teacher's choices.
        names: of the classes.
        at_most: how many.
    """
    pairs = [
        Confused(names[row], names[column], items, items / sum(line))
        for row, line in enumerate(counts)
        for column, items in enumerate(line)
        if row != column and items > 0
    ]
    return sorted(pairs, key=lambda pair: (-pair.items, -pair.share))[:at_most]


def term_losses(report: Report) -> list[Series]:
    """The loss of each term before its weight; the whole loss where no term was logged."""
    every = _series(report)
    terms = [every[name] for name in every if name.startswith("loss_")]
    terms.sort(key=lambda term: (term.name not in EVALUATIONS, [*EVALUATIONS, term.name].index(term.name)))
    return terms or [every[name] for name in every if name == "loss"]


def evaluation_of(report: Report, term: str) -> Series | None:
    """What the evaluations found of a term."""
    return _series(report).get(EVALUATIONS.get(term, ""))


def temperatures(report: Report) -> tuple[Series, Series, Series] | None:
    """Mean, least and greatest temperature, where there were several; the least and greatest may be the mean."""
    every = _series(report)
    mean = every.get("temperature")
    if mean is None or not mean.finite:
        return None
    least, most = every.get("temperature_min", mean), every.get("temperature_max", mean)
    varies = any(series.changes for series in (mean, least, most)) or least.values != most.values
    return (mean, least, most) if varies else None


def term_weights(report: Report) -> list[Series]:
    """The weights of the terms, if any changed."""
    return _if_any_changes(one for one in _series(report).values() if one.name.startswith("weight_"))


def item_weights(report: Report) -> list[Series]:
    """What items weigh on average and by group, if any changed."""
    names = ("item_weight", "group_weight_")
    return _if_any_changes(one for one in _series(report).values() if one.name.startswith(names))


def _if_any_changes(found: Iterator[Series]) -> list[Series]:
    series = list(found)
    return series if any(one.changes for one in series) else []


def _series(report: Report) -> dict[str, Series]:
    log: Sequence[Mapping[str, Any]] = (report.training or {}).get("log_history") or ()
    points: dict[str, list[tuple[float, float]]] = {}
    for position, entry in enumerate(log):
        step = float(entry.get("step", position))
        for name, value in entry.items():
            finite = isinstance(value, int | float) and math.isfinite(value)
            if finite or _is_lost(value):
                points.setdefault(name, []).append((step, float(value) if finite else math.nan))
    return {
        name: Series(name, tuple(step for step, _ in own), tuple(value for _, value in own))
        for name, own in points.items()
    }


def _is_lost(value: Any) -> bool:
    """Whether a number was not finite: as it is, or as JSON without such numbers may hold it."""
    return value is None or isinstance(value, float) or (isinstance(value, str) and value in _NOT_FINITE)
