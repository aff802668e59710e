"""Which terms are on at a moment of the training: a pure function of its progress, so that resuming needs no state."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from hf_distill.config import ALWAYS, DistillationConfig, LogitTerm, MatchTerm, TaskTerm
from hf_distill.schedules import Schedule
from hf_distill.temperature import TemperaturePolicy

# How closely the training is looked through for moments without any term.
_MOMENTS = 1000
AnyTerm = TypeVar("AnyTerm", TaskTerm, LogitTerm, MatchTerm)


@dataclass(frozen=True)
class ActiveTerms:
    """The terms of a `DistillationConfig` at one moment: weights and temperatures that are scheduled are numbers here.

    Terms that are off have weight 0, or are left out.
    """

    task: TaskTerm
    logits: LogitTerm
    matches: tuple[MatchTerm, ...] = ()
    progress: float = 0.0

    @property
    def need_teacher(self) -> bool:
        """Whether any of them asks the teacher."""
        return self.logits.weight > 0 or any(match.asks_teacher for match in self.matches)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term by its name."""
        return {
            "task": self.task.weight,
            "kd": self.logits.weight,
            **{match.name: match.weight for match in self.matches},
        }


def terms_at(config: DistillationConfig, progress: float) -> ActiveTerms:
    """The terms that are on.

    Args:
        config: all terms.
        progress: the share of the training that is done, in [0, 1].
    """
    return ActiveTerms(
        task=_now(config.task, progress),
        logits=logits_at(config.logits, progress),
        # A match stays on while its scheduled weight is 0, since DDP waits for its projections.
        matches=tuple(_now(match, progress) for match in config.matches if match.weight > 0 and match.is_on(progress)),
        progress=progress,
    )


def _now(term: AnyTerm, progress: float) -> AnyTerm:
    weight = term.weight_at(progress)
    if weight == term.weight and term.weight_schedule is None:
        return term
    return replace(term, weight=weight, weight_schedule=None)


def logits_at(term: LogitTerm, progress: float) -> LogitTerm:
    """The logit term with what is scheduled in it as numbers."""
    term = _now(term, progress)
    changes: dict[str, Any] = {}
    if isinstance(term.temperature, TemperaturePolicy):
        changes["temperature"] = term.temperature.at(progress)
    if isinstance(term.teacher_scale, Schedule):
        changes["teacher_scale"] = term.teacher_scale.at(progress)
    return replace(term, **changes) if changes else term


def evaluation_term(config: DistillationConfig) -> LogitTerm:
    """The logit term as evaluations measure it: what is scheduled as at the end, so that they compare."""
    return logits_at(replace(config.logits, weight=1.0, weight_schedule=None, active=ALWAYS), 1.0)


def check_coverage(config: DistillationConfig) -> None:
    """Refuses terms that leave a part of the training without any.

    Raises:
        ValueError: with the part in which nothing is learned.
    """
    bounds = {bound for term in config.terms.values() for bound in term.active}
    changing = any(term.weight_schedule is not None for term in config.terms.values())
    moments = sorted({*bounds, *(number / _MOMENTS for number in range(_MOMENTS + 1) if changing)})
    # Between two moments: at a single one, such as the first of a warm-up from 0, all weights may be 0.
    parts = [(start, end) for start, end in pairwise(moments) if _is_empty(config, (start + end) / 2)]
    if parts:
        start = end = parts[0][0]
        for first, last in parts:
            end = last if first == end else end
        raise ValueError(
            f"No term is active between {start:.0%} and {end:.0%} of the training. Let the windows (`active`) and "
            "schedules of the terms with a weight cover all of [0, 1]."
        )


def _is_empty(config: DistillationConfig, progress: float) -> bool:
    return all(term.weight_at(progress) == 0 for term in config.terms.values())
