"""What a term says of itself, in words for a reader who knows distillation but not this package."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_distill.config import ALWAYS, Balance, DistillationConfig, LayerMap, LogitTerm, MatchTerm
from hf_distill.losses import LOSSES
from hf_distill.schedules import Schedule
from hf_distill.temperature import (
    AdaptiveTemperature,
    LearnedTemperature,
    RelativeTemperature,
    ScheduledTemperature,
)

_MAPS = {
    "uniform": "layers spread evenly over the teacher's",
    "uniform_last": "the last teacher layer of each of as many blocks",
    "last": "the teacher's last layers",
    "first": "the teacher's first layers",
    "skip": "every n-th teacher layer",
    "copied": "each layer with the one its weights came from",
    "explicit": "pairs by hand",
    "random": "teacher layers drawn for each epoch (RAIL-KD)",
    "attention": "an attention-weighted mixture of teacher layers (ALP-KD)",
    "argmin": "every teacher layer to the nearest student layer, in order (CoFi)",
    "emd": "all layers with all, by earth mover's distance (BERT-EMD)",
}
_MASKS = {
    "tokens": "all real tokens",
    "content": "real tokens that are not special",
    "cls": "the first token",
    "task": "the positions with a label",
}
_SHOWN_PAIRS = 16


def temperature_in_words(term: LogitTerm) -> str:
    """What T is over the training and from item to item; nothing for a loss without one."""
    if not LOSSES.get(term.loss).takes_temperature:
        return ""
    policy: Any = term.temperature
    if isinstance(policy, ScheduledTemperature):
        text = f"T {schedule_in_words(policy.schedule)}"
    elif isinstance(policy, AdaptiveTemperature):
        easy, hard = (policy.min, policy.max) if policy.direction == "harder_hotter" else (policy.max, policy.min)
        signal = policy.signal.replace("_", " ")
        text = f"T from {easy:g} for easy items to {hard:g} for hard ones, by {signal}"
        text += "" if policy.sharpness == 1 else f" to the power of {policy.sharpness:g}"
    elif isinstance(policy, RelativeTemperature):
        text = f"T around {policy.base:g} within [{policy.min:g}, {policy.max:g}], cooler for harder items "
        text += f"({policy.name.upper()}, strength {policy.strength:g})"
    elif isinstance(policy, LearnedTemperature):
        scope = "one for all items" if policy.scope == "global" else "one for each item"
        text = f"T learned against the student within [{policy.min:g}, {policy.min + policy.range:g}], {scope}"
    else:
        text = f"T = {policy:g}"
    return text + ("" if term.temperature_squared else ", loss not multiplied by T²")


def schedule_in_words(schedule: Schedule) -> str:
    """How a number goes over the training."""
    if schedule.points:
        how = "in steps" if schedule.kind == "step" else "straight from point to point"
        points = ", ".join(f"{value:g} at {progress:.0%}" for progress, value in schedule.points)
        return f"{points} of the training, {how}"
    if schedule.is_constant:
        return f"{schedule.initial:g}"
    window = "" if (schedule.start, schedule.end) == ALWAYS else f", {_window((schedule.start, schedule.end))}"
    return f"from {schedule.initial:g} to {schedule.final:g} ({schedule.kind}{window})"


def weight_in_words(term: Any) -> str:
    """A term's weight, how it changes, and when the term is on."""
    text = f"{term.weight:g}"
    if term.weight_schedule is not None:
        text += f" times {schedule_in_words(term.weight_schedule)}"
    return text if term.active == ALWAYS else f"{text}, on {_window(term.active)}"


def logits_in_words(term: LogitTerm) -> str:
    """What is compared and how, beside the weight and the name of the loss."""
    scale = term.teacher_scale
    parts = [
        temperature_in_words(term),
        _options(term.options),
        "logits standardized (LSKD)" if term.transform == "standardize" else "",
        "the teacher's logits times " + schedule_in_words(scale) if isinstance(scale, Schedule) else "",
        f"the teacher's logits times {scale:g}" if not isinstance(scale, Schedule) and scale != 1 else "",
        "items weighed by " + ", ".join(setting.by for setting in term.item_weights) if term.item_weights else "",
        "tokens of both tokenizers paired by offsets" if term.token_alignment == "offsets" else "",
    ]
    return "; ".join(filter(None, parts))


