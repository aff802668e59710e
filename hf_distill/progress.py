"""Which terms are on at a moment of the training: a pure function of its progress, so that resuming needs no state."""

from dataclasses import dataclass, replace
from itertools import pairwise

from hf_distill.config import DistillationConfig, LogitTerm, MatchTerm, TaskTerm


@dataclass(frozen=True)
class ActiveTerms:
    """The terms of a `DistillationConfig` that are on; those that are off have weight 0, or are left out."""

    task: TaskTerm
    logits: LogitTerm
    matches: tuple[MatchTerm, ...] = ()

    @property
    def need_teacher(self) -> bool:
        """Whether any of them asks the teacher."""
        return self.logits.weight > 0 or any(match.asks_teacher for match in self.matches)


def terms_at(config: DistillationConfig, progress: float) -> ActiveTerms:
    """The terms that are on.

    Args:
        config: all terms.
        progress: the share of the training that is done, in [0, 1].
    """
    task, logits = config.task, config.logits
    return ActiveTerms(
        task=task if _is_on(task.active, progress) else replace(task, weight=0.0),
        logits=logits if _is_on(logits.active, progress) else replace(logits, weight=0.0),
        matches=tuple(match for match in config.matches if match.weight > 0 and _is_on(match.active, progress)),
    )


def check_coverage(config: DistillationConfig) -> None:
    """Refuses terms that leave a part of the training without any.

    Raises:
        ValueError: with the part in which nothing is learned.
    """
    windows = [term.active for term in (config.task, config.logits, *config.matches) if term.weight > 0]
    bounds = sorted({0.0, 1.0, *(bound for window in windows for bound in window)})
    for start, end in pairwise(bounds):
        if not any(_is_on(window, start) for window in windows):
            raise ValueError(
                f"No term is active between {start:.0%} and {end:.0%} of the training. Let the windows (`active`) of "
                "the terms with a weight cover all of [0, 1]."
            )


def _is_on(window: tuple[float, float], progress: float) -> bool:
    start, end = window
    return start <= progress < end or (end == 1 and progress >= 1)
