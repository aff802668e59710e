"""A match: one loss between features inside the student and the teacher, and what fits together in it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_distill.config.checks import ALWAYS, Window, check_choice, check_weight, check_window, did_you_mean, is_number
from hf_distill.config.terms import LayerMap, Projection, Term, check_weight_schedule
from hf_distill.features import HIDDEN, MODULE, Feature, parse_feature
from hf_distill.layer_mapping import EXPLICIT_MAP
from hf_distill.losses import LOSSES, LossSpec
from hf_distill.schedules import Schedule

RESERVED_NAMES = ("task", "kd")
MASKS = ("tokens", "content", "cls", "task")
_BATCH_MASK = "batch:"
# Keywords that the composition fills in from the batch; the others are the user's options.
_FROM_THE_BATCH = {"keys", "tokens", "valid", "target_rows"}
# The factor form of the relations is made before the loss, so their number is no argument of it.
_RELATION_HEADS = "relation_heads"
_REFERENCES = {
    "hidden": ((HIDDEN, MODULE), "hidden[*], pooled(cls)@hidden[-1] or module:path"),
    "attention": (("attention_scores", "attention_probs"), "attention_scores[*] or attention_probs[*]"),
    "relation": (("query", "key", "value"), "query[-1], key[-1] or value[-1]"),
    "tokens": ((HIDDEN, MODULE), "hidden[*] or module:path, not pooled"),
    "batch": ((HIDDEN, MODULE), "pooled(cls)@hidden[-1], pooled(mean)@hidden[*] or module:path"),
    "domain": ((HIDDEN, MODULE), "pooled(cls)@hidden[-1], pooled(mean)@hidden[-1] or module:path"),
}


@dataclass(frozen=True)
class MatchTerm(Term):
    """One loss between features of the student and of the teacher.

    Attributes:
        name: an identifier; the term is logged as `loss_<name>`.
        student: the student's feature; `hidden` and `hidden[*]` both mean all layers of the map.
        loss: a registered loss that compares such features.
        teacher: the teacher's; None becomes the student's, with the layer left to the map. A domain loss has none.
        map: which layers are paired, where a reference leaves them open.
        options: further keywords of the loss, and `relation_heads` of relations.
        mask: the positions that count, or that are pooled: `tokens` (all real ones), `content` (without special ones),
            `cls`, `task` (the supervised ones), `batch:<column>`; None is `tokens`, and so is `pairs` of tokens.
        projection: brings the student's vectors to the teacher's width.
        heads: where head counts differ: `strict` refuses, `mean` averages, `relation` regroups.
        length: of sequences that differ in length: `strict` refuses, `interpolate` resamples the teacher's.
        reduction: `token_mean`, `sample_mean`, or `reference`: as the loss's paper does it.
        weight: >= 0.
        active: the part (start, end) of the training, in [0, 1], in which the term is on.
        domain: of domain losses: the batch's column that is 1 for rows of the target domain.
        weight_schedule: multiplies the weight; None leaves it as it is.

    Raises:
        ValueError: parts that do not fit together, or that nobody would read.
    """

    name: str
    student: Feature
    loss: str
    teacher: Feature | None = None
    map: LayerMap = field(default_factory=LayerMap)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mask: str | None = None
    projection: Projection = field(default_factory=Projection)
    heads: str = "strict"
    length: str = "strict"
    reduction: str = "token_mean"
    weight: float = 1.0
    active: Window = ALWAYS
    domain: str | None = None
    weight_schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()) or self.name in RESERVED_NAMES:
            raise ValueError(
                f"A match is called {self.name!r}, but it is logged as loss_<name>: choose a name of letters, digits "
                f"and underscores other than {' and '.join(RESERVED_NAMES)}."
            )
        try:
            self._check_values()
            spec = LOSSES.get(self.loss)
            self._set(options={name: _frozen(value) for name, value in self.options.items()})
            self._complete_references(spec)
            _check_references(self, spec)
            _check_map(self)
            _check_mask(self, spec)
            _check_extras(self, spec)
            _check_options(self, spec)
        except ValueError as error:
            raise ValueError(f"Match {self.name!r}: {error}") from None

    @property
    def asks_teacher(self) -> bool:
        """Whether it compares with the teacher; a domain loss compares the student's vectors with each other."""
        return self.teacher is not None

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        check_weight("weight", self.weight)
        check_window("active", self.active)
        check_weight_schedule("weight_schedule", self.weight_schedule)
        check_choice("heads", self.heads, ("strict", "mean", "relation"))
        check_choice("length", self.length, ("strict", "interpolate"))
        check_choice("reduction", self.reduction, ("token_mean", "sample_mean", "reference"))
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options={self.options!r} is no mapping. Write {{option: value}}.")
        for name, part in (("map", LayerMap), ("projection", Projection)):
            if not isinstance(value := getattr(self, name), part):
                raise ValueError(f"{name}={value!r} is no {part.__name__}. Write {part.__name__}(...).")
        for side, feature in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(feature, Feature) and (side == "student" or feature is not None):
                raise ValueError(f"{side}={feature!r} is no Feature. Write parse_feature('hidden[*]').")
            if feature is not None and parse_feature(str(feature)) != feature:
                raise ValueError(f"{side}={feature!r} is nothing that can be written. Use parse_feature.")

    def _complete_references(self, spec: LossSpec) -> None:
        """Fills in what is left out, so that equal terms are equal."""
        if _is_open(self.student):
            self._set(student=replace(self.student, every=True))
        if spec.item == "pair" and self.mask == "pairs":
            self._set(mask="tokens")
        if spec.feature == "domain":
            return
        if self.teacher is None or _is_open(self.teacher):
            self._set(teacher=replace(self.teacher or self.student, layer=None, every=False))


