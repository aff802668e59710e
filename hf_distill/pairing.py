"""How a student and its teacher fit together: checked once, before the first step."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.alignment import is_extension, label_order, ordered_classes, shared_vocabulary
from hf_distill.models.heads import find_task, input_names, task_model
from hf_distill.signals import Task


@dataclass(frozen=True)
class ModelPair:
    """How the outputs of one student and one teacher line up.

    Attributes:
        task: what both heads predict.
        classes: how many leading classes both share, or None for all.
        order: (classes,) the teacher's index of each of the student's labels, or None where they agree.
        teacher_inputs: the names that the teacher's forward takes.
        teacher_only_inputs: those of them that only the teacher's forward takes, such as `token_type_ids`.
        problem_type: the kind of sequence classification by the configs, or None where they do not tell.
        needs_teacher_inputs: whether the teacher's tokens are others, so that the student's mean nothing to it.
    """

    task: Task
    classes: int | None
    order: Tensor | None
    teacher_inputs: frozenset[str]
    teacher_only_inputs: frozenset[str]
    problem_type: str | None = None
    needs_teacher_inputs: bool = False

    def align(
        self, student_logits: tuple[Tensor, ...], teacher_logits: tuple[Tensor, ...]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs of student and teacher logits of equal shape: one pair, or start and end scores.

        Raises:
            ValueError: the shapes differ, e.g. because the teacher read other tokens.
        """
        pairs = [
            (ordered_classes(student, order=None, classes=self.classes), teacher)
            for student, teacher in zip(
                student_logits, self.align_teacher(teacher_logits, student_logits[0].device), strict=True
            )
        ]
        for student, teacher in pairs:
            if student.shape != teacher.shape:
                raise ValueError(
                    f"The student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. "
                    "Item by item they must mean the same: give both the same tokens, frames or choices (teacher_* "
                    "columns with another length work for tasks with one prediction per row only), and no virtual "
                    "tokens to one of them (prompt tuning)."
                )
        return pairs

    def align_teacher(self, logits: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """The teacher's logits in the student's order of classes."""
        return tuple(ordered_classes(each.to(device), order=self.order, classes=self.classes) for each in logits)


def pair_models(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    student_tokenizer: Any | None = None,
    teacher_tokenizer: Any | None = None,
    device: torch.device | None = None,
) -> ModelPair:
    """The pairing of a student and a teacher.

    Args:
        student: a Transformers model with or without a head, PEFT or not.
        teacher: likewise; None where no teacher is asked.
        student_tokenizer: what the student's text was tokenized with, if known.
        teacher_tokenizer: the teacher's tokenizer, if known.
        device: where the pairing's index tensors live.

    Raises:
        ValueError: the teacher's head serves another task than the student's, or a student without a head cannot learn
            from it; its labels or its vocabulary are others.
    """
    if teacher is None:
        return ModelPair(find_task(student), None, None, frozenset(), frozenset())
    student_task, teacher_task = find_task(student), find_task(teacher)
    if student_task is Task.EMBEDDING:
        _check_embeds(teacher, teacher_task)
    elif student_task is not teacher_task:
        raise ValueError(
            f"The student ({type(task_model(student)).__name__}) does {student_task}, the teacher "
            f"({type(task_model(teacher)).__name__}) {teacher_task}. Logits compare only within one task: load the "
            "teacher with the student's kind of head."
        )
    student_config, teacher_config = task_model(student).config, task_model(teacher).config
    order, classes = None, None
    student_tokens, teacher_tokens = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    if student_task.has_named_labels:
        order = _label_order(student_config, teacher_config)
    elif student_task.is_language_model:
        classes = _shared_classes(student_config, teacher_config, student_tokens, teacher_tokens)
    return ModelPair(
        task=student_task,
        classes=classes,
        order=None if order is None else torch.tensor(order, device=device),
        teacher_inputs=input_names(teacher),
        teacher_only_inputs=input_names(teacher) - input_names(student),
        problem_type=None if student_task is Task.EMBEDDING else _problem_type(student_config, teacher_config),
        needs_teacher_inputs=not (student_tokens is None or teacher_tokens is None)
        and not is_extension(student_tokens, teacher_tokens),
    )


def _check_embeds(teacher: nn.Module, task: Task) -> None:
    """Refuses a teacher that cannot read a batch of texts alone; its head, if it has one, does not matter."""
    if task in (Task.SEQ2SEQ_LM, Task.MULTIPLE_CHOICE):
        raise ValueError(
            f"The student has no head, and the teacher ({type(task_model(teacher)).__name__}) does {task}: it reads "
            "more than the student's one text a row. Load it without its head: AutoModel, or AutoModelForTextEncoding "
            "for the encoder of an encoder-decoder model."
        )


def _problem_type(student_config: Any, teacher_config: Any) -> str | None:
    student, teacher = (getattr(config, "problem_type", None) for config in (student_config, teacher_config))
    if student is not None and teacher is not None and student != teacher:
        raise ValueError(
            f"The student's problem_type is {student}, the teacher's {teacher}: the same logits mean other things. "
            "Set both configs to what the labels are."
        )
    return student or teacher


def _shared_classes(
    student_config: Any,
    teacher_config: Any,
    student_tokens: Mapping[str, int] | None,
    teacher_tokens: Mapping[str, int] | None,
) -> int | None:
    sizes = [config.get_text_config(decoder=True).vocab_size for config in (student_config, teacher_config)]
    shared = shared_vocabulary(*sizes, student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    return None if sizes[0] == sizes[1] else shared


def _label_order(student_config: Any, teacher_config: Any) -> tuple[int, ...] | None:
    tables = [config.id2label for config in (student_config, teacher_config)]
    defaults = [_has_default_names(table) for table in tables]
    order = label_order(*tables)
    if defaults[0] != defaults[1] and len(tables[0]) > 1:
        named, unnamed = ("teacher", "student") if defaults[0] else ("student", "teacher")
        warnings.warn(
            f"Only the {named} names its labels; the {unnamed}'s {len(tables[0])} labels are taken to stand in the "
            f"same order. Set id2label and label2id of the {unnamed} to be sure.",
            stacklevel=2,
        )
    return order


def _has_default_names(table: Mapping[int, str]) -> bool:
    return all(str(name) == f"LABEL_{index}" for index, name in table.items())


def _tokens(tokenizer: Any | None) -> dict[str, int] | None:
    # A multimodal processor carries its tokenizer; an image processor or feature extractor has none.
    text: Any = getattr(tokenizer, "tokenizer", tokenizer)
    return text.get_vocab() if hasattr(text, "get_vocab") else None


def special_tokens(tokenizer: Any | None, device: torch.device) -> Tensor | None:
    """(any,) the ids of a tokenizer's special tokens, or None without a tokenizer. An unknown word is still a word."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids: Iterable[int] = getattr(tokenizer, "all_special_ids", ())
    # GPT-2 and its kin have one token for unknown, beginning and end.
    marks = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "cls", "pad")}
    unknown = {getattr(tokenizer, "unk_token_id", None)} - marks
    ids = [token for token in ids if token not in unknown]
    return torch.tensor(ids, device=device) if ids else None
