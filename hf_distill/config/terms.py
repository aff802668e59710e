"""The task's and the logits' term, how terms are balanced, and what a match is made of: projections, layer maps."""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_distill.config.checks import (
    ALWAYS,
    Window,
    check_choice,
    check_number,
    check_weight,
    check_window,
    did_you_mean,
    is_number,
    names_with,
)
from hf_distill.layer_mapping import DYNAMIC_MAPS, EXPLICIT_MAP, MAPS
from hf_distill.losses import LOSSES
from hf_distill.schedules import Schedule
from hf_distill.temperature import ScheduledTemperature, TemperaturePolicy, read_temperature
from hf_distill.weighting import ItemWeighting, read_item_weights

TRANSFORMS = ("none", "standardize")
TOKEN_ALIGNMENTS = ("none", "offsets")
BALANCES = ("none", "uncertainty", "magnitude")


class Term:
    """What every term has: a weight, how it changes, and the part of the training in which the term is on."""

    weight: float
    active: Window
    weight_schedule: Schedule | None

    def is_on(self, progress: float) -> bool:
        """Whether it is within `active` when a share of the training, in [0, 1], is done."""
        start, end = self.active
        return start <= progress < end or (end == 1 and progress >= 1)

    def weight_at(self, progress: float) -> float:
        """The weight then; 0 outside `active`."""
        if not self.is_on(progress):
            return 0.0
        return self.weight if self.weight_schedule is None else self.weight * self.weight_schedule.at(progress)


def check_weight_schedule(name: str, schedule: Any) -> None:
    """Refuses what is no schedule of factors on a weight."""
    if schedule is None:
        return
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"{name}={schedule!r} is no Schedule. Write Schedule.of({{'kind': 'linear', 'from': 1, 'to': 0}})."
        )
    if schedule.lowest < 0 or schedule.highest == 0:
        raise ValueError(
            f"{name} goes from {schedule.lowest} to {schedule.highest}, but it multiplies a weight: its values must "
            "be >= 0, and not all 0."
        )


@dataclass(frozen=True)
class TaskTerm(Term):
    """The student's own loss on the labels.

    Attributes:
        weight: >= 0.
        active: the part (start, end) of the training, in [0, 1], in which the term is on.
        weight_schedule: multiplies the weight; None leaves it as it is.
    """

    weight: float = 0.5
    active: Window = ALWAYS
    weight_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_weight("task_weight", self.weight)
        check_window("task.active", self.active)
        check_weight_schedule("task.weight_schedule", self.weight_schedule)


