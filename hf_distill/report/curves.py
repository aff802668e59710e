"""The plots of a training: its losses, its temperatures and its weights, over the steps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_distill.report.derived import Series, evaluation_of, item_weights, temperatures, term_losses, term_weights
from hf_distill.report.drawing import COLORS, LINES, MARKERS, log_where_wide, panels, whole_steps
from hf_distill.report.results import Report
from hf_distill.report.wording import shortened

_MAX_TERMS = 12
_MAX_LINES = 7
_FEW = 30  # points, each of which gets a marker
_MANY = 120  # points, whose noise hides the trend
_HIGH_ROWS = 3
_VISIBLE = 0.03  # of the range of the axis


def losses(report: Report) -> Figure | None:
    """Each term's loss in a panel of its own, for they have different units; None without a log."""
    terms = term_losses(report)
    if not terms:
        return None
    shown = terms[:_MAX_TERMS]
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure, axes = panels(rows, columns, row_height=2.3 if rows <= _HIGH_ROWS else 1.7)
    last = "" if temperatures(report) is None else ", last temperature"  # evaluations have it all along
    for index, (panel, term) in enumerate(zip(axes, shown, strict=False)):
        _draw_loss(panel, term, evaluation_of(report, term.name), at=last if term.name == "loss_kd" else "")
        if index >= len(shown) - columns:  # the lowest of its column
            panel.set_xlabel("step")
    for panel in axes[len(shown) :]:
        panel.remove()
    title = "Loss of each term, before its weight" if shown[0].name != "loss" else "Loss"
    if len(terms) > _MAX_TERMS:
        title += f" ({_MAX_TERMS} of {len(terms)})"
    if any(len(term.steps) > _MANY for term in shown):
        title += "; pale: as logged, dark: moving mean"
    figure.suptitle(title)
    return figure


def _draw_loss(axes: Axes, term: Series, evaluations: Series | None, *, at: str) -> None:
    steps, values = np.array(term.steps), np.array(term.values)
    finite = list(term.finite)
    if len(steps) > _MANY:
        axes.plot(steps, values, color=COLORS[0], alpha=0.35, linewidth=0.8)
        values = _smoothed(values)
    axes.plot(steps, values, color=COLORS[0], marker=MARKERS[0] if len(steps) <= _FEW else None, label="training")
    if evaluations is not None and evaluations.finite:
        label = f"evaluation{at}"
        axes.plot(evaluations.steps, evaluations.values, "--", color=COLORS[1], marker=MARKERS[1], label=label)
        finite += evaluations.finite
    lost = steps[~np.isfinite(term.values)]
    if len(lost):
        at_the_bottom = axes.get_xaxis_transform()
        axes.plot(lost, np.full(len(lost), 0.03), "kx", transform=at_the_bottom, label="not finite", clip_on=False)
    log_where_wide(axes, finite, which="y")
    if not finite:
        axes.set_yticks([])
    axes.set_title(shortened(term.name, 36))
    whole_steps(axes, 5)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of the finite values around each, about a thirtieth of all; NaN where there is none."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "same")
    counts = np.convolve(finite.astype(float), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def dynamics(report: Report) -> Figure | None:
    """Temperature and weights over the steps; None where none of them changed."""
    found = temperatures(report)
    weights = [("Weights of the terms", term_weights(report)), ("Weights of the items", item_weights(report))]
    drawn = [(title, series) for title, series in weights if series]
    rows = len(drawn) + (found is not None)
    if rows == 0:
        return None
    figure, axes = panels(rows, 1, row_height=2.3)
    if found is not None:
        _draw_temperatures(axes[0], *found)
    for panel, (title, series) in zip(axes[rows - len(drawn) :], drawn, strict=True):
        _draw_weights(panel, title, series)
    for panel in axes:
        whole_steps(panel, 8)
    axes[-1].set_xlabel("step")
    return figure


def _draw_temperatures(axes: Axes, mean: Series, least: Series, most: Series) -> None:
    axes.plot(mean.steps, mean.values, color=COLORS[0], marker=_marker(mean, 0), label="mean")
    if least.steps == most.steps and _is_wide(least, most):
        axes.fill_between(
            least.steps, least.values, most.values, color=COLORS[0], alpha=0.2, linewidth=0, label="least to greatest"
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("Temperature")


def _is_wide(least: Series, most: Series) -> bool:
    """Whether the band between them is to be seen; of a schedule it is what changed between two logs."""
    gap = np.nanmax(np.subtract(most.values, least.values))
    return bool(gap > _VISIBLE * (np.nanmax(most.values) - np.nanmin(least.values)))


def _draw_weights(axes: Axes, title: str, series: Sequence[Series]) -> None:
    shown = series
    if len(series) > _MAX_LINES:
        shown = sorted(series, key=lambda one: min(one.finite, default=0) - max(one.finite, default=0))[:_MAX_LINES]
        title += f" (the {_MAX_LINES} of {len(series)} that change most)"
    for index, one in enumerate(shown):
        label = shortened(one.name.removeprefix("group_").removeprefix("weight_"), 24)
        marker = _marker(one, index)
        axes.plot(one.steps, one.values, color=COLORS[index], linestyle=LINES[index], marker=marker, label=label)
    axes.set(title=title)
    if all(value > 0 for one in shown for value in one.finite):  # a single weight may well fall straight to near 0
        log_where_wide(axes, [max(one.finite) for one in shown if one.finite], which="y")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _marker(series: Series, index: int) -> str | None:
    return MARKERS[index] if len(series.steps) <= _FEW else None
