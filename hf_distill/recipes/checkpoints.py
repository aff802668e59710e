"""Whether a checkpoint is of the student that a recipe describes now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_distill.models.modules import lost_keys

_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_SHOWN = 3

Shape = tuple[int, ...]


def check_checkpoint(student: Any, folder: Path) -> None:
    """Refuses the weights of another student than the one that is to go on with them.

    Args:
        student: not wrapped; of a PEFT model its adapters are compared.
        folder: of a checkpoint, or of a saved student, without damage (`check_undamaged`); one without safetensors,
            as of shards of FSDP, is left to the trainer.

    Raises:
        ValueError: it is of another student, with some of what differs.
    """
    saved = _saved_shapes(folder)
    own = {name: tuple(value.shape) for name, value in _state(student).items()}
    different = [name for name in own if name in saved and own[name] != saved[name]]
    surplus = [name for name in saved if name not in own]
    missing = [name for name in own if name not in saved]
    if isinstance(student, PreTrainedModel):
        missing = lost_keys(student, missing)
    # Where both sides have names of their own, Transformers may save other names than it has in memory (experts).
    if not (surplus and missing) or len(surplus) == len(saved):
        different += missing + surplus
    if saved and different:
        raise ValueError(
            f"{folder} is of another student than the recipe's: {_listed(different, saved, own)}. Go on with the "
            "recipe that it was trained by, or begin in another arguments.output_dir."
        )


def _saved_shapes(folder: Path) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _state(student: Any) -> Mapping[str, Any]:
    return get_peft_model_state_dict(student) if isinstance(student, PeftModel) else student.state_dict()


def _listed(names: list[str], saved: Mapping[str, Shape], own: Mapping[str, Shape]) -> str:
    shown = [f"{name} is {saved.get(name, 'not')} there and {own.get(name, 'not')} here" for name in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more differ"] if len(names) > _SHOWN else []
    return "; ".join(shown + more)
