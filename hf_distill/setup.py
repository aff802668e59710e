"""From a user's arguments to a teacher, refusing what cannot work."""

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoTokenizer, TrainingArguments, set_seed
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from hf_distill.adapters import add_adapters, check_peft_config
from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.batches import TARGETS
from hf_distill.models.heads import task_model
from hf_distill.progress import check_coverage
from hf_distill.teachers import AdapterOffTeacher, LocalTeacher, Teacher, load_student, load_teacher


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
    check_coverage(terms)
    if args.world_size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"This is one of {os.environ['WORLD_SIZE']} launched processes, but the arguments make each train "
            "alone, all into one output_dir. On machines without a GPU add --use_cpu (use_cpu=True)."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run under DataParallel, whose replicas' means cannot be made "
            "exact. Start one process per GPU with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )
    parallelism = args.parallelism_config
    if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
        raise ValueError(
            "Tensor, context and sequence parallelism share one batch among ranks, whose items would be counted "
            "several times. Set tp_size, cp_size and sp_size to 1."
        )
    if args.use_liger_kernel and terms.logits.weight > 0:
        raise ValueError(
            "use_liger_kernel=True fuses the head with the task loss, so the student has no logits to compare. "
            "Set use_liger_kernel=False, or kd_weight=0."
        )


def check_trainer_arguments(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses keyword arguments that no trainer takes, with what was probably meant.

    Raises:
        TypeError: as Python would, but with the remedy.
    """
    known = [*known, "teacher_model", "teacher_processing_class", "peft_config"]
    meant = {"tokenizer": "processing_class", "teacher": "teacher_model"}
    for name in given:
        if name in known:
            continue
        if name in DistillationTrainingArguments.__dataclass_fields__:
            remedy = f"It belongs into args: DistillationTrainingArguments({name}=...)."
        else:
            nearest = [meant[name]] if name in meant else difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {nearest[0]}?" if nearest else f"Known: {', '.join(known)}."
        raise TypeError(f"The trainer has no argument {name!r}. {remedy}")


def check_label_names(label_names: Sequence[str]) -> None:
    """Refuses targets by names that no head supported here takes.

    Raises:
        ValueError: with the names that are known.
    """
    if label_names and not {*label_names} & {*TARGETS}:
        raise ValueError(
            f"label_names={[*label_names]}, but the labels of a distilled head are called {', '.join(TARGETS)}. "
            "Rename the columns, or set task_weight=0 to learn from the teacher alone."
        )


def make_student(
    model: Any, teacher_model: Any, args: DistillationTrainingArguments, peft_config: PeftConfig | None
) -> tuple[Any, Any]:
    """The student as a module, with adapters where they are asked for, and the teacher, loaded if its head is needed.

    Args:
        model: a module, a name or path, or None where `model_init` makes it.
        teacher_model: as the trainer takes it; where both are names it is loaded here.
        args: the seed, and how names are loaded.
        peft_config: the student's adapters.

    Raises:
        TypeError: `peft_config` is no config of PEFT.
        ValueError: a name that cannot be loaded, or adapters that cannot be added.
    """
    if peft_config is not None:
        check_peft_config(peft_config, model, teacher_model)
    is_name = isinstance(model, str | os.PathLike)
    if is_name and isinstance(teacher_model, str | os.PathLike):
        teacher_model = load_teacher(os.fspath(teacher_model), None, args.teacher_model_init_kwargs)
    if is_name or (model is not None and peft_config is not None):
        set_seed(args.seed)  # new weights are part of the run, and `Trainer` seeds too late for them
    if is_name:
        teacher_module = teacher_model if isinstance(teacher_model, nn.Module) else None
        model = load_student(os.fspath(model), teacher_module, args.model_init_kwargs)
    if model is not None:
        _check_student_whole(model)
    return model if model is None or peft_config is None else add_adapters(model, peft_config), teacher_model


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
        has_adapter = hasattr(student(), "disable_adapter")
        teacher = AdapterOffTeacher(student, autocast=autocast) if has_adapter else None
        check_teacher(teacher, args)
        return teacher
    if isinstance(teacher_model, str | os.PathLike):
        # Loading may draw random numbers, which the student's training must not depend on.
        with torch.random.fork_rng():
            teacher_model = load_teacher(teacher_model, student(), args.teacher_model_init_kwargs)
    if isinstance(teacher_model, nn.Module):
        _check_placed(teacher_model, processes=args.world_size)
        _check_apart(student(), teacher_model)
        return LocalTeacher(teacher_model, autocast=autocast)
    if callable(teacher_model) and hasattr(teacher_model, "place"):
        return teacher_model
    raise TypeError(
        f"teacher_model is a {type(teacher_model).__name__}, expected a Transformers model, its name or path, a "
        "hf_distill.teachers.Teacher, or None with a PEFT student."
    )


def check_teacher(teacher: Teacher | None, args: DistillationTrainingArguments) -> None:
    """Refuses a logit term without a teacher, be it one that was turned on since the trainer was made.

    Raises:
        ValueError: with the ways to give a teacher.
    """
    if teacher is None and args.distillation.logits.weight > 0:
        raise ValueError(
            f"kd_weight={args.kd_weight}, but there is no teacher. Pass teacher_model= (a module, a name or a path), "
            "give a PEFT student, whose base then teaches, or set kd_weight=0."
        )


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher that training the student would change."""
    if teacher is student or teacher is task_model(student):
        raise ValueError(
            "The teacher is the student: model and teacher_model are one object. Load the teacher apart, or, for the "
            "base of a PEFT student, pass teacher_model=None."
        )
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.requires_grad and id(p) in of_teacher]
    if shared:
        raise ValueError(
            f"{len(shared)} of the student's trained parameters are the teacher's own ({shared[0]}, ...), so training "
            "would change the teacher. Copy what the student takes over (copy.deepcopy), or freeze it in the student."
        )


