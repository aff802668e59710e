"""Results of exactness runs as markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.exactness.steps import SPLITS

REFERENCE = "8x1"
EXACT_BELOW = 1e-4  # float32 noise is about 1e-6; the smallest real fault seen is above 1e-2
OTHERS = tuple(name for name in SPLITS if name != REFERENCE)

Result = dict[str, Any]


def is_exact(row: Result) -> bool:
    """Whether a step agrees with the 8x1 step in its gradient and in its logged loss."""
    return row["gradient_error"] < EXACT_BELOW and abs(row["loss_ratio"] - 1) < EXACT_BELOW


def _cell(row: Result | None) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return "failed"
    if is_exact(row):
        return f"{row['gradient_error']:.0e}"
    return f"**{row['gradient_error']:.0%}** (loss x {row['loss_ratio']:.3g})"


def summary_table(contenders: dict[str, Result]) -> list[str]:
    """One line per contender: models whose step is exact, of models tried, for each split."""
    lines = ["| trainer | " + " | ".join(OTHERS) + " |", "|---" * (len(OTHERS) + 1) + "|"]
    for entry in contenders.values():
        counts = []
        for split in OTHERS:
            rows = [row for row in entry["steps"] if row["split"] == split]
            exact = sum("failed" not in row and is_exact(row) for row in rows)
            counts.append(f"{exact} of {len(rows)}" if rows else "–")
        lines.append(f"| {entry['title']} ({entry['version']}) | " + " | ".join(counts) + " |")
    return lines


def detail_table(entry: Result) -> list[str]:
    """One contender: a line per model, the reference step and the error of every other split."""
    lines = ["| model | 8x1: loss, gradient norm | " + " | ".join(OTHERS) + " |", "|---" * (len(OTHERS) + 2) + "|"]
    models = dict.fromkeys(row["model"] for row in entry["steps"])
    for model in models:
        rows = {row["split"]: row for row in entry["steps"] if row["model"] == model}
        base = rows.get(REFERENCE)
        shown = "failed" if base is None or "failed" in base else f"{base['loss']:.4f}, {base['gradient_norm']:.4f}"
        lines.append(f"| {model} | {shown} | " + " | ".join(_cell(rows.get(split)) for split in OTHERS) + " |")
    return lines


def markdown(contenders: dict[str, Result]) -> str:
    """The summary, then a section per contender with its failures and refusals in words."""
    parts = ["\n".join(summary_table(contenders))]
    for entry in contenders.values():
        lines = [f"### {entry['title']}", "", f"{entry['version']}.", "", *detail_table(entry)]
        failures = {(row["model"], row["failed"]): None for row in entry["steps"] if "failed" in row}
        lines += [""] * bool(failures) + [f"- {model}: {reason}" for model, reason in failures]
        if entry["not_made_for"]:
            lines += ["", f"Left out, {entry['not_made_for'][0]['reason']}: "
                      + ", ".join(item["model"] for item in entry["not_made_for"]) + "."]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
