"""A student made of its teacher: fewer layers, narrower, another architecture, fewer tokens."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_distill.models.student.axes import Kind, find_axes, read_widths, set_widths
from hf_distill.models.student.check import check_axes
from hf_distill.models.student.depth import (
    Layers,
    cut_alignment_heads,
    cut_depth,
    kept_layers,
    layer_lists,
    on_meta,
    teacher_name,
)
from hf_distill.models.student.fresh import new_model, saved_tensors
from hf_distill.models.student.layouts import LaidOut, to_layout
from hf_distill.models.student.report import Origin, StudentReport, count_parameters
from hf_distill.models.student.selection import INITS, Init, select
from hf_distill.models.student.source import source_model
from hf_distill.models.student.vocabulary import trim_vocabulary
from hf_distill.models.student.width import WidthCut, cut_config, has_fixed_head, new_widths


@dataclass(frozen=True)
class BuiltStudent:
    """A student, what it was made of, and its tokenizer.

    Attributes:
        model: the student, in evaluation mode, on the teacher's device and in its dtype; shares nothing with it.
        report: what was copied, cut and left new.
        tokenizer: the tokenizer that was given, or one of fewer tokens where a corpus was given; else None.
    """

    model: PreTrainedModel
    report: StudentReport
    tokenizer: Any | None = None


def build_student(
    teacher: nn.Module | str,
    *,
    layers: Layers | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    intermediate_size: int | None = None,
    init: Init = "slice",
    architecture: str | None = None,
    tokenizer: Any | None = None,
    corpus: Iterable[str] | None = None,
    seed: int = 0,
) -> BuiltStudent:
    """A student of a teacher's own kind or of another layout, with the teacher's weights wherever they fit.

    Args:
        teacher: a Transformers model, a Hub name or a local folder. It is not changed.
        layers: how many layers to keep, evenly spread with both ends (6 of 12: 0, 2, 4, 7, 9, 11), or which, counted
            from 0; for an encoder-decoder also a dict, such as {"decoder": 2}, which leaves the other stack whole.
        hidden_size: width of the residual stream; in models where it is heads x head size, heads go with it.
        heads: attention heads to keep, as wholes; key heads that several query heads share go in step.
        intermediate_size: width of the feed-forward layers.
        init: how a narrower student's weights are made: `slice` (the first features), `importance` (the heaviest),
            `svd` (the residual stream on its strongest directions); or `random`: nothing at all is copied.
        architecture: the `model_type` to copy into, e.g. "distilbert"; None keeps the teacher's.
        tokenizer: the teacher's fast tokenizer; needed with a corpus.
        corpus: texts; tokens that they do not need leave the vocabulary.
        seed: of the values of new weights, which come from the model's own initialisation.

    Raises:
        TypeError: the teacher is no Transformers model, or the tokenizer is not a fast one.
        ValueError: the teacher cannot be cut so, or options mean nothing together; says why and what would work.
    """
    widths = {"hidden_size": hidden_size, "heads": heads, "intermediate_size": intermediate_size}
    is_narrower = any(width is not None for width in widths.values())
    _check_options(init, is_narrower=is_narrower, has_corpus=corpus is not None, has_tokenizer=tokenizer is not None)
    source = source_model(teacher)
    laid_out = to_layout(source, architecture, seed=seed) if architecture else None
    base = laid_out.model if laid_out else source
    config, cut = _cut_width(base, init, widths) if is_narrower else (base.config, None)
    kept = kept_layers(layers, base.config) if layers is not None else {}
    lists = layer_lists(base, kept)
    student = new_model(type(base), cut_depth(config, kept) if kept else config, base, seed=seed)
    cut_alignment_heads(student, kept.get("decoder"), heads_stay=hidden_size is None and heads is None)
    origins = _copy(base, student, lists, cut) if init != "random" else {}
    report = _report(source, student, laid_out, origins, lists)
    report = replace(report, layers=kept if origins else {}, notes=report.notes + _notes(cut, init))
    if corpus is None:
        return BuiltStudent(student, report, tokenizer)
    return _with_fewer_tokens(student, report, tokenizer, corpus)


def _check_options(init: str, *, is_narrower: bool, has_corpus: bool, has_tokenizer: bool) -> None:
    if init not in INITS:
        raise ValueError(f"Unknown init {init!r}; choose from {', '.join(INITS)}.")
    if init in ("importance", "svd") and not is_narrower:
        raise ValueError(
            f"init={init!r} says how a narrower student is made, but none of hidden_size, heads and intermediate_size "
            "is given. Give one, or leave init out."
        )
    if has_corpus and not has_tokenizer:
        raise ValueError("A corpus says which tokens to keep, but of which tokenizer? Give tokenizer, too.")


def _cut_width(model: PreTrainedModel, init: str, wanted: Mapping[str, int | None]) -> tuple[Any, WidthCut | None]:
    """The narrower config, and how the weights are cut to it; None where they are not."""
    explicit = copy.deepcopy(model.config)
    widths = read_widths(explicit)
    set_widths(explicit, inner=widths.inner)
    if init == "random":
        return cut_config(explicit, new_widths(widths, **wanted, fixed_head=has_fixed_head(model, {}))), None
    kinds = {kind for kind in (Kind.HIDDEN, Kind.HEADS, Kind.INNER) if wanted[kind] is not None}
    if widths.is_tied and kinds & {Kind.HIDDEN, Kind.HEADS}:
        kinds |= {Kind.HIDDEN, Kind.HEADS}
    axes = find_axes(model, explicit, kinds)
    student = new_widths(widths, **wanted, fixed_head=has_fixed_head(model, axes))
    check_axes(model, axes, widths)
    config = cut_config(explicit, student)
    if lost := axes.keys() ^ on_meta(type(model), config).state_dict().keys():
        raise ValueError(
            f"At these widths {type(model).__name__} has another structure: {', '.join(sorted(lost))} would exist in "
            "teacher or student alone. Choose widths that keep apart what the teacher's keep apart."
        )
    return config, select(model, axes, widths, student, init)


@torch.no_grad()
def _copy(
    teacher: PreTrainedModel, student: PreTrainedModel, lists: Mapping[str, tuple[int, ...]], cut: WidthCut | None
) -> dict[str, Origin]:
    """Fills the student from the teacher; tells what came of each of the student's tensors that was filled."""
    source = teacher.state_dict()
    origins: dict[str, Origin] = {}
    for name, target in saved_tensors(student).items():
        origin = teacher_name(name, lists)
        if origin not in source:
            if target.dim() > 1 and any(name.startswith(f"{path}.") for path in lists):
                raise ValueError(
                    f"The teacher has no {origin} for the student's {name}: the student's layer "
                    "there would be of another kind than the teacher's (experts or attention that alternate by the "
                    "layer's number). Keep layers whose kinds follow the same pattern."
                )
            continue
        value = source[origin] if cut is None else cut.apply(origin, source[origin])
        if value.shape != target.shape:
            raise ValueError(
                f"The teacher's {origin} has shape {tuple(value.shape)} after the cut, the student's {name} "
                f"{tuple(target.shape)}. This part of {type(teacher).__name__} follows another rule than its config's "
                "layers and widths; cut something else."
            )
        target.copy_(value)
        origins[name] = Origin.COPIED if value.shape == source[origin].shape else Origin.CUT
    return origins


