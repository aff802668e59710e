"""What a stage is, and what is wrong with a list of stages before the first of them trains."""

import dataclasses
import difflib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.config import DistillationConfig, with_flat_values
from hf_distill.config.flat import ATTENTION_MATCH, HIDDEN_MATCH
from hf_distill.presets import load_preset
from hf_distill.setup import check_teacher, check_trainer_arguments
from hf_distill.teachers import Teacher

PREVIOUS = "previous"
STAGES_FOLDER = "_stages"  # `push_to_hub` leaves out what begins with an underscore
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SOURCES = ("preset", "distillation_config")
_SHORT = tuple(inspect.signature(with_flat_values).parameters)[1:]  # the flat fields of the terms
_OF_THE_RUN = ("output_dir", "resume_from_checkpoint", "push_to_hub")
_GIVEN_OTHERWISE = ("model", "args", "teacher_model", "train_dataset", "model_init", "peft_config", "optimizers")
# Of a stage that began these may not change: with them a resumed run would end elsewhere than an uninterrupted one.
# Not the batch: 8 devices x 1 and 4 devices x 2 micro-batches are the same steps.
_DECISIVE = (
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "optim",
    "seed",
    "warmup_steps",
    "weight_decay",
)


@dataclass(frozen=True)
class Stage:
    """One training of a run of several.

    Attributes:
        name: names its folder and its part of the lineage: letters, digits, `.`, `_` and `-`.
        distillation: the terms, as `distillation_config` takes them (a `DistillationConfig`, a mapping or a file);
            None: those of the run's arguments.
        training: the fields of the run's arguments that differ, such as `num_train_epochs` or `learning_rate`.
        train_dataset: a data set, or its key in the run's; None: the run's.
        teacher: a model, its name or path, or a `Teacher`; `"previous"`: the student of the stage before; None: the
            run's teacher.
        student: None: the student of the stage before trains on (in the first stage the run's). Or a new student: a
            model, its name or path, or a function of the student of the stage before that returns a model.
        trainer_kwargs: the trainer's arguments that differ, such as `eval_dataset` or `data_collator`.
    """

    name: str
    distillation: str | os.PathLike | Mapping[str, Any] | DistillationConfig | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    train_dataset: Any = None
    teacher: PreTrainedModel | nn.Module | Teacher | str | os.PathLike | None = None
    student: PreTrainedModel | nn.Module | str | os.PathLike | Callable[[Any], nn.Module] | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            raise ValueError(
                f"A stage is called {self.name!r}, but a folder will be called so: begin with a letter or a digit, "
                "and use letters, digits, '.', '_' and '-'."
            )
        if _origin(self.teacher) == PREVIOUS and self.student is None:
            raise ValueError(
                f"Stage {self.name!r} has the student of the stage before as teacher and as student. Give it a "
                "student of its own: a model, its name or path, or a function such as copy.deepcopy, which gets that "
                "student."
            )


def preset_stages(name: str, **training: Any) -> tuple[Stage, ...]:
    """The stages of a preset with the paper's epochs and rates, to run as they are or changed (`dataclasses.replace`).

    Args:
        name: of the preset.
        training: fields of the arguments that win over the preset's in every stage, such as `num_train_epochs=3`;
            `layer_mapping` reaches the stages that map layers.

    Raises:
        ValueError: no preset is called so.
    """
    stages = []
    for stage in load_preset(name).stages:
        maps = any(match.name in (HIDDEN_MATCH, ATTENTION_MATCH) for match in stage.config.matches)
        given = {field: value for field, value in training.items() if maps or field != "layer_mapping"}
        stages.append(Stage(stage.name, distillation=stage.config, training={**stage.training, **given}))
    return tuple(stages)


def announced(name: str, stages: Sequence[Stage]) -> Sequence[Stage]:
    """The stages of a preset, after a warning of what they set in place of the run's arguments."""
    fields = [f"{stage.name}: {key}={value}" for stage in stages for key, value in stage.training.items()]
    if fields:
        warnings.warn(
            f"The preset {name!r} sets, whatever args say: {'; '.join(fields)}. For other values pass "
            f"preset_stages({name!r}, num_train_epochs=..., learning_rate=...) of hf_distill.stages.",
            stacklevel=3,
        )
    return stages


def stage_arguments(args: Any, stage: Stage, number: int) -> Any:
    """The run's arguments as they are in a stage, checked as arguments are; numbers count from 1.

    Each stage has a seed of its own, so that it begins alike whether the stages before it ran or were skipped.

    Raises:
        ValueError: with the stage's name.
    """
    names = [field.name for field in dataclasses.fields(args) if field.init]
    for name in stage.training:
        if name in _OF_THE_RUN or name.startswith("hub_"):
            raise ValueError(f"Stage {stage.name!r} sets {name}, which the whole run shares: set it in args.")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"Stage {stage.name!r} sets {name!r}, which {type(args).__name__} does not know."
                + (f" Did you mean {near[0]}?" if near else "")
            )
    changes = {**_terms_fields(args, stage), **stage.training}
    if "num_train_epochs" in changes:  # the run's max_steps would silently win
        changes.setdefault("max_steps", -1)
    if "metric_for_best_model" in changes:  # else it stays what was derived of the run's metric
        changes.setdefault("greater_is_better", None)
    changes.setdefault("seed", args.seed + number - 1)
    folder = Path(args.output_dir, STAGES_FOLDER, f"{number}-{stage.name}")
    changes |= {"output_dir": str(folder), "push_to_hub": False}
    with named(stage):
        return dataclasses.replace(args, **changes)