def _check_student_whole(student: Any) -> None:
    """Refuses a student that `from_pretrained` took apart."""
    if getattr(task_model(student), "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "The student was sharded by from_pretrained (distributed_config), which is untested here, and whose "
            "processes may have to share a batch. Load it whole, and shard it with fsdp=True in the arguments."
        )


def _check_placed(teacher: nn.Module, *, processes: int) -> None:
    """Refuses a teacher whose weights this process lacks, or that is shared in a way that batches are not."""
    is_placed = getattr(teacher, "hf_device_map", None) is not None  # what it keeps elsewhere it fetches itself
    is_empty = not is_placed and any(parameter.is_meta for parameter in teacher.parameters())
    # ZeRO-3 marks the parameters that it has taken apart.
    if is_empty or any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher's weights are not on this process: it was loaded while FSDP (cpu_ram_efficient_loading) or "
            "DeepSpeed ZeRO-3 held weights back for a model that it shards, which is the student alone. Load the "
            "teacher before DistillationTrainingArguments is made and pass the module, or under FSDP set "
            "cpu_ram_efficient_loading to false."
        )
    if getattr(task_model(teacher), "is_distributed_loading_by_transformers", False):
        batches = task_model(teacher).config.distributed_config.dp_size
        if batches != processes:
            raise ValueError(
                f"The teacher's distributed_config takes {batches} batches at once, but each of the {processes} "
                f"processes has a batch of its own. Shard it with DistributedConfig(fsdp_size={processes}) alone."
            )


def teacher_tokenizer(teacher_model: Any, teacher: Teacher, processing_class: Any | None) -> Any | None:
    """The tokenizer that came with the teacher, where one can be found and there is another to compare it with."""
    if isinstance(teacher, AdapterOffTeacher):
        return processing_class
    model = task_model(teacher.model)
    name = teacher_model if isinstance(teacher_model, str | os.PathLike) else model.name_or_path
    # Some tokenizer classes make up an empty one where none was saved with the model.
    if processing_class is None or not name or not get_tokenizer_config(name):
        return None
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # saved without one: then equal sizes are all there is to go by
        return None
