"""A student whose adapters alone are trained: what `peft_config` means."""

import copy
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from hf_distill.models.heads import find_task, task_model
from hf_distill.signals import Task
from hf_distill.teachers import AdapterOffTeacher, Teacher

_TASK_TYPES = {
    Task.CAUSAL_LM: TaskType.CAUSAL_LM,
    Task.SEQ2SEQ_LM: TaskType.SEQ_2_SEQ_LM,
    Task.SEQUENCE_CLASSIFICATION: TaskType.SEQ_CLS,
    Task.TOKEN_CLASSIFICATION: TaskType.TOKEN_CLS,
    Task.QUESTION_ANSWERING: TaskType.QUESTION_ANS,
    Task.EMBEDDING: TaskType.FEATURE_EXTRACTION,
}
# A head that was trained with the body, as against one that is new for every set of labels.
_PRETRAINED = frozenset({Task.CAUSAL_LM, Task.SEQ2SEQ_LM, Task.MASKED_LM, Task.EMBEDDING})
# They reach the layers through the cache of keys and values, and add no position.
_WITHOUT_POSITIONS = frozenset({PeftType.PREFIX_TUNING, PeftType.CARTRIDGE})
# Ways to begin that take from the base what they give to the adapters (PEFT 0.21).
_CHANGE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# In the names of what `disable_adapter` turns off too, beside the weights of the adapters themselves.
_OFF_WITH_ADAPTERS = ("modules_to_save", "token_adapter", "prompt_encoder")


def check_peft_config(peft_config: Any, model: Any, teacher_model: Any) -> None:
    """Refuses what adapters cannot be made of, before the model is touched.

    Args:
        peft_config: what the trainer was given as such, not None.
        model: the student, or its name, or None.
        teacher_model: whatever teaches.

    Raises:
        TypeError: it is no config of PEFT.
        ValueError: the student has adapters already, or is the teacher's own object.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}, expected a config of PEFT, such as peft.LoraConfig(r=16)."
        )
    if model is not None and teacher_model is model:
        raise ValueError(
            "model and teacher_model are one object, into which peft_config puts the student's adapters. Pass "
            "teacher_model=None: then the student's base teaches, with the adapters off."
        )
    if isinstance(model, nn.Module):
        _check_bare(model)


def add_adapters(student: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """The student with new adapters, its own weights frozen; they are not copied. The config is left as it is.

    What the config leaves open follows the head: the task type, and, where heads are made new for a set of labels,
    that the head is trained and saved whole (PEFT itself thinks only of those called classifier, score or qa_outputs).

    Args:
        student: a Transformers model; it is changed in place.
        peft_config: the adapters.

    Raises:
        ValueError: the student has adapters already, or PEFT cannot put these into it or save them.
    """
    _check_bare(student)
    config: Any = copy.deepcopy(peft_config)
    model, task = task_model(student), find_task(student)
    # PEFT's classes for a task give every model `input_ids`.
    if config.task_type is None and model.main_input_name == "input_ids":
        config.task_type = _TASK_TYPES.get(task)
    if config.is_prompt_learning and config.task_type is None:
        raise ValueError(
            f"PEFT has no {config.peft_type.value} for {type(model).__name__} ({task}). Use LoRA (peft.LoraConfig)."
        )
    # Some have no such field.
    if getattr(config, "modules_to_save", ()) is None and task not in _PRETRAINED:
        targets = getattr(config, "target_modules", None)
        adapted = targets if isinstance(targets, list | set | tuple) else ()
        heads = [name for name in _head_names(model) if name not in adapted]
        config.modules_to_save = heads or None
    adapters: Any = get_peft_model(model, config)
    try:  # PEFT takes a speech model's head for that of a text model, and would stumble over it at the first save
        if model.main_input_name != "input_ids":
            get_peft_model_state_dict(adapters)
    except NotImplementedError as error:
        raise ValueError(
            f"PEFT cannot save adapters of the head of {type(model).__name__} ({error}). Name target_modules without "
            "the head."
        ) from error
    return adapters


def check_adapters(student: nn.Module, teacher: Teacher | None) -> None:
    """Refuses adapters with which the two cannot be compared; models without any pass.

    Args:
        student: PEFT or not.
        teacher: as the trainer asks it.

    Raises:
        ValueError: virtual tokens before the text where there is a prediction for each position; a base that is to
            teach with the adapters off, but was changed by them or is trained beside them.
    """
    _check_positions("student", student)
    if isinstance(teacher, AdapterOffTeacher):
        _check_base(student)
    elif teacher is not None:
        _check_positions("teacher", teacher.model)


def _check_positions(role: str, model: nn.Module) -> None:
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning or config.peft_type in _WITHOUT_POSITIONS:
        return
    task = find_task(model)
    if task in (Task.QUESTION_ANSWERING, Task.TOKEN_CLASSIFICATION) or task.is_language_model:
        raise ValueError(
            f"The {role} has {config.num_virtual_tokens} virtual tokens before its text ({config.peft_type.value}: "
            "prompt tuning), so its predictions cannot be compared position by position. Use LoRA, or prefix tuning, "
            "which adds no positions."
        )


def _check_base(student: Any) -> None:
    remedy = "Give the untouched base as teacher_model=, loaded apart"
    for config in student.peft_config.values():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
            raise ValueError(
                f"init_lora_weights={start!r} moves a part of the base's weights into the adapters, so with the "
                f"adapters off the base is no teacher. {remedy}, or begin with init_lora_weights=True."
            )
    marks = (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), *_OFF_WITH_ADAPTERS)
    trained = [name for name, value in student.named_parameters() if value.requires_grad]
    if of_base := [name for name in trained if not any(mark in name for mark in marks)]:
        raise ValueError(
            f"{len(of_base)} trained parameters are the base's own ({of_base[0]}, ...), so training would change the "
            f"teacher, which is the student with its adapters off. {remedy}, or freeze them (bias='none')."
        )


def _check_bare(student: nn.Module) -> None:
    if isinstance(student, PeftModel) or getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"The student has adapters already ({type(student).__name__}), and peft_config would put others beside "
            "them. Merge them first (model.merge_and_unload()), or train those it has: drop peft_config."
        )


def _head_names(model: Any) -> list[str]:
    """The modules with weights beside the body."""
    body = model.base_model
    beside = [(name, child) for name, child in model.named_children() if child is not body]
    return [] if body is model else [name for name, child in beside if any(True for _ in child.parameters())]
