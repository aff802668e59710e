"""Models given by name or path: the right Auto class, found through the other model of the pair."""

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModelForTextEncoding, PreTrainedModel

from hf_distill.models.heads import auto_class_name, task_model
from hf_distill.models.loading import load_as_saved, named, read_config

# What builds a model without a head.
_HEADLESS = "AutoModel"


def load_teacher(name: str, student: nn.Module | None, init_kwargs: Any = None) -> PreTrainedModel:
    """The teacher `name` with the student's kind of head, in the dtype it was saved in.

    Args:
        name: a Hub name or a local folder.
        student: whose head decides the Auto class; None where the student is a name too: the teacher is the one that
            was trained for the task, so its own head decides then.
        init_kwargs: dict or None, arguments of `from_pretrained`, such as `dtype`, `device_map`, `revision`.

    Raises:
        ValueError: no Auto class builds models like the student, or nothing says which head the teacher has.
        NotLoadedError: nothing is found under the name.
    """
    kwargs = {"dtype": "auto", **(init_kwargs or {})}
    if student is None:
        return load_as_saved(name, kwargs, argument="teacher_model")
    auto_class = auto_class_name(student)
    if auto_class is None:
        raise ValueError(
            f"teacher_model={name!r} is a name, but no Auto class builds models like the student "
            f"({type(task_model(student)).__name__}). Load the teacher yourself and pass the module."
        )
    with named("teacher_model", name):
        loader = _loader(auto_class, name, kwargs)
        teacher, info = loader.from_pretrained(name, **kwargs, output_loading_info=True)
    if auto_class == _HEADLESS and {key.split(".")[0] for key in info["missing_keys"]} == {"pooler"}:
        teacher.pooler = None  # noise, as language models are saved without; so it is with add_pooling_layer=False
    elif info["missing_keys"]:
        raise ValueError(
            f"teacher_model={name!r} has no weights for {', '.join(sorted(info['missing_keys']))}: as "
            f"{type(teacher).__name__} it would teach noise. Fine-tune it for the task first, or load it yourself and "
            "pass the module."
        )
    return teacher


def load_student(name: str, teacher: nn.Module | None, init_kwargs: Any = None) -> PreTrainedModel:
    """The student `name` with the teacher's kind of head and labels, or with its own where the teacher is no module.

    Args:
        name: a Hub name or a local folder.
        teacher: the teacher if it is loaded already.
        init_kwargs: dict or None, arguments of `from_pretrained`.

    Raises:
        ValueError: neither the teacher nor the student's config says which head to load.
        NotLoadedError: nothing is found under the name.
    """
    kwargs = dict(init_kwargs or {})
    if teacher is not None and (auto_class := auto_class_name(teacher)) is not None:
        config = task_model(teacher).config
        if "num_labels" not in kwargs and "id2label" not in kwargs and _names_labels(auto_class):
            kwargs |= {"id2label": config.id2label, "label2id": config.label2id}
        with named("model", name):
            return _loader(auto_class, name, kwargs).from_pretrained(name, **kwargs)
    return load_as_saved(name, kwargs, argument="model")


def _loader(auto_class: str, name: str, kwargs: Mapping[str, Any]) -> Any:
    """The Auto class; without a head that of encoders alone, where the model saved under `name` has a decoder too."""
    alone = auto_class == _HEADLESS and type(read_config(name, kwargs)) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return AutoModelForTextEncoding if alone else getattr(transformers, auto_class)


def _names_labels(auto_class: str) -> bool:
    return auto_class.endswith("Classification")
