"""The task's and the logits' term, and what a match is made of: projections and layer maps."""

from dataclasses import dataclass
from typing import Any

from hf_distill.config.checks import (
    ALWAYS,
    Window,
    check_choice,
    check_number,
    check_weight,
    check_window,
    did_you_mean,
    is_number,
)
from hf_distill.layer_mapping import DYNAMIC_MAPS, EXPLICIT_MAP, MAPS
from hf_distill.losses import LOSSES


class Term:
    """What every term has: a weight, and the part of the training in which it is on."""

    weight: float
    active: Window


@dataclass(frozen=True)
class TaskTerm(Term):
    """The student's own loss on the labels.

    Attributes:
        weight: >= 0.
        active: the part (start, end) of the training, in [0, 1], in which the term is on.
    """

    weight: float = 0.5
    active: Window = ALWAYS

    def __post_init__(self) -> None:
        check_weight("task_weight", self.weight)
        check_window("task.active", self.active)


@dataclass(frozen=True)
class LogitTerm(Term):
    """The distance of the student's logits from the teacher's.

    Attributes:
        loss: a registered loss of logits.
        weight: >= 0.
        temperature: T > 0 in softmax(logits / T) of both.
        active: the part (start, end) of the training, in [0, 1], in which the term is on.
    """

    loss: str = "forward_kl"
    weight: float = 0.5
    temperature: float = 2.0
    active: Window = ALWAYS

    def __post_init__(self) -> None:
        check_weight("kd_weight", self.weight)
        check_window("logits.active", self.active)
        known = [name for name in LOSSES if LOSSES.get(name).feature == "logits"]
        if self.loss not in LOSSES:
            raise ValueError(f"Unknown loss {self.loss!r}.{did_you_mean(self.loss, known)} Known: {', '.join(known)}.")
        if self.loss not in known:
            raise ValueError(
                f"kd_loss={self.loss!r} compares {LOSSES.get(self.loss).feature}, not logits. Make it the loss of a "
                f"match, or take one of {', '.join(known)}."
            )
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature!r}, but it divides the logits: it must be a positive number "
                "(1 compares the distributions as they are, 2 to 4 is usual)."
            )


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