def _report(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    laid_out: LaidOut | None,
    origins: Mapping[str, Origin],
    lists: Mapping[str, tuple[int, ...]],
) -> StudentReport:
    base = laid_out.model if laid_out else teacher
    found = {}
    for name in saved_tensors(student):
        origin = origins.get(name, Origin.NEW)
        before = laid_out.origins[teacher_name(name, lists)] if laid_out and name in origins else Origin.COPIED
        found[name] = before if origin is Origin.COPIED or before is Origin.NEW else origin
    return StudentReport(
        teacher=type(teacher).__name__,
        student=type(student).__name__,
        teacher_parameters=count_parameters(teacher),
        student_parameters=count_parameters(student),
        origins=found,
        dropped=(laid_out.dropped if laid_out else ()) + _dropped(base, student, lists),
        notes=laid_out.notes if laid_out else (),
    )


def _dropped(
    teacher: PreTrainedModel, student: PreTrainedModel, lists: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """The teacher's tensors, but for those of layers left out, that have no place in the student."""
    used = {teacher_name(name, lists) for name in student.state_dict()}
    modules = dict(teacher.named_modules())
    left_out = tuple(
        f"{path}.{name}."
        for path, layers in lists.items()
        for name, _ in modules[path].named_children()
        if int(name) not in layers
    )
    return tuple(name for name in saved_tensors(teacher) if name not in used and not name.startswith(left_out))


def _notes(cut: WidthCut | None, init: str) -> tuple[str, ...]:
    if init == "random":
        return ("init='random': every weight is new",)
    return () if cut is None else (f"width cut by {init}: a start for training, not the teacher's function",)


def _with_fewer_tokens(
    student: PreTrainedModel, report: StudentReport, tokenizer: Any, corpus: Iterable[str]
) -> BuiltStudent:
    trimmed = trim_vocabulary(student, tokenizer, corpus)
    before, after = saved_tensors(student), saved_tensors(trimmed.model)
    origins = {
        name: Origin.CUT if after[name].shape != before[name].shape and origin is not Origin.NEW else origin
        for name, origin in report.origins.items()
    }
    note = f"vocabulary: {len(trimmed.kept):,} of {len(tokenizer):,} tokens"
    report = replace(
        report,
        origins=origins,
        student_parameters=count_parameters(trimmed.model),
        notes=(*report.notes, note),
    )
    return BuiltStudent(trimmed.model, report, trimmed.tokenizer)
