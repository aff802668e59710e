"""The models of a report by name: trained ones, with the head and the labels that they were saved with."""

import os
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from hf_distill.alignment import is_unnamed
from hf_distill.models.heads import task_model
from hf_distill.models.loading import load_as_saved, read_config
from hf_distill.run_record import RunRecord, record_path
from hf_distill.teachers import Teacher, load_student, load_teacher


def load_models(student: Any, teacher: Any) -> tuple[nn.Module, nn.Module | Teacher]:
    """Student and teacher; those given by name or path are loaded in the dtype they were saved in.

    Raises:
        ValueError: a name of something without a head, or without weights for it.
        TypeError: something else than a model or a name.
    """
    if is_name(student) and is_name(teacher):
        teacher = load_teacher(os.fspath(teacher), None)
    if is_name(student):
        like = teacher if isinstance(teacher, nn.Module) else teacher.model
        student = load_trained(student, "student", like=like)
    if is_name(teacher):
        teacher = load_teacher(os.fspath(teacher), student)
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and not (role == "teacher" and hasattr(model, "place")):
            raise TypeError(f"{role} is a {type(model).__name__}; expected a Transformers model, its name or path.")
    return student, teacher


def load_trained(name: str | os.PathLike, argument: str, *, like: nn.Module) -> nn.Module:
    """A trained model, or adapters on their base, by name or path.

    Args:
        name: a Hub name or a local folder.
        argument: what the caller's argument is called, for the error.
        like: whose kind of head the base of adapters gets.

    Raises:
        ValueError: its config names no class, or its head has no weights.
    """
    name = os.fspath(name)
    kwargs: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        if not base:
            raise ValueError(f"{argument}={name!r} holds adapters and does not say of which model. Load it yourself.")
        config: Any = read_config(base, kwargs)
        if config.id2label and not is_unnamed(config.id2label):  # a head whose classes have names is in their order
            kwargs |= {"id2label": config.id2label, "label2id": config.label2id}
        inner, info = cast(Any, load_student(base, like, kwargs))
        model: Any = PeftModel.from_pretrained(inner, name)
    else:
        model, info = cast(Any, load_as_saved(name, kwargs, argument=argument))
    # A head that was trained beside adapters is saved with them.
    saved = [part for part, module in task_model(model).named_modules() if isinstance(module, ModulesToSaveWrapper)]
    known = (*(f"{part}." for part in saved), "pooler.")
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(known))
    if missing:
        raise ValueError(
            f"{argument}={name!r} has no weights for {', '.join(missing)}: as {type(model).__name__} it would be "
            "measured with noise. Name the trained model, or load it yourself and pass the module."
        )
    return model


def load_processing_class(source: Any) -> Any | None:
    """What pads the inputs of a model given by name, where it was saved with it."""
    if not is_name(source):
        return None
    name = os.fspath(source)
    try:
        loader: Any = AutoTokenizer if get_tokenizer_config(name) else AutoProcessor
        return loader.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # saved without: batches are then stacked as they are
        return None


def read_run_record(source: Any) -> dict[str, Any] | None:
    """The record of the run that trained a model given by its folder, if it has one."""
    is_there = is_name(source) and record_path(source).is_file()
    return RunRecord.read(source).to_dict() if is_there else None


def is_name(model: Any) -> bool:
    """Whether a model is given by a name or a path."""
    return isinstance(model, str | os.PathLike)
