"""Whether more of a metric is better, as far as its name tells."""

import re

_SMALLER = re.compile(
    r"(.+_)?(loss|loss_.+|kd|kl|kl_to_teacher|nll|cross_entropy|perplexity|ppl|error|error_rate|ece|brier|brier_score"
    r"|mse|rmse|mae|msle|mape|wer|cer|ter)"
)


def smaller_is_better(name: str) -> bool:
    """Whether a metric is a loss, an error or a distance by its name, with or without a prefix such as `eval_`."""
    return _SMALLER.fullmatch(name) is not None
