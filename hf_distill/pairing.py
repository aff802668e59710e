"""How a student and its teacher fit together: checked once, before the first step."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_distill.alignment import VocabularyOverlap, is_extension, label_order, ordered_classes, vocabulary_overlap
from hf_distill.models.heads import find_task, input_names, task_model
from hf_distill.shared_tokens import SharedTokens, cut_otherwise
from hf_distill.signals import Task

logger = logging.get_logger(__name__)
LogitPairs = list[tuple[Tensor, Tensor]]


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
        vocabulary: of language models, what of the vocabularies is compared and what only one of them has.
        shared_tokens: the classes that spell the same, where positions are aligned by the text; else None.
    """

    task: Task
    classes: int | None
    order: Tensor | None
    teacher_inputs: frozenset[str]
    teacher_only_inputs: frozenset[str]
    problem_type: str | None = None
    needs_teacher_inputs: bool = False
    vocabulary: VocabularyOverlap | None = None
    shared_tokens: SharedTokens | None = None

    def align(
        self,
        student_logits: tuple[Tensor, ...],
        teacher_logits: tuple[Tensor, ...],
        *,
        positions: Tensor | None = None,
        any_classes: bool = False,
    ) -> LogitPairs:
        """Pairs of student and teacher logits of equal shape: one pair, or start and end scores.

        Args:
            student_logits: (batch, ..., classes) each.
            teacher_logits: likewise, of the teacher's tokens where positions are aligned by the text.
            positions: (batch, length) the teacher's position for each of the student's, where they are aligned by the
                text; what stands at one below 0 means nothing.
            any_classes: whether the loss then compares all tokens of both, which are different numbers of classes,
                and not those that spell the same.

        Raises:
            ValueError: the shapes differ, e.g. because the teacher read other tokens.
        """
        if positions is not None and self.shared_tokens is not None:
            ((student,), (teacher,)) = student_logits, teacher_logits
            places = positions.clamp(min=0).unsqueeze(-1)
            teacher = teacher.to(student.device).take_along_dim(places, 1)
            shared = self.shared_tokens
            return [shared.all_tokens(student, teacher) if any_classes else shared.compared(student, teacher)]
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

    def choices(self, pairs: LogitPairs, *, any_classes: bool = False) -> LogitPairs:
        """Of aligned pairs the classes that mean the same on both sides; none where there are no such."""
        if self.shared_tokens is None:
            return pairs
        count = len(self.shared_tokens.student)
        return [] if any_classes else [(student[..., :count], teacher[..., :count]) for student, teacher in pairs]

    def align_teacher(self, logits: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """The teacher's logits in the student's order of classes."""
        return tuple(ordered_classes(each.to(device), order=self.order, classes=self.classes) for each in logits)


def pair_models(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    student_tokenizer: Any | None = None,
    teacher_tokenizer: Any | None = None,
    token_alignment: str = "none",
    any_classes: bool = False,
    device: torch.device | None = None,
) -> ModelPair:
    """The pairing of a student and a teacher.

    Args:
        student: a Transformers model with or without a head, PEFT or not.
        teacher: likewise; None where no teacher is asked.
        student_tokenizer: what the student's text was tokenized with, if known.
        teacher_tokenizer: the teacher's tokenizer, if known.
        token_alignment: "offsets" where positions are aligned by the text that they have read, else "none".
        any_classes: whether the loss then compares all tokens of both, so that none is left out.
        device: where the pairing's index tensors live.

    Raises:
        ValueError: the teacher's head serves another task than the student's, or a student without a head cannot learn
            from it; its labels or its vocabulary are others, and positions are not, or cannot be, aligned by the text.
    """
    if teacher is None:
        return ModelPair(find_task(student), None, None, frozenset(), frozenset())
    student_task = find_task(student)
    _check_tasks(student, teacher)
    student_config, teacher_config = task_model(student).config, task_model(teacher).config
    order, vocabulary, shared_tokens = None, None, None
    student_tokens, teacher_tokens = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    if student_task.has_named_labels:
        order = _label_order(student_config, teacher_config)
    sizes = _vocabulary_sizes(student_config, teacher_config) if student_task.is_language_model else (0, 0)
    if token_alignment != "none":
        tokenizers = _text_tokenizer(student_tokenizer), _text_tokenizer(teacher_tokenizer)
        shared_tokens, vocabulary = _align_by_text(student_task, *tokenizers, sizes=sizes, device=device)
    elif student_task.is_language_model:
        vocabulary = vocabulary_overlap(*sizes, student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    if shared_tokens is None or not any_classes:
        _report(vocabulary)
    has_own_ids = _has_own_ids(student_tokens, teacher_tokens)
    if token_alignment == "none" and not has_own_ids:
        _warn_of_other_cuts(student_tokenizer, teacher_tokenizer)
    return ModelPair(
        task=student_task,
        classes=None if vocabulary is None or vocabulary.is_whole or vocabulary.by_text else vocabulary.classes,
        order=None if order is None else torch.tensor(order, device=device),
        teacher_inputs=input_names(teacher),
        teacher_only_inputs=input_names(teacher) - input_names(student),
        problem_type=None if student_task is Task.EMBEDDING else _problem_type(student_config, teacher_config),
        needs_teacher_inputs=shared_tokens is not None or has_own_ids,
        vocabulary=vocabulary,
        shared_tokens=shared_tokens,
    )


def _report(vocabulary: VocabularyOverlap | None) -> None:
    """Tells what is not compared, if anything."""
    if vocabulary is not None and not vocabulary.is_whole:
        drops_tokens = vocabulary.student_only or vocabulary.teacher_only
        (logger.warning if drops_tokens else logger.info)(str(vocabulary))


def _has_own_ids(student_tokens: Mapping[str, int] | None, teacher_tokens: Mapping[str, int] | None) -> bool:
    """Whether the teacher's tokens are known to have other ids than the student's."""
    if student_tokens is None or teacher_tokens is None:
        return False
    return not is_extension(student_tokens, teacher_tokens)


def _warn_of_other_cuts(student_tokenizer: Any | None, teacher_tokenizer: Any | None) -> None:
    found = cut_otherwise(_text_tokenizer(student_tokenizer), _text_tokenizer(teacher_tokenizer))
    if found is not None:
        logger.warning(
            f"Both tokenizers have the same ids, but they cut texts otherwise: {found}. The teacher reads the "
            "student's tokens, which it was not trained on. Tokenise with the teacher's tokenizer, if the student can "
            "learn it."
        )


def _align_by_text(
    task: Task,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    sizes: tuple[int, int],
    device: torch.device | None,
) -> tuple[SharedTokens, VocabularyOverlap]:
    """The classes of two causal language models that spell the same, and the report of the others."""
    if task is not Task.CAUSAL_LM:
        raise ValueError(
            f"token_alignment='offsets' pairs positions that predict the next token, and here the task is {task}. "
            "Drop it, and use a teacher with the student's tokenizer."
        )
    for side, tokenizer in (("processing_class", student_tokenizer), ("teacher_processing_class", teacher_tokenizer)):
        if not getattr(tokenizer, "is_fast", False):
            given = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__}"
            raise ValueError(
                f"token_alignment='offsets' compares tokens by what they spell, and {side} is {given}. Pass the fast "
                "tokenizer (AutoTokenizer.from_pretrained) that the columns were made with."
            )
    shared = SharedTokens.of(
        student_tokenizer, teacher_tokenizer, student_size=sizes[0], teacher_size=sizes[1], device=device
    )
    student_only, teacher_only = (
        tuple(tokenizer.convert_ids_to_tokens(ids.tolist()))
        for tokenizer, ids in ((student_tokenizer, shared.student_rest), (teacher_tokenizer, shared.teacher_rest))
    )
    return shared, VocabularyOverlap(*sizes, len(shared.student), student_only, teacher_only, by_text=True)


def _check_tasks(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher whose head serves another task than the student's."""
    student_task, teacher_task = find_task(student), find_task(teacher)
    if student_task is Task.EMBEDDING:
        _check_embeds(teacher, teacher_task)
    elif student_task is not teacher_task:
        raise ValueError(
            f"The student ({type(task_model(student)).__name__}) does {student_task}, the teacher "
            f"({type(task_model(teacher)).__name__}) {teacher_task}. Logits compare only within one task: load the "
            "teacher with the student's kind of head."
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


def _vocabulary_sizes(student_config: Any, teacher_config: Any) -> tuple[int, int]:
    student, teacher = (config.get_text_config(decoder=True).vocab_size for config in (student_config, teacher_config))
    return student, teacher


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


def _text_tokenizer(tokenizer: Any | None) -> Any | None:
    # A multimodal processor carries its tokenizer; an image processor or feature extractor has none.
    return getattr(tokenizer, "tokenizer", tokenizer)


def _tokens(tokenizer: Any | None) -> dict[str, int] | None:
    text = _text_tokenizer(tokenizer)
    return text.get_vocab() if text is not None and hasattr(text, "get_vocab") else None


def special_tokens(tokenizer: Any | None, device: torch.device) -> Tensor | None:
    """(any,) the ids of a tokenizer's special tokens, or None without a tokenizer. An unknown word is still a word."""
    tokenizer = _text_tokenizer(tokenizer)
    ids: Iterable[int] = getattr(tokenizer, "all_special_ids", ())
    # GPT-2 and its kin have one token for unknown, beginning and end.
    marks = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "cls", "pad")}
    unknown = {getattr(tokenizer, "unk_token_id", None)} - marks
    ids = [token for token in ids if token not in unknown]
    return torch.tensor(ids, device=device) if ids else None
