"""Draws the figures of these pages with the package's own functions: `python docs/make_figures.py`.

Needs the extra `docs`: `pip install "hf-distill[docs]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hf_distill.losses import LOSSES
from hf_distill.losses.difficulty import difficulty
from hf_distill.report import drawing
from hf_distill.schedules import Schedule
from hf_distill.temperature import AdaptiveTemperature

STYLE = drawing.STYLE | {
    "legend.fontsize": 7,
    "axes.prop_cycle": mpl.cycler(color=drawing.COLORS),
    "svg.fonttype": "none",  # text stays text: a fifth of the size
    "svg.hashsalt": "hf-distill",  # the same figure is the same file
}
POINTS = 51
TEACHER = 0.3  # its probability of the first of two classes
STUDENT = 0.9  # where only an option varies
STUDENT_AT = torch.linspace(0.01, 0.99, POINTS)
SHADES = mpl.colormaps["viridis"]


def schedules() -> Figure:
    """Every kind of schedule over the progress of a training."""
    figure, (left, right) = panels(2)
    for kind in ("linear", "cosine", "exponential"):
        draw_schedule(left, {"kind": kind, "from": 8, "to": 1, "start": 0.1, "end": 0.7}, kind)
    draw_schedule(left, 4, "constant")
    left.set_title("from: 8, to: 1, start: 0.1, end: 0.7")
    points = [[0, 8], [0.4, 4], [0.8, 1]]
    for kind in ("step", "piecewise"):
        draw_schedule(right, {"kind": kind, "points": points}, kind)
    draw_schedule(right, {"kind": "warmup", "to": 6, "end": 0.2}, "warmup, to: 6, end: 0.2")
    right.set_title(f"points: {points}")
    for axes in (left, right):
        axes.set(xlabel="progress of the training", ylabel="value", ylim=(0, 8.4))
        axes.legend()
    return figure


def draw_schedule(axes: Axes, plain: object, label: str) -> None:
    """One schedule over the whole training."""
    schedule = Schedule.of(plain)
    progress = [index / 100 for index in range(101)]
    axes.plot(progress, [schedule.at(share) for share in progress], label=label)


def temperatures() -> Figure:
    """Adaptive T over the difficulty of an item, and where the difficulty comes from."""
    figure, axes = panels(3)
    teacher = two_classes(1 - torch.linspace(0.01, 0.5**0.25, POINTS) ** 4)
    hard = difficulty("teacher_entropy", teacher, teacher)
    for panel, direction in zip(axes, ("harder_hotter", "harder_cooler"), strict=False):
        for sharpness in (0.5, 1.0, 2.0):
            policy = AdaptiveTemperature(direction=direction, sharpness=sharpness)
            panel.plot(hard, policy(0.0, teacher, teacher), label=f"sharpness {sharpness:g}")
        panel.set(title=direction, xlabel="difficulty", ylabel="temperature", ylim=(0, 10.5))
        panel.legend()
    student = two_classes(torch.full((POINTS,), STUDENT))
    certain = torch.linspace(0.001, 0.999, POINTS)
    for signal in ("teacher_entropy", "teacher_confidence", "disagreement", "loss"):
        axes[2].plot(certain, difficulty(signal, student, two_classes(certain)), label=signal)
    axes[2].set(title=f"student at {STUDENT:g}", xlabel="teacher's probability", ylabel="difficulty", ylim=(0, 1.4))
    axes[2].legend(loc="upper center", ncols=2)
    return figure


def divergences() -> Figure:
    """Divergences between a teacher and a student of two classes, and of ten."""
    figure, axes = panels(3)
    for name in ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "tvd", "squared_hellinger"):
        axes[0].plot(STUDENT_AT, divergence(name, *over_student()), label=name)
    axes[0].set_title(f"teacher's probability {TEACHER:g}")
    mark_teacher(axes[0])
    draw_over_ten_classes(axes[1], [("forward_kl", {}), *(("top_k_kl", {"k": k}) for k in (1, 2, 4))])
    heads = (("adaptive_kl", {"head": head}) for head in (0.5, 0.8, 0.9))
    draw_over_ten_classes(axes[2], [("forward_kl", {}), ("reverse_kl", {}), *heads])
    return finished(figure, axes)


def mixtures() -> Figure:
    """Divergences from mixtures of teacher and student, by the share of each."""
    figure, axes = panels(3)
    shaded(axes[0], "jsd", "beta", (0.0, 0.1, 0.5, 0.9, 1.0))
    axes[0].set_title("jsd")
    shaded(axes[1], "skewed_kl", "skew", (0.1, 0.3, 0.6))
    shaded(axes[1], "skewed_reverse_kl", "skew", (0.1, 0.3, 0.6), style="--")
    axes[1].set_title("skewed")
    for panel in axes[:2]:
        mark_teacher(panel)
    draw_over_beta(axes[2])
    return finished(figure, axes)


def draw_over_beta(axes: Axes) -> None:
    """The cliff of the generalized JSD at its ends, which the continuous one has not."""
    student, teacher = two_classes(torch.tensor([STUDENT])), two_classes(torch.tensor([TEACHER]))
    inner = torch.linspace(0.01, 0.99, POINTS).tolist()
    for name, betas in (("jsd", [0.0, *inner, 1.0]), ("generalized_jsd", inner)):
        values = [divergence(name, student, teacher, beta=beta) for beta in betas]
        (line,) = axes.plot(betas, values, label=name)
    ends = [divergence("generalized_jsd", student, teacher, beta=beta) for beta in (0.0, 1.0)]
    axes.plot([0, 1], ends, "o", color=line.get_color(), markersize=4, label="generalized_jsd at its ends")
    axes.set(title=f"teacher {TEACHER:g}, student {STUDENT:g}", xlabel="beta", ylim=(0, None))


def draw_over_ten_classes(axes: Axes, settings: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Divergences from a teacher whose classes halve in probability, as the student goes from it to the reverse."""
    share = torch.linspace(0, 1, POINTS)
    falling = torch.softmax(-torch.arange(10) * torch.tensor(2.0).log(), -1)
    student = torch.lerp(falling, falling.flip(-1), share.unsqueeze(-1)).log()
    teacher = falling.log().expand_as(student)
    for name, options in settings:
        label = ", ".join([name, *(f"{option} {value:g}" for option, value in options.items())])
        axes.plot(share, divergence(name, student, teacher, **options), label=label)
    axes.set(title="ten classes, each half as likely", xlabel="share of the reversed teacher in the student")


