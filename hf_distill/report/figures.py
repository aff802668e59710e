"""The plots of models: quality against cost, and where the student differs from its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from hf_distill.report.derived import class_names, grid, most_confused, score, score_name, shape, typical_cell
from hf_distill.report.drawing import COLORS, MARKERS, log_where_wide, panels, places_of_names, write_names
from hf_distill.report.results import STUDENT, TEACHER, UNDISTILLED, ModelResult, Report
from hf_distill.report.wording import byte_unit, shortened

_MAX_NUMBERED = 15  # classes whose cells can hold their number
_SQUARE = 7  # classes whose matrix would not fill its panel; larger ones nearly are square without being made so
_MAX_MAPPED = 150  # classes whose cells are still pixels
_POINTS_ACROSS = 480  # of the numbers in a row of the matrix, which take 0.6 of their height for a digit
_WORST = 10
_KINDS = (TEACHER, STUDENT, UNDISTILLED)


@dataclass(frozen=True)
class Point:
    """A model's place, and how far its error bar reaches to the right."""

    model: ModelResult
    cost: float
    quality: float
    spread: float = 0.0


@dataclass(frozen=True)
class Axis:
    """What a panel has quality against."""

    title: str
    label: str
    points: Sequence[Point]


def tradeoff(report: Report) -> Figure | None:
    """Quality over size and over latency; None where fewer than two models have both."""
    drawn = [axis for axis in (_sizes(report), _latencies(report)) if len(axis.points) > 1]
    if not drawn:
        return None
    figure, axes = panels(len(drawn), 1, row_height=2.7)
    better = "" if report.higher_is_better or report.metric is None else " (lower is better)"
    for panel, axis in zip(axes, drawn, strict=True):
        _draw_points(panel, report, axis.points)
        panel.set(title=axis.title, xlabel=axis.label, ylabel=shortened(score_name(report), 28) + better)
    _name_points(figure, [(panel, axis.points) for panel, axis in zip(axes, drawn, strict=True)])
    return figure


def _sizes(report: Report) -> Axis:
    sizes = [model.cost.size_bytes for model in report.models if model.cost is not None]
    unit, scale = byte_unit(max(sizes, default=0))
    points = []
    for model in report.models:
        quality = score(report, model)
        if quality is not None and np.isfinite(quality) and model.cost is not None:
            points.append(Point(model, model.cost.size_bytes / scale, quality))
    return Axis("Quality against size", f"weights on disk ({unit})", points)


def _latencies(report: Report) -> Axis:
    cell, points = typical_cell(report), []
    for model in report.models:
        quality, timing = score(report, model), grid(model).get(cell) if cell is not None else None
        if quality is not None and np.isfinite(quality) and timing is not None:
            points.append(Point(model, timing.p50_ms, quality, max(timing.p95_ms - timing.p50_ms, 0.0)))
    at = "" if cell is None else f" ({shape(cell)})"
    return Axis(f"Quality against latency{at}", "milliseconds: median, with a bar to the 95th percentile", points)


def _draw_points(axes: Axes, report: Report, points: Sequence[Point]) -> None:
    styles = _styles(report.models)
    for point in points:
        color, marker = styles[point.model.name]
        label = shortened(point.model.name, 40)
        axes.plot(point.cost, point.quality, marker, color=color, markersize=7, label=label)
        if point.spread > 0:
            bar = np.array([[0.0], [point.spread]])
            axes.errorbar(point.cost, point.quality, xerr=bar, fmt="none", color=color, capsize=3, elinewidth=1)
        if point.model.kind == TEACHER:
            axes.axhline(point.quality, color=color, linestyle="--", linewidth=0.8, zorder=1)
    axes.margins(x=0.12, y=0.2)
    log_where_wide(axes, [point.cost for point in points], which="x")
    log_where_wide(axes, [point.quality for point in points], which="y")
    axes.autoscale_view()
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)