def _terms_fields(args: Any, stage: Stage) -> dict[str, Any]:
    """The fields that say what is minimised, as the run gave them, or none of them where the stage has its own."""
    if stage.distillation is not None:
        return {**dict.fromkeys((*_SHORT, *_SOURCES)), "distillation_config": stage.distillation}
    # A source of the stage's own takes the place of the run's, and not of the numbers that were filled in from it.
    sources = _SOURCES if any(name in stage.training for name in _SOURCES) else ()
    return {**dict.fromkeys(sources), **{name: None for name in _SHORT if name not in _given(args)}}


def _given(args: Any) -> list[str]:
    """The fields of the terms that the user gave, without those that the arguments filled in."""
    filled = args._filled
    return [
        name
        for name in (*_SHORT, *_SOURCES)
        if (value := getattr(args, name)) is not None and not (name in filled and filled[name] == value)
    ]


def stage_dataset(stage: Stage, train_dataset: Any) -> Any:
    """The data a stage trains on.

    Raises:
        ValueError: a key that is missing, or none where it takes one.
    """
    own = stage.train_dataset
    several = isinstance(train_dataset, Mapping)
    if own is not None and not isinstance(own, str):
        return own
    if isinstance(own, str) and several and own in train_dataset:
        return train_dataset[own]
    if own is None and train_dataset is not None and not several:
        return train_dataset
    known = f"train_dataset has {', '.join(map(str, train_dataset))}" if several else "train_dataset is one data set"
    if train_dataset is None:
        known = "there is no train_dataset"
    raise ValueError(f"Stage {stage.name!r} trains on {own!r}, but {known}. Name one of them, or pass a data set.")


def asked(args: DistillationTrainingArguments, stage: Stage) -> dict[str, Any]:
    """What of a stage may not change once it began, by name; `args` are the stage's."""
    key = stage.train_dataset if isinstance(stage.train_dataset, str) else None
    return {
        "name": stage.name,
        "teacher": _origin(stage.teacher),
        "student": PREVIOUS if stage.student is None else "own",
        "train_dataset": key or ("run" if stage.train_dataset is None else "own"),
        "distillation": args.distillation.to_dict(),
        **{name: getattr(args, name) for name in sorted({*_DECISIVE, *stage.training} - {*_SOURCES})},
    }


def _origin(teacher: Any) -> str:
    if teacher is None:
        return "run"
    return PREVIOUS if isinstance(teacher, str) and teacher == PREVIOUS else "own"


def plan_stages(
    stages: Sequence[Stage],
    args: DistillationTrainingArguments,
    *,
    model: Any,
    teacher_model: Any,
    train_dataset: Any,
    trainer_cls: type,
    trainer_kwargs: Mapping[str, Any],
) -> list[DistillationTrainingArguments]:
    """The arguments of each stage, once nothing is known to be wrong with any of them.

    Raises:
        ValueError: names that are not unique; arguments that cannot be, or that no stage reads; a missing student,
            teacher or data set.
        TypeError: something that is no stage, or an argument the trainer does not take.
    """
    _check_order(stages, model)
    arguments = [stage_arguments(args, stage, number) for number, stage in enumerate(stages, 1)]
    if all(stage.distillation is not None for stage in stages) and (unread := _given(args)):
        raise ValueError(
            f"args sets {', '.join(unread)}, but every stage has a distillation of its own, so nobody reads it. Set "
            "it in the stages (Stage.training), or drop it."
        )
    known = {name for cls in trainer_cls.__mro__ for name in _parameters(cls)}
    student = model
    for stage, own in zip(stages, arguments, strict=True):
        given = {**trainer_kwargs, **stage.trainer_kwargs}
        if reserved := [name for name in given if name in _GIVEN_OTHERWISE]:
            raise ValueError(
                f"Stage {stage.name!r} gets {', '.join(reserved)} as arguments of the trainer, but each stage has a "
                "student (Stage.student; with adapters by peft.get_peft_model), a teacher, data, and an optimizer "
                "and scheduler of its own (Stage.training)."
            )
        check_trainer_arguments(given, known)
        stage_dataset(stage, train_dataset)
        student = student if stage.student is None else stage.student
        # A name or a function may turn out to be a PEFT model, whose base teaches.
        if teacher_model is None and stage.teacher is None and _has_no_adapter(student):
            with named(stage):
                check_teacher(None, own)
    return arguments


def _check_order(stages: Sequence[Stage], model: Any) -> None:
    if not stages:
        raise ValueError("There are no stages to run: pass at least one, or train with the trainer itself.")
    if wrong := [stage for stage in stages if not isinstance(stage, Stage)]:
        raise TypeError(f"A stage is a {type(wrong[0]).__name__}, expected a Stage, as Stage('first', training=...).")
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several stages are called {', '.join(twice)}. Give each a name of its own.")
    if _origin(stages[0].teacher) == PREVIOUS:
        raise ValueError(
            f"Stage {names[0]!r} is the first: no student of a stage before it can teach. Name a teacher."
        )
    if stages[0].student is None and model is None:
        raise ValueError(f"Stage {names[0]!r} has no student. Pass model= to run_stages, or student= to the stage.")


def _parameters(cls: type) -> list[str]:
    return [*inspect.signature(vars(cls)["__init__"]).parameters] if "__init__" in vars(cls) else []


def _has_no_adapter(student: Any) -> bool:
    return isinstance(student, nn.Module) and not hasattr(student, "disable_adapter")


@contextmanager
def named(stage: Stage) -> Iterator[None]:
    """Errors within say which stage they are of."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Stage {stage.name!r}: {error}") from error
