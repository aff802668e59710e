"""Methods from papers as recipes: YAML data beside this file, one a paper."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from hf_distill.config import ALWAYS, DistillationConfig
from hf_distill.config.checks import check_choice, is_number
from hf_distill.config.distillation import read_yaml
from hf_distill.config.language import check_keys
from hf_distill.schedules import Schedule
from hf_distill.temperature import ScheduledTemperature


@dataclass(frozen=True)
class PresetStage:
    """One stage of a preset.

    Attributes:
        name: what it is called.
        config: its terms.
        share: the part of the training that it takes where all stages are one training.
        training: the training arguments that the paper gives, for a training of its own.
    """

    name: str
    config: DistillationConfig
    share: float = 1.0
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        name: as in `preset=`.
        title: what the authors call it.
        paper: authors, year and arXiv number.
        notes: what it minimises, where its numbers come from, and where it differs from the paper.
        stages: one or more, in order.
    """

    name: str
    title: str
    paper: str
    notes: str
    stages: tuple[PresetStage, ...]

    def __post_init__(self) -> None:
        shares = [stage.share for stage in self.stages]
        if not all(is_number(share) and share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(
                f"The shares of the stages of {self.name!r} are {shares}; they must be > 0 and add up to 1."
            )

    def config(self) -> DistillationConfig:
        """All stages as one training: every term is on in its stages' shares of the training.

        Raises:
            ValueError: a term changes between stages, or pauses, so that only separate trainings can do it.
        """
        merged: dict[str, Any] = {}
        start = 0.0
        for number, stage in enumerate(self.stages, 1):
            end = 1.0 if number == len(self.stages) else start + stage.share
            for name, term in stage.config.terms.items():
                if term.weight == 0:
                    continue
                first, last = (end if bound == 1 else start + (end - start) * bound for bound in term.active)
                term = _within(term, start, end)
                before = merged.get(name)
                if before is None:
                    merged[name] = replace(term, active=(first, last))
                elif replace(before, active=ALWAYS) == replace(term, active=ALWAYS) and before.active[1] == first:
                    merged[name] = replace(before, active=(before.active[0], last))
                else:
                    raise ValueError(
                        f"The term {name!r} of {self.name!r} changes or pauses between its stages, which one training "
                        "cannot do. Run the stages one by one, as a staged distillation does."
                    )
            start = end
        fixed = {field_name: merged.pop(name) for name, field_name in _TERM_FIELDS.items() if name in merged}
        return DistillationConfig(**fixed, matches=tuple(merged.values()))


def _within(term: Any, start: float, end: float) -> Any:
    """The term with all that is scheduled in it in a part of the training."""
    changes: dict[str, Any] = {}
    for name in ("weight_schedule", "teacher_scale", "temperature"):
        value = getattr(term, name, None)
        if isinstance(value, Schedule):
            changes[name] = value.within(start, end)
        elif isinstance(value, ScheduledTemperature):
            changes[name] = ScheduledTemperature(value.schedule.within(start, end))
    return replace(term, **changes) if changes else term


_TERM_FIELDS = {"task": "task", "kd": "logits"}
_PRESET_KEYS = ("name", "title", "paper", "notes", "stages")
_STAGE_KEYS = ("name", "share", "terms", "training")


def preset_names() -> tuple[str, ...]:
    """Every preset, in the order of the alphabet."""
    return tuple(
        sorted(file.name.removesuffix(".yaml") for file in files(__name__).iterdir() if _is_recipe(file.name))
    )


def load_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message names the nearest and all known ones.
    """
    check_choice("preset", name, preset_names())
    values = read_yaml((files(__name__) / f"{name}.yaml").read_text(encoding="utf-8"))
    check_keys(values, _PRESET_KEYS, name)
    return Preset(**{**values, "stages": tuple(_read_stage(stage, name) for stage in values["stages"])})


def _is_recipe(file: str) -> bool:
    return file.endswith(".yaml")


def _read_stage(values: Any, preset: str) -> PresetStage:
    check_keys(values, _STAGE_KEYS, f"{preset}.stages")
    given = {key: value for key, value in values.items() if key != "terms"}
    return PresetStage(config=DistillationConfig.from_dict(values["terms"]), **given)
