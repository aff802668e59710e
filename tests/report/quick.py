"""Reports without the parts that take time."""

from typing import Any

from hf_distill.report import make_report
from hf_distill.report.results import Quality, Report


def quick(teacher: Any, student: Any, data: Any, **options: Any) -> Report:
    """A report with one timed pass and no baselines."""
    defaults = {"baselines": (), "batch_sizes": (1,), "repeats": 1, "warm_up": 0, "batch_size": 4}
    return make_report(teacher, student, data, **{**defaults, **options})


def quality(teacher: Any, student: Any, data: Any, **options: Any) -> Quality:
    """The student's."""
    found = quick(teacher, student, data, **options).model("student").quality
    assert found is not None
    return found
