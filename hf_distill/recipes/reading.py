"""A recipe from a YAML file and from what the command line changes of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hf_distill.arguments import Seq2SeqDistillationTrainingArguments
from hf_distill.config.checks import check_choice, did_you_mean
from hf_distill.config.distillation import read_yaml
from hf_distill.config.language import check_keys
from hf_distill.presets import preset_names
from hf_distill.recipes.recipe import TASKS, DataPart, Recipe, StudentPart, TeacherPart
from hf_distill.recipes.values import converted, kinds_of
from hf_distill.report.baselines import BASELINES
from hf_distill.report.options import ReportOptions
from hf_distill.stage_plan import Stage

_PARTS: dict[str, Any] = {"data": DataPart, "student": StudentPart, "teacher": TeacherPart}
# What a section is, where a text stands in its place.
_SHORT = {"data": "train", "student": "name", "teacher": "name"}
# Of a report's options those that the training gives, and are no plain values.
_NOT_WRITTEN = (
    "processing_class",
    "teacher_processing_class",
    "data_collator",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "training",
    "progress",
)
_OF_A_STAGE = ("name", "distillation", "training", "teacher", "student")


def read_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with changes.

    Args:
        path: of the file.
        overrides: words of a command line, `--KEY VALUE` or `--KEY=VALUE`: a field of the training arguments
            (`--learning_rate 1e-4`) or a key of the recipe with dots (`--student.layers 3`). A key without a value is
            turned on.

    Raises:
        ValueError: no such file, no YAML, an unknown key or a value of another type, with where it stands and what
            may have been meant.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file. Relative paths begin at {Path.cwd()}.")
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_said(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        return recipe_of({} if values is None else values, read_overrides(overrides))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _said(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    return str(error) if mark is None or problem is None else f"line {mark.line + 1}: {problem}"


def recipe_of(values: Any, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """The recipe of plain values.

    Args:
        values: a mapping of its sections.
        overrides: keys with dots and values, which win.

    Raises:
        ValueError: as `read_recipe`.
    """
    check_keys(values, [field.name for field in fields(Recipe)], "")
    plain = {name: _section(name, value) for name, value in values.items()}
    for key, value in overrides:
        _change(plain, key, value)
    made: dict[str, Any] = {}
    for name, cls in _PARTS.items():
        if name not in plain and name != "teacher":
            raise ValueError(f"{name} is missing. A recipe has {', '.join(_PARTS)} and arguments.")
        made[name] = _read(cls, plain.pop(name, {}), name)
    arguments = _arguments(plain.pop("arguments", {}), "arguments")
    plain["report"] = _report(plain.get("report", False))
    recipe = Recipe(**made, arguments=arguments, **_converted(Recipe, plain, ""))
    if recipe.task is not None:
        check_choice("task", recipe.task, TASKS)
    _check_stages(recipe.stages)
    return recipe


def _section(name: str, value: Any) -> Any:
    return {_SHORT[name]: value} if name in _SHORT and not isinstance(value, Mapping) else value


def _read(cls: type, values: Any, path: str) -> Any:
    check_keys(values, [field.name for field in fields(cls)], path)
    return cls(**_converted(cls, values, path))


def _converted(cls: type, values: Mapping[str, Any], path: str) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {key: converted(value, hints[key], f"{path}.{key}" if path else key) for key, value in values.items()}


def _arguments(values: Any, path: str) -> dict[str, Any]:
    hints = argument_types()
    check_argument_names(values, path)
    return {
        name: converted(value, hints[name], f"{path}.{name}")
        for name, value in values.items()
        # Left empty, a field is not given, unless nothing is one of its values, as of max_length.
        if value is not None or type(None) in kinds_of(hints[name])
    }


def check_argument_names(values: Any, path: str) -> None:
    """Refuses what is no mapping from fields of the training arguments, of which there are too many to list."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} is {values!r}; expected a mapping with fields of DistillationTrainingArguments.")
    for key in values:
        if key not in argument_types():
            raise ValueError(
                f"{path}.{key}: unknown key.{did_you_mean(key, argument_types())} Known are the fields of "
                "DistillationTrainingArguments."
            )


@cache
def argument_types() -> dict[str, Any]:
    """The annotations of all training arguments; those of generation are read for text2text-generation alone."""
    cls: Any = Seq2SeqDistillationTrainingArguments
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _report(values: Any) -> Any:
    """The options of a report, checked now and not when the training is over."""
    if not isinstance(values, Mapping):
        return values
    names = [field.name for field in fields(ReportOptions) if field.name not in _NOT_WRITTEN]
    check_keys(values, names, "report")
    hints = get_type_hints(ReportOptions)
    options = {name: converted(value, hints[name], f"report.{name}") for name, value in values.items()}
    ReportOptions(**options)
    for name in options.get("baselines", ()):
        check_choice("report.baselines", name, BASELINES)
    return options


def _check_stages(stages: Any) -> None:
    if isinstance(stages, str):
        check_choice("stages", stages, preset_names())
        return
    for number, stage in enumerate(stages or ()):
        path = f"stages[{number}]"
        check_keys(stage, _OF_A_STAGE, path)
        if "name" not in stage:
            raise ValueError(f"{path} lacks a name.")
        check_argument_names(stage.get("training", {}), f"{path}.training")


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe lists, not by the name of a preset."""
    stages: Any = recipe.stages
    return [
        Stage(**{**stage, "training": _arguments(stage.get("training", {}), f"stages[{number}].training")})
        for number, stage in enumerate(stages)
    ]


def read_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Keys and YAML values of `--KEY VALUE`, `--KEY=VALUE` and `--KEY`, in their order.

    Raises:
        ValueError: a value without a key, or one that is no YAML.
    """
    return [(key, _value(key, text)) for key, text in _pairs(words)]


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    left = [*words]
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r} follows no key. Changes are written --KEY VALUE; lists as [0, 2], in quotes.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = left.pop(0) if left and not left[0].startswith("--") else "true"
        yield key.replace("-", "_"), text


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        if text[:1] in ("[", "{"):
            raise ValueError(f"--{key} {text!r} is no YAML ({_said(error)}).") from error
        return text


def _change(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets what a key with dots leads to."""
    first, *rest = key.split(".")
    sections = [field.name for field in fields(Recipe)]
    if first not in sections:
        if first not in argument_types():
            known = [*sections, *argument_types(), *_dotted()]
            raise ValueError(
                f"--{key}: unknown key.{did_you_mean(key, known)} Known are the recipe's ({', '.join(sections)}, with "
                "dots, as student.layers) and the fields of DistillationTrainingArguments."
            )
        first, rest = "arguments", [first, *rest]
    if not rest and first in _SHORT and not isinstance(value, Mapping):
        rest = [_SHORT[first]]
    if not rest:
        values[first] = value
        return
    place = values
    for name in [first, *rest[:-1]]:
        inner = place.get(name)
        place[name] = place = {**inner} if isinstance(inner, Mapping) else {}
    place[rest[-1]] = value


def _dotted() -> list[str]:
    hints = get_type_hints(Recipe)
    parts = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    return [f"{name}.{field.name}" for name, hint in parts.items() for field in fields(hint)]