@dataclass(frozen=True)
class LogitTerm(Term):
    """The distance of the student's logits from the teacher's.

    Attributes:
        loss: a registered loss of logits.
        weight: >= 0.
        temperature: T > 0 in softmax(logits / T) of both: a number, or a policy that changes it during the training or
            from item to item.
        active: the part (start, end) of the training, in [0, 1], in which the term is on.
        weight_schedule: multiplies the weight; None leaves it as it is.
        options: further keywords of the loss, such as `beta` of `jsd`.
        transform: of both models' logits before they are compared: `none` or `standardize` (LSKD, arXiv:2403.01427).
        teacher_scale: > 0, multiplies the teacher's logits; a number or a schedule (Annealing-KD, arXiv:2104.07163).
        temperature_squared: whether the loss is multiplied by T², in value and gradient; some papers leave it out.
        item_weights: what some items weigh more than others; several multiply.
        token_alignment: `none` where both models read the same tokens; `offsets` between causal language models with
            other tokenizers: positions that have read the same text are paired, by the columns that
            `hf_distill.token_alignment.tokenize_for_teacher` makes.
    """

    loss: str = "forward_kl"
    weight: float = 0.5
    temperature: float | TemperaturePolicy = 2.0
    active: Window = ALWAYS
    weight_schedule: Schedule | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    transform: str = "none"
    teacher_scale: float | Schedule = 1.0
    temperature_squared: bool = True
    item_weights: tuple[ItemWeighting, ...] = ()
    token_alignment: str = "none"

    def __post_init__(self) -> None:
        check_weight("kd_weight", self.weight)
        check_window("logits.active", self.active)
        check_weight_schedule("logits.weight_schedule", self.weight_schedule)
        self._check_loss()
        if isinstance(self.temperature, Schedule):
            object.__setattr__(self, "temperature", ScheduledTemperature(self.temperature))
        elif isinstance(self.temperature, str | Mapping):
            object.__setattr__(self, "temperature", read_temperature(self.temperature))
        object.__setattr__(self, "item_weights", read_item_weights(self.item_weights))
        if not isinstance(self.temperature, TemperaturePolicy) and not (
            is_number(self.temperature) and self.temperature > 0
        ):
            raise ValueError(
                f"temperature={self.temperature!r}, but it divides the logits: it must be a positive number "
                "(1 compares the distributions as they are, 2 to 4 is usual), or a policy such as "
                "{policy: linear, from: 8, to: 2}."
            )
        check_choice("transform (logit_transform)", self.transform, TRANSFORMS)
        check_choice("token_alignment", self.token_alignment, TOKEN_ALIGNMENTS)
        scale = self.teacher_scale
        lowest = scale.lowest if isinstance(scale, Schedule) else scale
        if not (is_number(lowest) and lowest > 0):
            raise ValueError(f"teacher_scale={scale!r} multiplies the teacher's logits: it must stay > 0.")
        if not isinstance(self.temperature_squared, bool):
            raise ValueError(f"temperature_squared={self.temperature_squared!r}, but it must be true or false.")

    def _check_loss(self) -> None:
        known = [name for name in LOSSES if LOSSES.get(name).feature == "logits"]
        if self.loss not in LOSSES:
            meant = did_you_mean(self.loss, known) or names_with(self.loss, known)
            raise ValueError(f"Unknown loss {self.loss!r}.{meant} Known: {', '.join(known)}.")
        if self.loss not in known:
            raise ValueError(
                f"kd_loss={self.loss!r} compares {LOSSES.get(self.loss).feature}, not logits. Make it the loss of a "
                f"match, or take one of {', '.join(known)}."
            )
        check_options(self.loss, self.options)


def check_options(loss: str, options: Any) -> None:
    """Refuses options that a loss of logits does not take."""
    if not isinstance(options, Mapping):
        raise ValueError(f"options={options!r} is no mapping. Write {{option: value}}.")
    spec = LOSSES.get(loss)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(spec.function).parameters.items()
        if name in spec.options
    }
    for name, value in options.items():
        if name not in defaults:
            raise ValueError(
                f"kd_options (options): {loss} takes no {name!r}.{did_you_mean(name, defaults)} It takes "
                f"{', '.join(defaults) or 'none'}."
            )
        if isinstance(defaults[name], bool) != isinstance(value, bool) or (
            is_number(defaults[name]) and not is_number(value)
        ):
            kind = "true or false" if isinstance(defaults[name], bool) else f"a number such as {defaults[name]}"
            raise ValueError(f"kd_options (options): {name}={value!r} of {loss}, but it must be {kind}.")
    if options:
        _try_options(loss, tuple(sorted(options.items())))


@functools.cache
def _try_options(loss: str, options: tuple[tuple[str, Any], ...]) -> None:
    """Lets the loss itself say what it thinks of the values."""
    try:
        LOSSES.get(loss).function(torch.zeros(2, 4), torch.zeros(2, 4), **dict(options))
    except ValueError as error:
        raise ValueError(f"kd_options (options) of {loss}: {error}") from None