def match_in_words(term: MatchTerm, pairs: Sequence[Sequence[str | None]] = ()) -> str:
    """What a match compares: features, layers, mask and projection.

    Args:
        term: the match.
        pairs: [student's feature, teacher's feature] of every pair of layers, where they are known.
    """
    return "; ".join(filter(None, _match_parts(term, pairs)))


def balance_in_words(balance: Balance) -> str:
    """How the terms are weighed against each other while training; nothing where they are not."""
    return {
        "none": "",
        "uncertainty": "The terms are weighed against each other by learned uncertainties (Kendall et al. 2018, "
        "arXiv:1705.07115).",
        "magnitude": "Each term is brought to the size of the logits' term while training.",
    }[balance.kind]


def sources(config: DistillationConfig) -> str:
    """The papers of what surrounds the losses: temperatures, maps, transforms, weights; arXiv numbers in a text."""
    term, found = config.logits, []
    if term.weight > 0:
        found += ["2211.16231"] if isinstance(term.temperature, LearnedTemperature) else []
        found += ["1911.07471"] if isinstance(term.temperature, RelativeTemperature) else []
        found += ["2403.01427"] if term.transform == "standardize" else []
        found += ["2104.07163"] if isinstance(term.teacher_scale, Schedule) else []
        found += ["1911.02116" for setting in term.item_weights if getattr(setting, "size_power", None) is not None]
    maps = {"random": "2109.10164", "attention": "2012.14022", "argmin": "2204.00408", "emd": "2010.06133"}
    found += [maps[match.map.strategy] for match in config.matches if match.weight > 0 and match.map.is_dynamic]
    found += ["1705.07115"] if config.balance.kind == "uncertainty" else []
    return " ".join(found)


def _match_parts(term: MatchTerm, pairs: Sequence[Sequence[str | None]]) -> Iterator[str]:
    teacher = "" if term.teacher is None else f" with the teacher's `{term.teacher}`"
    yield f"`{term.student}`{teacher}"
    if len(pairs) > 1 or term.map != LayerMap():
        shown = [f"{_layer(student)}→{_layer(other)}" for student, other in pairs if student and other]
        known = bool(shown) and not term.map.is_dynamic and len(shown) <= _SHOWN_PAIRS
        yield _MAPS[term.map.strategy] + (f" ({', '.join(shown)})" if known else "")
    if term.mask is not None:
        of_batch = f"where the column {term.mask.partition(':')[2]} says so"
        yield f"on {_MASKS[term.mask]}" if term.mask in _MASKS else of_batch
    if term.domain is not None:
        yield f"domains by the column {term.domain}"
    if term.loss in ("hidden_mse",) or term.projection.when == "always":
        when = "" if term.projection.when == "always" else " where widths differ"
        yield f"{term.projection.kind} projection{when}" if term.projection.kind != "identity" else ""
    yield "" if term.heads == "strict" else f"heads: {term.heads}"
    yield "" if term.length == "strict" else "the teacher's positions resampled to the student's"
    yield "" if term.reduction == "token_mean" else f"reduction: {term.reduction.replace('_', ' ')}"
    yield _options(term.options)


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in options.items())


def _window(active: tuple[float, float]) -> str:
    return f"from {active[0]:.0%} to {active[1]:.0%} of the training"


def _layer(feature: str) -> str:
    """`encoder 2` of `pooled(cls)@encoder.hidden[2]`."""
    found = re.search(r"(?:(encoder|decoder)\.)?\w+\[(-?\d+)\]$", feature)
    return feature if found is None else " ".join(filter(None, found.groups()))
