"""What a report says in sentences: its finding, and what its plots show."""

from hf_distill.report.derived import (
    Cell,
    class_names,
    grid,
    most_confused,
    score,
    score_name,
    speed_up,
    temperatures,
    term_losses,
    typical_cell,
)
from hf_distill.report.results import STUDENT, TEACHER, UNDISTILLED, ModelResult, Report, Timing
from hf_distill.report.wording import NOTHING, byte_size, escaped, number, percent, times

_AS_FAST = 0.05  # closer than that to 1, and two medians say nothing of who is faster


def headline(report: Report) -> str:
    """What was kept and what was gained, in a sentence or two, in bold."""
    teacher, student = report.model(TEACHER), report.model(STUDENT)
    if teacher is None or student is None:
        return ""
    kept = _kept(report, student)
    gained = ", ".join(_gained(report, teacher, student, of="its" if kept else "the teacher's"))
    if not kept:
        return f"**The student: {gained}.**" if gained else ""
    sentence = f"**{kept}{', with ' if gained else ''}{gained}.**"
    undistilled = report.model(UNDISTILLED)
    alone = None if report.metric is None else score(report, undistilled)
    if alone is not None:
        sentence += f" Trained without the teacher, the same student has {escaped(report.metric)} {number(alone)}."
    return sentence


def _kept(report: Report, student: ModelResult) -> str:
    own, reference = score(report, student), score(report, report.model(TEACHER))
    if own is None:
        return ""
    if report.metric is None:
        items = f" of {student.quality.items:,} items" if student.quality and student.quality.items else ""
        return f"The student chooses as the teacher does in {percent(own)}{items}"
    metric, share = escaped(report.metric), report.retention(student)
    if share is not None and share >= 0 and report.higher_is_better:
        verb = "keeps" if share <= 1 else "reaches"
        return f"The student {verb} {percent(share)} of the teacher's {metric} ({number(own)} of {number(reference)})"
    better = "" if report.higher_is_better else "; lower is better"
    return f"The student has {metric} {number(own)} (the teacher {number(reference)}{better})"


def _gained(report: Report, teacher: ModelResult, student: ModelResult, *, of: str) -> list[str]:
    parts = []
    if teacher.cost is not None and student.cost is not None and teacher.cost.parameters:
        share = student.cost.parameters / teacher.cost.parameters
        parts.append("as many parameters" if share == 1 else f"{percent(share)} of {of} parameters")
    cell = typical_cell(report)
    faster = speed_up(report, student, cell)
    if faster is not None and cell is not None:
        at = f"at batch {cell[0]}"
        if abs(faster - 1) < _AS_FAST:
            parts.append(f"as fast {at}")
        else:
            about = "" if _is_plain(grid(teacher)[cell], grid(student)[cell]) else "about "
            parts.append(
                about + (f"{times(faster)} faster {at}" if faster > 1 else f"{times(1 / faster)} slower {at}")
            )
    return parts


def _is_plain(one: Timing, other: Timing) -> bool:
    """Whether the faster one's slow passes are faster than the other's usual ones."""
    fast, slow = sorted((one, other), key=lambda timing: timing.p50_ms)
    return fast.p95_ms < slow.p50_ms


def plot_in_words(report: Report, plot: str) -> str:
    """What a plot shows: "tradeoff", "confusion", "losses" or "dynamics"."""
    describe = {"tradeoff": _tradeoff, "confusion": _confusion, "losses": _losses, "dynamics": _dynamics}
    return describe[plot](report)


def latency(model: ModelResult, cell: Cell | None, *, unit: str = "") -> str:
    """Median and 95th percentile of a cell."""
    timing = None if cell is None else grid(model).get(cell)
    return NOTHING if timing is None else f"{number(timing.p50_ms, 3)} / {number(timing.p95_ms, 3)}{unit}"


def _tradeoff(report: Report) -> str:
    cell = typical_cell(report)
    found = []
    for model in report.models:
        if score(report, model) is not None and model.cost is not None:
            time = f", {latency(model, cell)} ms" if cell in grid(model) else ""
            found.append(f"{model.name}: {number(score(report, model))} at {byte_size(model.cost.size_bytes)}{time}")
    return f"{score_name(report)} against size and latency. {'; '.join(found)}."


def _confusion(report: Report) -> str:
    student = report.model(STUDENT)
    counts = None if student is None or student.quality is None else student.quality.confusion_with_teacher
    pairs = most_confused(counts or [], class_names(report), 3)
    named = "; ".join(f"{pair.teacher} as {pair.student}, {pair.items:,}" for pair in pairs)
    return "The student's choices against the teacher's. " + (
        f"Most often apart: {named}." if named else "All the same."
    )


def _losses(report: Report) -> str:
    found = [
        f"{series.name} from {number(series.finite[0], 3)} to {number(series.finite[-1], 3)}"
        for series in term_losses(report)
        if series.finite
    ]
    return f"Losses over the steps: {', '.join(found)}."


def _dynamics(report: Report) -> str:
    changing = temperatures(report)
    mean = () if changing is None else changing[0].finite
    ends = f": the temperature goes from {number(mean[0], 3)} to {number(mean[-1], 3)}" if mean else ""
    return f"What changed over the steps{ends}."