def shaded(axes: Axes, name: str, option: str, values: Sequence[float], style: str = "-") -> None:
    """One loss over the student's probability, in shades from dark to light with its option."""
    for index, value in enumerate(values):
        curve = divergence(name, *over_student(), **{option: value})
        shade = SHADES(0.85 * index / (len(values) - 1))
        axes.plot(STUDENT_AT, curve, style, color=shade, label=f"{name}, {option} {value:g}")


def mark_teacher(axes: Axes) -> None:
    """An upright line where the student is the teacher."""
    axes.axvline(TEACHER, color="#999999", linewidth=0.8, zorder=0)
    axes.set(xlabel="student's probability", ylim=(0, 1.6))


def finished(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """The figure with its legends and its unit."""
    for panel in axes:
        panel.legend()
    axes[0].set_ylabel("value")
    return figure


def over_student() -> tuple[Tensor, Tensor]:
    """Logits of two classes: of students all the way, and of the teacher beside each."""
    return two_classes(STUDENT_AT), two_classes(torch.full((POINTS,), TEACHER))


def divergence(name: str, student_logits: Tensor, teacher_logits: Tensor, **options: float) -> Tensor:
    """(...,) values of a registered loss."""
    return LOSSES.get(name).function(student_logits, teacher_logits, **options)


def two_classes(probability: Tensor) -> Tensor:
    """(..., 2) logits of a first class of that probability, (...,)."""
    return torch.stack((probability, 1 - probability), -1).log()


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, side by side."""
    figure = Figure(figsize=(3.1 * count, 2.5), layout="constrained")
    return figure, list(figure.subplots(1, count))


FIGURES = {"schedules": schedules, "temperatures": temperatures, "divergences": divergences, "mixtures": mixtures}


def main() -> None:
    """Writes every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw().savefig(out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
