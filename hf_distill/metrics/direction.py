"""Whether more of a metric is better, as far as its name tells, and what share of a score another one is."""

import math
import re

_SMALLER = re.compile(
    r"(.+_)?(loss|loss_.+|kd|kl|kl_to_teacher|nll|cross_entropy|perplexity|ppl|error|error_rate|ece|brier|brier_score"
    r"|mse|rmse|mae|msle|mape|wer|cer|ter)"
)


def smaller_is_better(name: str) -> bool:
    """Whether a metric is a loss, an error or a distance by its name, with or without a prefix such as `eval_`."""
    return _SMALLER.fullmatch(name) is not None


def retention(student: float, teacher: float, *, smaller_is_better: bool) -> float | None:
    """The student's score as a share of the teacher's; of a metric that is better where it is smaller, the inverse.

    A student's score below 0, as of a correlation, is a share below 0: so a better student always retains more, and
    a training can follow it through evaluations on both sides of 0.

    Returns: None where there is no share: the teacher's score is not above 0, one of the two is not finite, or the
    share would be infinite, as where a student makes no error and its teacher does.
    """
    if not (math.isfinite(student) and math.isfinite(teacher)) or teacher <= 0:
        return None
    if not smaller_is_better:
        return student / teacher
    return teacher / student if student > 0 else None
