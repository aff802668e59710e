"""From a match as written to the layers it means in one student and one teacher."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from hf_distill.config import MatchTerm
from hf_distill.features import HIDDEN, MODULE, STACKS, Feature
from hf_distill.layer_mapping import COPIED_MAP, EXPLICIT_MAP, explicit_pairs, layer_pairs, random_pairs
from hf_distill.losses.base import LOSSES, LossSpec
from hf_distill.matching.copied import copied_layers, same_layers
from hf_distill.models.architectures import depth, layer_stacks
from hf_distill.models.heads import task_model


@dataclass(frozen=True)
class Pair:
    """One layer of the student and the layer of the teacher that it is compared with.

    Attributes:
        student: the student's feature, of one layer of one stack.
        teacher: the teacher's; None for losses on the student alone.
        projection: the name of the module that maps the student's feature to the teacher's width, or None.
        sees_all: of attention, whether both models' positions see all real ones (before them, if causal): what is
            allowed then follows from the tokens, and the models' own masks need not be read.
    """

    student: Feature
    teacher: Feature | None
    projection: str | None = None
    sees_all: bool = False


@dataclass(frozen=True)
class StackMatch:
    """A match within one stack of layers.

    Attributes:
        stack: the student's stack: `encoder`, `decoder` or None.
        pairs: for a fixed map its pairs; for a map that changes every pair it may choose from, by student's layer and
            then by teacher's.
    """

    stack: str | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Match:
    """A match with its layers.

    Attributes:
        term: as configured.
        spec: its loss.
        stacks: one for most models, two for both halves of an encoder-decoder model.
    """

    term: MatchTerm
    spec: LossSpec
    stacks: tuple[StackMatch, ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether its map changes during the training."""
        return self.term.map.is_dynamic

    @property
    def student_sources(self) -> tuple[Feature, ...]:
        """What must be recorded in the student."""
        return tuple(dict.fromkeys(pair.student.source for stack in self.stacks for pair in stack.pairs))

    @property
    def teacher_sources(self) -> tuple[Feature, ...]:
        """What must be recorded in the teacher."""
        pairs = (pair for stack in self.stacks for pair in stack.pairs)
        return tuple(dict.fromkeys(pair.teacher.source for pair in pairs if pair.teacher is not None))


def resolve(term: MatchTerm, student: nn.Module, teacher: nn.Module | None) -> Match:
    """The layers that a match means.

    Args:
        term: the match as configured.
        student: the student.
        teacher: the teacher's model; None where there is none, which only a loss on the student alone allows.

    Raises:
        ValueError: a layer or a stack that one of the models does not have, or a map that leaves nothing to compare.
    """
    spec = LOSSES.get(term.loss)
    try:
        if spec.feature == "domain":
            stacks = [_alone(term, student, stack) for stack in _stacks(term.student, student, "student")]
        elif teacher is None:
            raise ValueError("there is no teacher to compare the student's layers with. Pass teacher_model=.")
        else:
            stacks = [_stack_match(term, student, teacher, *names) for names in _stack_pairs(term, student, teacher)]
        if term.map.strategy == "attention" and spec.feature != "hidden":
            raise ValueError(
                f"map attention (ALP-KD) mixes the teacher's vectors of a text, and {term.loss} compares relations "
                "between texts. Take a loss of hidden features, such as hidden_mse, or another map."
            )
        if not any(stack.pairs for stack in stacks):
            raise ValueError("its layer map leaves nothing to compare. Name the pairs: map: {1: 3, 2: 6}.")
    except ValueError as error:
        raise ValueError(f"Match {term.name!r}: {error}") from error
    return Match(term, spec, tuple(stacks))


def _stacks(feature: Feature, model: nn.Module, side: str) -> tuple[str | None, ...]:
    if feature.kind == MODULE:
        return (_side(str(feature.path), model),)
    known = tuple(layer_stacks(model))
    if feature.stack is None:
        return known
    if feature.stack not in known:
        name = type(task_model(model)).__name__
        remedy = f"Write {Feature(feature.kind, feature.layer, feature.every, pooling=feature.pooling)} instead."
        raise ValueError(f"the {side} ({name}) has no {feature.stack} of its own. {remedy}")
    return (feature.stack,)


def _side(path: str, model: nn.Module) -> str | None:
    """The stack whose positions a module's output has."""
    config = getattr(task_model(model), "config", None)
    if not getattr(config, "is_encoder_decoder", False) or None in layer_stacks(model):
        return None
    # What stands beside both, such as a head, reads the decoder.
    return next((part for part in path.split(".") if part in STACKS), "decoder")


def _stack_pairs(term: MatchTerm, student: nn.Module, teacher: nn.Module) -> list[tuple[str | None, str | None]]:
    assert term.teacher is not None
    of_student, of_teacher = _stacks(term.student, student, "student"), _stacks(term.teacher, teacher, "teacher")
    if len(of_student) == len(of_teacher) == 1:
        return [(of_student[0], of_teacher[0])]
    if of_student == of_teacher:
        return [(stack, stack) for stack in of_student]
    raise ValueError(
        f"the student has {_named(of_student)}, the teacher {_named(of_teacher)}. Say which is meant: write "
        "encoder. or decoder. before the reference to the encoder-decoder model."
    )


