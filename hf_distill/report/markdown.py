"""A report as Markdown, for people: `report.md`, and the part of it that model cards show."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_distill.report.derived import Cell, grid, shape, speed_up, typical_cell
from hf_distill.report.results import STUDENT, TEACHER, UNDISTILLED, ModelResult, Quality, Report
from hf_distill.report.sentences import headline, latency, plot_in_words
from hf_distill.report.wording import (
    NOTHING,
    byte_size,
    change,
    count,
    escaped,
    fraction,
    number,
    percent,
    table,
    times,
)

__all__ = ["headline", "plot_image", "results_table", "to_markdown"]

_MAX_CLASSES = 20
_HOW = """\
- **Retained**: the model's score as a share of the teacher's; where smaller is better, the inverse.
- **Agreement**: how often the model chooses as the teacher does.
- **KL**: KL(teacher ‖ model) of an item at temperature 1 in nats, the mean.
- **ECE**: expected calibration error, the mean gap between how certain a model is and how often it is right.
- **Latency**: of one forward pass, the median (p50) and, for its spread, the 95th percentile (p95).
- **Speed-up**: the teacher's median over the model's."""


def to_markdown(report: Report, *, plots: Sequence[str | os.PathLike] = ()) -> str:
    """The whole report: the finding in one sentence, the table of models, then each part of it.

    Args:
        report: what was measured.
        plots: what `write_plots` returned; linked as lying beside the text.
    """
    images = {PurePath(path).stem: plot_image(report, PurePath(path).name) for path in plots}
    parts = [
        "# Distillation report",
        headline(report),
        results_table(report),
        images.get("tradeoff"),
        *_section("Metrics", _metrics(report)),
        *_section("Classes", _classes(report), images.get("confusion")),
        *_section("Calibration", _calibration(report)),
        *_section("Latency", _latency(report)),
        *_section("Size and work", _costs(report)),
        *_section("Training", images.get("losses"), images.get("dynamics")),
        *_section("Notes", _notes(report)),
        *_section(
            "How this was measured", _environment(report), _HOW if any(map(_has_numbers, report.models)) else None
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plot_image(report: Report, link: str) -> str:
    """A plot as an image with a text for those who cannot see it.

    Args:
        report: that it shows.
        link: to the file, which has the name that `write_plots` gave it.
    """
    return f"![{escaped(plot_in_words(report, PurePath(link).stem))}]({link.replace(' ', '%20')})"


def results_table(report: Report) -> str:
    """The models at a glance, and under them what the columns are."""
    cell = typical_cell(report)
    metric = "score" if report.metric is None else escaped(report.metric)
    to_labels = any(_quality(model).calibration_error is not None for model in report.models)
    header = [
        "model",
        metric if report.higher_is_better else f"{metric} (lower is better)",
        "retained",
        "agreement",
        "KL to teacher",
        "ECE" if to_labels else "ECE to teacher",
        "parameters",
        "weights",
        "latency p50 / p95",
        "speed-up",
    ]
    rows = []
    for model in _measured(report):
        quality, is_teacher = _quality(model), model.kind == TEACHER
        error = quality.calibration_error if to_labels else quality.calibration_error_to_teacher
        rows.append(
            [
                f"**{escaped(model.name)}**" if model.kind == STUDENT else escaped(model.name),
                number(None if report.metric is None else quality.metrics.get(report.metric)),
                NOTHING if is_teacher else percent(report.retention(model)),
                NOTHING if is_teacher else percent(quality.agreement),
                NOTHING if is_teacher else number(quality.kl_to_teacher, 3),
                fraction(error),
                NOTHING if model.cost is None else count(model.cost.parameters),
                NOTHING if model.cost is None else byte_size(model.cost.size_bytes),
                latency(model, cell, unit=" ms"),
                NOTHING if is_teacher else times(speed_up(report, model, cell)),
            ]
        )
    return "\n\n".join(filter(None, [table(header, rows), _caption(report, cell)]))


def _caption(report: Report, cell: Cell | None) -> str:
    """Where the numbers of the table come from, and who is missing."""
    parts = []
    items = max((_quality(model).items for model in report.models), default=0)
    if items:
        name, split = (escaped(report.data.get(key) or "") for key in ("name", "split"))
        source = f" of {name}" + (f" ({split})" if split else "") if name else ""
        labelled = max((_quality(model).labelled or 0 for model in report.models), default=0)
        some = f", {labelled:,} of them with a label" if 0 < labelled < items else ""
        parts.append(f"Measured on {items:,} items{source}{some}.")
    if not report.higher_is_better and report.metric is not None:
        parts.append(f"Retained: the teacher's {escaped(report.metric)} over the model's.")
    if cell is not None:
        place = _place(report.environment)
        parts.append(f"Latency: {shape(cell)}{', on ' if place else ''}{place}; p50 is the median.")
    missing = [model for model in report.models if model not in _measured(report)]
    for model in missing:
        parts.append(f"Not measured: {escaped(model.name)}{f' ({escaped(model.note)})' if model.note else ''}.")
    return " ".join(parts)


def _place(environment: Mapping[str, Any]) -> str:
    """What the models ran on."""
    device, processor, threads = (environment.get(key) for key in ("device", "processor", "threads"))
    if device != "cpu":
        return escaped(device or "")
    count_of = f" ({threads} thread{'' if threads == 1 else 's'})" if threads else ""
    return escaped(processor or "CPU") + count_of


def _measured(report: Report) -> list[ModelResult]:
    """The models with a number of any kind, and teacher and student in any case."""
    return [model for model in report.models if _has_numbers(model) or model.kind in (TEACHER, STUDENT)]


def _has_numbers(model: ModelResult) -> bool:
    return model.quality is not None or model.cost is not None


def _quality(model: ModelResult) -> Quality:
    return model.quality or Quality()


def _section(title: str, *parts: str | None) -> Iterator[str]:
    """The parts that are there, under a title if any is."""
    found = [part for part in parts if part]
    if found:
        yield f"## {title}"
        yield from found


def _metrics(report: Report) -> str:
    """All task metrics, where there is more than the one of the first table."""
    names = list(dict.fromkeys(name for model in report.models for name in _quality(model).metrics))
    if len(names) < 2:
        return ""
    models = [model for model in report.models if _quality(model).metrics]
    header = ["metric", *(escaped(model.name) for model in models)]
    rows = [[escaped(name), *(number(_quality(model).metrics.get(name)) for model in models)] for name in names]
    return table(header, rows)


def _classes(report: Report) -> str:
    """F1 by class, where the student lost most first."""
    models = [report.model(kind) for kind in (TEACHER, STUDENT, UNDISTILLED)]
    by_model = {model.name: _quality(model).f1_by_class or {} for model in models if model is not None}
    teacher, student = models[:2]
    if teacher is None or student is None or not (by_model[teacher.name] and by_model[student.name]):
        return ""
    before, after = by_model[teacher.name], by_model[student.name]
    changes = {name: after[name] - before[name] for name in after if name in before}
    worst = sorted(changes, key=lambda name: (math.isnan(changes[name]), changes[name]))[:_MAX_CLASSES]
    header = ["class", *(f"F1 of {escaped(name)}" for name in by_model), "student − teacher"]
    rows = [
        [escaped(name), *(fraction(f1.get(name)) for f1 in by_model.values()), change(changes[name])] for name in worst
    ]
    which = (
        f"The {len(worst)} of {len(changes)} classes with the largest drop:\n\n" if len(changes) > len(worst) else ""
    )
    return which + table(header, rows)


def _calibration(report: Report) -> str:
    rows = []
    for model in _measured(report):
        errors = _quality(model).calibration_error, _quality(model).calibration_error_to_teacher
        to_labels, to_teacher = map(fraction, errors)
        rows.append([escaped(model.name), to_labels, NOTHING if model.kind == TEACHER else to_teacher])
    if all(cell == NOTHING for row in rows for cell in row[1:]):
        return ""
    return table(["model", "ECE against the labels", "ECE against the teacher's choices"], rows)


def _latency(report: Report) -> str:
    """The grid: times, then rows per second."""
    models = [model for model in report.models if grid(model)]
    cells = sorted({cell for model in models for cell in grid(model)}, key=lambda cell: (cell[0], cell[1] or 0))
    if not cells:
        return ""
    header = ["batch", "length", *(escaped(model.name) for model in models)]
    places = [[str(batch), NOTHING if length is None else str(length)] for batch, length in cells]
    times_ = [[*place, *(latency(model, cell) for model in models)] for place, cell in zip(places, cells, strict=True)]
    rates = [
        [
            *place,
            *(number(grid(model)[cell].rows_per_second, 3) if cell in grid(model) else NOTHING for model in models),
        ]
        for place, cell in zip(places, cells, strict=True)
    ]
    repeats = {timing.repeats for model in models for timing in grid(model).values()}
    passes = f"{min(repeats)}" if len(repeats) == 1 else f"{min(repeats)} to {max(repeats)}"
    return (
        f"Milliseconds of a forward pass, median / 95th percentile of {passes}:\n\n{table(header, times_)}\n\n"
        f"Rows per second, at the median:\n\n{table(header, rates)}"
    )


def _costs(report: Report) -> str:
    costs = [(model, model.cost) for model in report.models if model.cost is not None]
    if not costs:
        return ""
    header = ["model", "parameters", "weights on disk", "peak memory of a pass", "FLOPs of a row"]
    rows = [
        [
            escaped(model.name),
            f"{cost.parameters:,}",
            byte_size(cost.size_bytes),
            byte_size(cost.peak_memory_bytes),
            count(cost.flops),
        ]
        for model, cost in costs
    ]
    return table(header, rows)


def _notes(report: Report) -> str:
    named = [f"- {escaped(model.name)}: {escaped(model.note)}" for model in report.models if model.note]
    return "\n".join(named)


def _environment(report: Report) -> str:
    sources = {model.name: model.source for model in report.models if model.source}
    values = [*_flat({"task": report.task, "data": report.data, **sources, **report.environment})]
    return table(["", ""], [[escaped(name), escaped(value)] for name, value in values]).replace("---:", "---")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested mappings, those that hold something."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, bool):
            yield f"{prefix}{name}".replace("_", " "), "yes" if value else "no"
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}".replace("_", " "), ", ".join(map(str, value))
        elif value is not None and value != "":
            yield f"{prefix}{name}".replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)
