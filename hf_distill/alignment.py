"""How a teacher's classes line up with a student's: labels by name, vocabularies by token. Pure functions."""

from collections.abc import Mapping

from torch import Tensor


def label_order(student_id2label: Mapping[int, str], teacher_id2label: Mapping[int, str]) -> tuple[int, ...] | None:
    """For each label of the student the teacher's index of it, or None where the two orders agree.

    Names are compared without regard to case. A side that only has Transformers' default names (`LABEL_0`, ...) says
    nothing about the order, so with equal sizes the orders are taken to agree.

    Raises:
        ValueError: the sets differ; the message lists the names that only one side has.
    """
    student, teacher = (
        [str(table[i]).casefold() for i in sorted(table)] for table in (student_id2label, teacher_id2label)
    )
    if student == teacher or (len(student) == len(teacher) and (_is_default(student) or _is_default(teacher))):
        return None
    if len({*student}) < len(student) or len({*teacher}) < len(teacher) or {*student} != {*teacher}:
        raise ValueError(
            f"The label sets differ: the student has {len(student)} labels, the teacher {len(teacher)}; "
            f"only the student has {_some({*student} - {*teacher})}, "
            f"only the teacher {_some({*teacher} - {*student})}. "
            "Load both with the same id2label/label2id, or map the teacher's names to the student's in its config."
        )
    order = tuple(teacher.index(name) for name in student)
    return None if order == tuple(range(len(order))) else order


def shared_vocabulary(
    student_size: int,
    teacher_size: int,
    *,
    student_tokens: Mapping[str, int] | None = None,
    teacher_tokens: Mapping[str, int] | None = None,
) -> int:
    """How many leading rows of the two vocabularies mean the same tokens.

    Args:
        student_size: rows of the student's head. Heads are often padded beyond the tokenizer, differently per model
            size (Qwen2.5: 152064 and 151936 rows for 151665 tokens).
        teacher_size: rows of the teacher's head.
        student_tokens: token -> id of the student's tokenizer, if known.
        teacher_tokens: token -> id of the teacher's tokenizer, if known.

    Raises:
        ValueError: a token has another id, or is missing, on one side; or the sizes differ and the tokenizers do not
            show that only padding rows do.
    """
    shared = min(student_size, teacher_size)
    if student_tokens is not None and teacher_tokens is not None and student_tokens != teacher_tokens:
        raise ValueError(_vocabulary_difference(student_tokens, teacher_tokens))
    if student_size == teacher_size:
        return shared
    tokens = {"student": student_tokens, "teacher": teacher_tokens}
    unknown = [side for side, table in tokens.items() if table is None]
    used = max((max(table.values(), default=-1) for table in tokens.values() if table is not None), default=-1)
    if unknown or used >= shared:
        known = f"the {unknown[0]}'s tokenizer is not known" if unknown else f"the tokenizers use ids up to {used}"
        raise ValueError(
            f"The student's head has {student_size} classes, the teacher's {teacher_size}, and {known}: so rows "
            f"beyond {shared} may be tokens and not padding. Pass processing_class and teacher_processing_class "
            "(the same tokenizer twice, if it is one), or use a teacher with the student's tokenizer."
        )
    return shared


def is_extension(student_tokens: Mapping[str, int], teacher_tokens: Mapping[str, int]) -> bool:
    """Whether every id that both tokenizers use means the same, as where only one was given further tokens."""
    return student_tokens.items() <= teacher_tokens.items() or teacher_tokens.items() <= student_tokens.items()


def ordered_classes(logits: Tensor, *, order: Tensor | None, classes: int | None) -> Tensor:
    """Logits (..., all classes) with the classes permuted by `order` (classes,) and cut to the first `classes`.

    Cutting is the same as setting both sides to -inf beyond: those classes get no probability.
    """
    if order is not None:
        logits = logits.index_select(-1, order)
    return logits if classes is None or classes == logits.shape[-1] else logits[..., :classes]


def _is_default(names: list[str]) -> bool:
    return names == [f"label_{i}" for i in range(len(names))]


def _some(names: set[str], limit: int = 8) -> str:
    listed = sorted(names)
    return (", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")) or "none"


def _vocabulary_difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    moved = [
        f"{token!r}: {student[token]} and {teacher[token]}"
        for token in sorted(student, key=student.__getitem__)
        if teacher.get(token, student[token]) != student[token]
    ]
    return (
        f"The vocabularies differ: the student's tokenizer has {len(student)} tokens, the teacher's {len(teacher)}; "
        f"only the student has {_some({*student} - {*teacher})}; "
        f"only the teacher has {_some({*teacher} - {*student})}; "
        f"{len(moved)} shared tokens have another id{' (' + '; '.join(moved[:4]) + ')' if moved else ''}. "
        "Logits can only be compared token by token: use a teacher with the student's tokenizer."
    )