def _styles(models: Sequence[ModelResult]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each model: always the same for teacher, student and undistilled student."""
    styles, others = {}, 0
    for model in models:
        if model.kind in _KINDS:
            index = _KINDS.index(model.kind)
        else:
            index, others = len(_KINDS) + others, others + 1
        styles[model.name] = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return styles


def _name_points(figure: Figure, drawn: Sequence[tuple[Axes, Sequence[Point]]]) -> None:
    """Names beside all points where there is room for them, else a legend below."""
    figure.draw_without_rendering()
    found = [places_of_names(axes, *_named(points), taken=_taken(axes, points)) for axes, points in drawn]
    if any(places is None for places in found):
        handles = {handle.get_label(): handle for axes, _ in drawn for handle in axes.get_legend_handles_labels()[0]}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2)
        return
    figure.set_layout_engine("none")  # names must not move what they were fitted into
    for (axes, points), places in zip(drawn, found, strict=True):
        write_names(axes, *_named(points), places or [])


def _named(points: Sequence[Point]) -> tuple[list[tuple[float, float]], list[str]]:
    return [(point.cost, point.quality) for point in points], [shortened(point.model.name, 32) for point in points]


def _taken(axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    """What the points, their error bars and the line of the teacher cover, in pixels."""
    half, taken = 5 * axes.figure.dpi / 72, []
    for point in points:
        ends = [(point.cost, point.quality), (point.cost + point.spread, point.quality)]
        (left, height), (right, _) = axes.transData.transform(ends)
        taken.append(Bbox.from_extents(left - half, height - half, right + half, height + half))
        if point.model.kind == TEACHER:
            whole = axes.get_window_extent()
            taken.append(Bbox.from_extents(whole.x0, height - 1, whole.x1, height + 1))
    return taken


def confusion(report: Report) -> Figure | None:
    """The student's choices against the teacher's; None for heads without classes to choose from."""
    student = report.model(STUDENT)
    if student is None or student.quality is None or not student.quality.confusion_with_teacher:
        return None
    counts, names = np.array(student.quality.confusion_with_teacher), class_names(report)
    same = np.trace(counts) / max(counts.sum(), 1)
    title = f"The student's choice, given the teacher's: the same for {100 * same:.1f} % of {counts.sum():,}"
    if len(names) <= _MAX_NUMBERED:
        figure, (axes,) = panels(1, 1, row_height=2.2 + 0.28 * len(names))
        _draw_numbers(axes, counts, names)
    elif len(names) <= _MAX_MAPPED:
        figure, (axes, beside) = panels(1, 2, row_height=3.2, width_ratios=(1, 1.3))
        _draw_map(axes, counts)
        axes.set(xlabel="student's class, by number", ylabel="teacher's class")
        _draw_worst(beside, counts, names, 22)
    else:
        figure, (beside,) = panels(1, 1, row_height=3.2)
        _draw_worst(beside, counts, names, 42)
    figure.suptitle(title)
    return figure


def _draw_map(axes: Axes, counts: np.ndarray) -> np.ndarray:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root, as the few that differ are what one looks for.
    aspect: Literal["equal", "auto"] = "equal" if len(counts) <= _SQUARE else "auto"
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect=aspect)
    axes.grid(False)
    return shares


def _draw_numbers(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    shares = _draw_map(axes, counts)
    size = min(8.0, _POINTS_ACROSS / len(names) / len(str(counts.max())))
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            color = "white" if shares[row, column] > 0.35 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=color, fontsize=size)
    short = [shortened(name, 20) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), short)
    axes.set(xlabel="student", ylabel="teacher")


def _draw_worst(axes: Axes, counts: np.ndarray, names: Sequence[str], length: int) -> None:
    pairs = most_confused(counts.tolist(), names, _WORST)
    axes.set_axis_off()
    axes.set_title("Most often apart: teacher → student" if pairs else "Nowhere apart")
    for place, pair in enumerate(pairs):
        text = f"{shortened(pair.teacher, length)} → {shortened(pair.student, length)}"
        axes.text(0, place - 0.05, text, va="bottom", in_layout=False)  # else it would narrow the bars
        axes.barh(place + 0.15, pair.items, height=0.25, color=COLORS[1])
        axes.text(pair.items, place + 0.15, f" {pair.items:,}", va="center")
    axes.set_xlim(0, 1.15 * max((pair.items for pair in pairs), default=1))
    axes.set_ylim(_WORST - 0.5, -0.6)
