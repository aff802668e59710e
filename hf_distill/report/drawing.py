"""How the plots of a report look: made to be read 600 pixels wide, without colour too."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from hf_distill.report.wording import number

WIDTH = 6.0  # inches: shown at 600 pixels, 8 points are 11 pixels high
# Okabe and Ito's colours, which can be told apart without red or green; yellow is too light for lines on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "<", ">", "p", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
STYLE = {  # what the figures of the docs share
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
_STYLE = STYLE | {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "axes.titlelocation": "left",
    "figure.titlesize": 10,
    "legend.handlelength": 3,  # long enough for a pattern of dashes
    "lines.markersize": 4,
    "text.parse_math": False,  # a class may be called "$"
}
_LOG_FROM = 20  # greatest over least
_GAP = 7  # points from a mark to its name
_PLACES = [(_GAP, 0), (0, _GAP), (0, -_GAP), (-_GAP, 0), (5, 5), (5, -5), (-5, 5), (-5, -5)]


@contextmanager
def drawn() -> Iterator[None]:
    """In here figures look as those of a report, whatever the user's settings are, which come back after it."""
    with style.context(["default", _STYLE]):
        yield


def panels(
    rows: int, columns: int, *, row_height: float, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, and its panels row by row; heights in inches."""
    figure = Figure(figsize=(WIDTH, row_height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios).flat)


def whole_steps(axes: Axes, at_most: int) -> None:
    """Round numbers of steps along the lower edge."""
    axes.xaxis.set_major_locator(MaxNLocator(at_most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def log_where_wide(axes: Axes, values: Sequence[float], *, which: str) -> None:
    """A logarithmic axis with plain numbers, where the values are positive and far apart.

    Args:
        axes: to set.
        values: finite, those that are drawn.
        which: "x" or "y".
    """
    if not values or min(values) <= 0 or max(values) < _LOG_FROM * min(values):
        return
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    decades = max(values) / min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 200 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axis.set_minor_formatter(NullFormatter())


def places_of_names(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], *, taken: Sequence[Bbox]
) -> list[tuple[float, float]] | None:
    """Where each name can stand beside its point without covering anything; None where not all have room.

    Args:
        axes: laid out for good: limits and layout must not change afterwards.
        points: in the units of the axes.
        names: one a point.
        taken: what no name may cover, in pixels.

    Returns: for `write_names`, the offset of each name in points.
    """
    inside, boxes = axes.get_window_extent(), list(taken)
    found: list[tuple[float, float]] = []
    for point, name in zip(points, names, strict=True):
        text = axes.text(0, 0, name)
        size = text.get_window_extent()
        text.remove()
        pixel, scale = axes.transData.transform(point), axes.figure.dpi / 72
        around = [(place, _beside(tuple(pixel), size, place, scale)) for place in _PLACES]
        free = [
            (place, box)
            for place, box in around
            if not any(box.overlaps(other) for other in boxes) and _is_inside(box, inside)
        ]
        if not free:
            return None
        place, box = free[0]
        found.append(place)
        boxes.append(box)
    return found


def write_names(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
) -> None:
    """Writes each name beside its point, at the places that `places_of_names` found."""
    for point, name, (across, up) in zip(points, names, places, strict=True):
        axes.annotate(
            name,
            point,
            (across, up),
            textcoords="offset points",
            ha=("center", "left", "right")[_sign(across)],
            va=("center", "bottom", "top")[_sign(up)],
        )


def _beside(point: tuple[float, ...], size: Bbox, place: tuple[float, float], pixels: float) -> Bbox:
    """Where a text of that size is, `place` points from the point."""
    (x, y), (across, up) = point, place
    left = x + across * pixels - size.width * (1 - _sign(across)) / 2
    bottom = y + up * pixels - size.height * (1 - _sign(up)) / 2
    return Bbox.from_bounds(left, bottom, size.width, size.height)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _is_inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
