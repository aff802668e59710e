"""Value and gradient of a rival beside those of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity.cases import Case, Loss
from benchmarks.parity.contenders import Comparison

AGREES_BELOW = 1e-6  # float64 noise is below 1e-12, the least of the differences in formula above 1e-2


def value_and_gradient(loss: Loss, case: Case) -> tuple[Tensor, Tensor]:
    """A loss and its gradient with respect to the student's logits; 0 where it has none."""
    logits = case.draw()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits.student)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def measured(comparison: Comparison, case: Case) -> dict[str, Any]:
    """One line of results. What is not finite is written as text, as JSON has no word for it."""
    factor = comparison.factor(case)
    theirs = value_and_gradient(comparison.theirs, case)
    ours = [factor * part for part in value_and_gradient(comparison.ours, case)]
    row = {
        "theirs": theirs[0].item(),
        "ours_times_factor": ours[0].item(),
        "factor": factor,
        "value_error": relative_error(theirs[0], ours[0]),
        "gradient_error": relative_error(theirs[1], ours[1]),
    }
    agrees = max(row["value_error"], row["gradient_error"]) < AGREES_BELOW
    finite = {name: number if math.isfinite(number) else str(number) for name, number in row.items()}
    return {"shape": case.shape, "temperature": case.temperature, **finite, "agrees": agrees}


def compared(comparison: Comparison) -> dict[str, Any]:
    """All lines of one comparison, and whether the outcome is the expected one."""
    rows = [measured(comparison, case) for case in comparison.cases]
    agreeing = sum(row["agrees"] for row in rows)
    return {
        "package": comparison.package,
        "rival": comparison.rival,
        "ours": comparison.own,
        "factor": comparison.factor_is,
        "note": comparison.note,
        "agrees": agreeing == len(rows),
        "as_expected": agreeing == (0 if comparison.differs else len(rows)),
        "cases": rows,
    }
