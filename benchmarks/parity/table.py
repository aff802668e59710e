"""Results of parity as markdown."""

from __future__ import annotations

from typing import Any


def worst(result: dict[str, Any], part: str) -> str:
    """The largest error of a comparison, or what stands for one."""
    errors = [row[part] for row in result["cases"]]
    return next((error for error in errors if isinstance(error, str)), None) or f"{max(errors):.0e}"


def markdown(results: dict[str, Any]) -> str:
    """One line per comparison: the largest relative errors over its cases."""
    lines = ["| rival | ours | rival = factor × mean of ours | value | gradient | |", "|---|---|---|---|---|---|"]
    for result in results["comparisons"]:
        version = results["contenders"][result["package"]]
        verdict = "agrees" if result["agrees"] else "**differs**"
        lines.append(
            f"| {result['package']} {version}: {result['rival']} | {result['ours']} | {result['factor']} "
            f"| {worst(result, 'value_error')} | {worst(result, 'gradient_error')} "
            f"| {': '.join(filter(None, (verdict, result['note'])))} |"
        )
    lines += [f"\n{name} has no rival: {reason}." for name, reason in results["absent"].items()]
    lines += [f"\n{name} skipped: {reason}." for name, reason in results["skipped"].items()]
    return "\n".join(lines) + "\n"