def _named(stacks: tuple[str | None, ...]) -> str:
    return " and ".join(stack or "one stack of layers" for stack in stacks)


def _layer(feature: Feature, layers: int, side: str = "student") -> int:
    """The layer of a feature that names one, counted from the embeddings."""
    layer = feature.layer
    assert layer is not None
    first = 0 if feature.kind == HIDDEN else 1
    resolved = layer + layers + 1 if layer < 0 else layer
    if not first <= resolved <= layers:
        raise ValueError(
            f"{feature} is not there: the {side} has {layers} layers, counted from {first}"
            f"{' (0: the embeddings)' if first == 0 else ''} to {layers}, or from -1 backwards."
        )
    return resolved


def _alone(term: MatchTerm, student: nn.Module, stack: str | None) -> StackMatch:
    if term.student.kind == MODULE:
        return StackMatch(stack, (Pair(replace(term.student, stack=stack), None),))
    layers = depth(student, stack)
    chosen = range(layers + 1) if term.student.layer is None else (_layer(term.student, layers),)
    return StackMatch(stack, tuple(Pair(term.student.at(layer, stack), None) for layer in chosen))


def _stack_match(
    term: MatchTerm, student: nn.Module, teacher: nn.Module, student_stack: str | None, teacher_stack: str | None
) -> StackMatch:
    own, other = term.student, term.teacher
    assert other is not None
    if own.kind == MODULE or own.layer is not None:
        if other.kind == MODULE or other.layer is not None:
            pair = Pair(
                _fixed(own, student, student_stack, "student"), _fixed(other, teacher, teacher_stack, "teacher")
            )
            return StackMatch(student_stack, (pair,))
    if term.map.strategy == COPIED_MAP:
        found = copied_layers(student, teacher, student_stack, teacher_stack)
        embeddings = {0: 0} if own.kind == HIDDEN else {}
        pairs = _of_layer(own, [*(embeddings | found).items()], len(found))
    else:
        pairs = _mapped(term, depth(student, student_stack), depth(teacher, teacher_stack))
        _warn_of_copies(term, pairs, same_layers(student, teacher, student_stack, teacher_stack))
    return StackMatch(
        student_stack, tuple(Pair(own.at(s, student_stack), other.at(t, teacher_stack)) for s, t in pairs)
    )


def _fixed(feature: Feature, model: nn.Module, stack: str | None, side: str) -> Feature:
    """A module, or a feature that names its own layer, with that layer counted from the front."""
    layer = None if feature.kind == MODULE else _layer(feature, depth(model, stack), side)
    return replace(feature, layer=layer, stack=stack)


def _mapped(term: MatchTerm, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """The pairs of layers of a map; for one that changes all that it may choose from."""
    embeddings = term.student.kind == HIDDEN
    depths = {"student_depth": student_depth, "teacher_depth": teacher_depth}
    if term.map.is_dynamic:
        candidates = term.map.candidates or tuple(range(1, teacher_depth + 1))
        named = explicit_pairs([(1, layer) for layer in candidates], **depths, with_embeddings=embeddings)
        one = term.student.layer is not None
        students = (_layer(term.student, student_depth),) if one else tuple(range(1, student_depth + 1))
        teachers = tuple(layer for _, layer in named)
        if term.map.strategy == "random":
            random_pairs(students, teachers, epoch=0, seed=term.map.seed)  # refuses too few candidates now
        pairs = list(product(students, teachers))
    elif term.map.strategy == EXPLICIT_MAP:
        pairs = list(explicit_pairs(term.map.pairs or (), **depths, with_embeddings=embeddings))
    else:
        pairs = list(layer_pairs(term.map.strategy, **depths, with_embeddings=embeddings))
    return _of_layer(term.student, pairs, student_depth)


def _of_layer(student: Feature, pairs: list[tuple[int, int]], depth: int) -> list[tuple[int, int]]:
    """Those of the pairs that are of the student's layer, if the reference names one."""
    if student.layer is None:
        return pairs
    own = _layer(student, depth)
    return [pair for pair in pairs if pair[0] == own]


def _warn_of_copies(term: MatchTerm, pairs: list[tuple[int, int]], same: Mapping[int, int]) -> None:
    """Warns of a map that leads copied layers away from where they came from."""
    led_away = [(own, other) for own, other in pairs if own in same and same[own] != other]
    if led_away and not term.map.is_dynamic:
        own, other = led_away[0]
        warnings.warn(
            f"Layer {own} of the student (of 1, 2, ...) is a copy of the teacher's layer {same[own]}, but by the "
            f"{term.map.strategy} map it learns from layer {other}. layer_mapping='copied' pairs copies with their "
            "originals; in run_stages: preset_stages(name, layer_mapping='copied').",
            stacklevel=2,
        )


def projection_name(term: MatchTerm, pair: Pair, *, dynamic: bool) -> str:
    """The name under which the projection of a pair is kept and saved."""
    if term.projection.share == "all":
        return f"{term.name}_shared"
    parts: Mapping[str, object] = {
        "stack": pair.student.stack,
        "student": pair.student.layer,
        "teacher": None if dynamic or pair.teacher is None else pair.teacher.layer,
    }
    return "_".join([term.name, *(str(part) for part in parts.values() if part is not None)])
