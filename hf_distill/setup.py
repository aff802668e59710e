"""From a user's arguments to a teacher, refusing what cannot work."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.models.heads import find_task, task_model
from hf_distill.teachers import AdapterOffTeacher, LocalTeacher, Teacher, load_teacher


def check_arguments(args: TrainingArguments, expected: type[DistillationTrainingArguments]) -> None:
    """Refuses arguments with which no step would be right.

    Raises:
        TypeError: `args` is of another class.
        ValueError: several GPUs in one process; Liger's fused loss; weights or a temperature changed to invalid ones.
    """
    if not isinstance(args, expected):
        raise TypeError(
            f"args is a {type(args).__name__}, expected {expected.__name__}: it takes the same fields and the "
            "distillation's. Change the class name where you build it."
        )
    terms = args.distillation
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run under DataParallel, whose replicas' means cannot be made "
            "exact. Start one process per GPU with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.use_liger_kernel and terms.logits.weight > 0:
        raise ValueError(
            "use_liger_kernel=True fuses the head with the task loss, so the student has no logits to compare. "
            "Set use_liger_kernel=False, or kd_weight=0."
        )


def make_teacher(
    teacher_model: nn.Module | Teacher | str | None,
    *,
    student: Callable[[], nn.Module],
    args: DistillationTrainingArguments,
    autocast: Callable[[], AbstractContextManager],
) -> Teacher | None:
    """The teacher that `teacher_model` stands for, or None where no term asks one.

    Raises:
        ValueError: no teacher is given, a term needs one, and the student has no adapters to turn off.
        TypeError: `teacher_model` is nothing that teaches.
    """
    if teacher_model is None:
        if hasattr(student(), "disable_adapter"):
            return AdapterOffTeacher(student, autocast=autocast)
        if args.distillation.logits.weight == 0:
            return None
        raise ValueError(
            f"kd_weight={args.kd_weight}, but there is no teacher. Pass teacher_model= (a module, a name or a path), "
            "give a PEFT student, whose base then teaches, or set kd_weight=0."
        )
    if isinstance(teacher_model, str | os.PathLike):
        # Loading may initialise a head at random: the student's training must not depend on that.
        with torch.random.fork_rng():
            teacher_model = load_teacher(teacher_model, student(), args.teacher_model_init_kwargs)
    if teacher_model is student():
        raise ValueError(
            "The teacher is the student: model and teacher_model are one object. Load the teacher apart, or, for the "
            "base of a PEFT student, pass teacher_model=None."
        )
    if isinstance(teacher_model, nn.Module):
        return LocalTeacher(teacher_model, autocast=autocast)
    if callable(teacher_model) and hasattr(teacher_model, "place"):
        return teacher_model
    raise TypeError(
        f"teacher_model is a {type(teacher_model).__name__}, expected a Transformers model, its name or path, a "
        "hf_distill.teachers.Teacher, or None with a PEFT student."
    )


def teacher_tokenizer(teacher_model: Any, teacher: Teacher, processing_class: Any | None) -> Any | None:
    """The tokenizer that came with the teacher, where vocabularies are compared and one can be found, else None."""
    if isinstance(teacher, AdapterOffTeacher):
        return processing_class
    model = task_model(teacher.model)
    name = teacher_model if isinstance(teacher_model, str | os.PathLike) else model.name_or_path
    if processing_class is None or not name or not find_task(model).is_language_model:
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):  # saved without one: then equal sizes are all there is to go by
        return None