@dataclass(frozen=True)
class Balance:
    """How the terms are weighed against each other while training, on top of their weights.

    Attributes:
        kind: `none`; `uncertainty`: a learned log variance s for each term, its weight times
            exp(-s) / 2 * term + s / 2 (Kendall et al. 2018, arXiv:1705.07115); `magnitude`: each term is brought to
            the size that the logits' term has.
        learning_rate_factor: of `uncertainty`: > 0, times the student's learning rate, since s must move by whole
            numbers.
        momentum: of `magnitude`: how much of the running mean of a term a step leaves, in [0, 1).
    """

    kind: str = "none"
    learning_rate_factor: float = 100.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_choice("balance (loss_balance)", self.kind, BALANCES)
        check_number(
            "balance.learning_rate_factor", self.learning_rate_factor, least=1e-12, expected="it must be a number > 0"
        )
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ValueError(f"balance.momentum={self.momentum!r}, but it must be a number in [0, 1).")
        for name, kind in (("learning_rate_factor", "uncertainty"), ("momentum", "magnitude")):
            if getattr(self, name) != getattr(Balance, name) and self.kind != kind:
                raise ValueError(f"balance: {name} is read by {kind}, and the kind is {self.kind}. Drop it.")


@dataclass(frozen=True)
class Projection:
    """What brings the student's vectors to the teacher's width; trained with the student, gone after the training.

    Attributes:
        kind: `linear`, `mlp` (two layers), or `identity`.
        init: `default`, as PyTorch initialises it, or `orthogonal`.
        share: one module for each layer `pair`, or one for `all` pairs of the match.
        when: only on a `mismatch` of the widths, or `always`.
        bias: whether it adds one.
        learning_rate_factor: > 0, times the student's learning rate.
    """

    kind: str = "linear"
    init: str = "default"
    share: str = "pair"
    when: str = "mismatch"
    bias: bool = True
    learning_rate_factor: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("linear", "mlp", "identity"))
        check_choice("init", self.init, ("default", "orthogonal"))
        check_choice("share", self.share, ("pair", "all"))
        check_choice("when", self.when, ("mismatch", "always"))
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias={self.bias!r}, but it must be true or false.")
        expected = "it multiplies the learning rate and must be a number > 0"
        check_number("learning_rate_factor", self.learning_rate_factor, least=0, expected=expected)
        if self.learning_rate_factor == 0:
            raise ValueError(f"learning_rate_factor=0, but {expected}: a projection that never learns is noise.")


@dataclass(frozen=True)
class LayerMap:
    """Which teacher layers a student layer learns from.

    Attributes:
        strategy: by the depths (`uniform`, `uniform_last`, `last`, `first`, `skip`), `copied` (each layer with the one
            its weights came from), `explicit`, or while training:
            `argmin`, `attention` (ALP-KD), `emd` (BERT-EMD), `random` (RAIL-KD, anew for each epoch).
        pairs: (student layer, teacher layer), for `explicit` alone; negative ones count from the end.
        candidates: the teacher layers to choose from while training; none given: all of them.
        seed: of `random`.
    """

    strategy: str = "uniform"
    pairs: tuple[tuple[int, int], ...] = ()
    candidates: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, MAPS)
        if bool(self.pairs) != (self.strategy == EXPLICIT_MAP):
            raise ValueError(
                f"pairs={self.pairs!r} with strategy={self.strategy!r}: a list of layer pairs is an explicit map, and "
                "an explicit map needs at least one, such as [[1, 3], [2, 6]]."
            )
        if self.candidates and not self.is_dynamic:
            raise ValueError(
                f"candidates={self.candidates!r} with strategy={self.strategy!r}, which does not choose. Drop them, "
                f"or take one of {', '.join(DYNAMIC_MAPS)}."
            )
        if self.seed and self.strategy != "random":
            raise ValueError(f"seed={self.seed!r} with strategy={self.strategy!r}, which draws nothing. Drop it.")
        wrong = [pair for pair in self.pairs if not (isinstance(pair, tuple) and len(pair) == 2 and _layers(pair))]
        if wrong or not _layers(self.candidates) or not _layers((self.seed,)):
            raise ValueError(
                f"{self!r}: layers and the seed are whole numbers, and a pair is (student layer, teacher layer)."
            )
        for name, values in (("pairs", self.pairs), ("candidates", self.candidates)):
            if len({*values}) < len(values):
                raise ValueError(f"{name}={values!r} holds something twice. Weigh the match instead.")

    @property
    def is_dynamic(self) -> bool:
        """Whether it is decided while training, by the values or by chance."""
        return self.strategy in DYNAMIC_MAPS


def _layers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