def _is_open(feature: Feature | None) -> bool:
    """Whether a map must say which layers are meant."""
    return feature is not None and feature.kind != MODULE and feature.layer is None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _check_references(match: MatchTerm, spec: LossSpec) -> None:
    if spec.feature not in _REFERENCES:
        raise ValueError(
            f"{match.loss} compares {spec.feature}, which have a term of their own: logits: {{loss: ...}}."
        )
    kinds, examples = _REFERENCES[spec.feature]
    for side, feature in (("student", match.student), ("teacher", match.teacher)):
        if feature is None:
            continue
        pooled = feature.pooling is not None
        fits = {"tokens": not pooled, "batch": pooled, "domain": pooled}.get(spec.feature, True)
        if feature.kind not in kinds or not (fits or (feature.kind == MODULE and not pooled)):
            raise ValueError(f"{side} is '{feature}', but {match.loss} compares {spec.feature} features: {examples}.")
    student, teacher = match.student, match.teacher
    if teacher is None:
        return
    if student.is_attention and spec.feature == "relation" and student.kind != teacher.kind:
        raise ValueError(f"'{student}' and '{teacher}' are not of one kind. Relate {student.kind} to {student.kind}.")
    if MODULE not in (student.kind, teacher.kind) and bool(student.pooling) != bool(teacher.pooling):
        raise ValueError(f"Only one of '{student}' and '{teacher}' is pooled. Pool both, or neither.")


def _check_map(match: MatchTerm) -> None:
    student, teacher, strategy = match.student, match.teacher, match.map.strategy
    given = match.map != LayerMap()
    if teacher is None:
        if given:
            raise ValueError("map pairs layers with the teacher's, but a domain loss has no teacher. Drop it.")
        return
    if not (_is_open(student) or _is_open(teacher)):
        if given:
            raise ValueError(f"'{student}' and '{teacher}' already are one pair of layers. Drop map.")
        return
    if MODULE in (student.kind, teacher.kind):
        raise ValueError(f"'{student}' and '{teacher}': a module is one, so name one layer on the other side.")
    if not _is_open(teacher):
        raise ValueError(
            f"'{student}' leaves its layers open and '{teacher}' names one. Leave both open and write the pairs, "
            f"map: [[1, {teacher.layer}], [2, {teacher.layer}]], or name one student layer."
        )
    if strategy == EXPLICIT_MAP and not _is_open(student):
        raise ValueError(f"map has pairs, but '{student}' names its layer already. Write {student.kind}[*].")
    if strategy == "attention" and student.pooling is None:
        raise ValueError(f"map attention (ALP-KD) weighs pooled vectors. Write pooled(cls)@{student}.")


def _check_mask(match: MatchTerm, spec: LossSpec) -> None:
    if match.mask is None:
        return
    if not (isinstance(match.mask, str) and match.mask.startswith(_BATCH_MASK)):
        check_choice("mask", match.mask, (*MASKS, *(("pairs",) if spec.item == "pair" else ()), "batch:<column>"))
    if match.mask in (_BATCH_MASK, "batch:<column>"):
        raise ValueError(f"mask={match.mask!r} names no column. Write batch: and the name of a column of the batch.")


def _check_extras(match: MatchTerm, spec: LossSpec) -> None:
    if spec.feature == "domain" and (match.teacher is not None or not match.domain):
        raise ValueError(
            f"{match.loss} compares the student's vectors of two domains: give domain, the batch's column that is 1 "
            "for the target domain, and no teacher."
        )
    vectors = ("hidden", "tokens", "batch")
    extras = {
        "domain": (match.domain is not None, ("domain",)),
        "heads": (match.heads != "strict", ("attention", "relation")),
        "length": (match.length != "strict", ("hidden",)),
        "projection": (match.projection != Projection(), vectors),
    }
    for name, (given, features) in extras.items():
        if given and spec.feature not in features:
            raise ValueError(
                f"{name} is read by losses of {' and '.join(features)} features, but {match.loss} compares "
                f"{spec.feature} features. Drop it."
            )
    if match.heads == "mean" and spec.feature == "relation":
        raise ValueError("heads='mean' averages scores, and relations have their own heads. Use heads: relation.")
    if match.projection != Projection() and match.projection.when != "always" and spec.feature != "hidden":
        raise ValueError(f"{match.loss} takes vectors of any width: project them by when: always, or not at all.")
    if match.length != "strict" and match.student.pooling is not None:
        raise ValueError(f"length={match.length!r} is about positions, but '{match.student}' has none. Drop it.")


def _check_options(match: MatchTerm, spec: LossSpec) -> None:
    keywords = inspect.signature(spec.function).parameters.values()
    known: dict[str, Any] = {
        parameter.name: parameter.default
        for parameter in keywords
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _FROM_THE_BATCH
    }
    required = [name for name, default in known.items() if default is inspect.Parameter.empty]
    if spec.feature == "relation" or match.heads == "relation":
        known.setdefault(_RELATION_HEADS, 1)
    for name, value in match.options.items():
        if name not in known:
            raise ValueError(
                f"options: {match.loss} takes no {name!r}.{did_you_mean(name, known)} It takes "
                f"{', '.join(known) or 'none'}."
            )
        if is_number(known[name]) and not is_number(value):
            raise ValueError(f"options: {name}={value!r}, but it must be a number such as {known[name]}.")
    if missing := [name for name in required if name not in match.options]:
        raise ValueError(f"options: {match.loss} needs {', '.join(missing)}.")
    heads = match.options.get(_RELATION_HEADS, 1)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"options: relation_heads={heads!r}, but it is a number of heads: a whole number >= 1.")
