"""How a teacher's classes line up with a student's: labels by name, vocabularies by token. Pure functions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class VocabularyOverlap:
    """What of two vocabularies is compared, and what only one of them has.

    Attributes:
        student_size: rows of the student's head.
        teacher_size: rows of the teacher's head.
        classes: how many classes are compared: the leading rows of both heads, or pairs of tokens that spell the same.
        student_only: the tokens that the student's tokenizer alone has, by their ids.
        teacher_only: likewise the teacher's.
        by_text: whether the classes are pairs of tokens that spell the same.
    """

    student_size: int
    teacher_size: int
    classes: int
    student_only: tuple[str, ...] = ()
    teacher_only: tuple[str, ...] = ()
    by_text: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all rows of both heads are compared."""
        return self.student_size == self.teacher_size == self.classes

    def padding(self, side: str) -> int:
        """How many rows of a side ("student" or "teacher") are left out and are no token either."""
        size, only = (getattr(self, f"{side}_{what}") for what in ("size", "only"))
        return max(0, size - self.classes - len(only))

    def __str__(self) -> str:
        parts = [
            f"{self.padding(side)} rows of the {side}'s that are no token"
            for side in ("student", "teacher")
            if self.padding(side)
        ]
        for side, tokens in (("student", self.student_only), ("teacher", self.teacher_only)):
            if tokens:
                parts.append(f"{len(tokens)} tokens that only the {side} has ({_some(tokens)})")
        what = "tokens that spell the same" if self.by_text else "leading classes"
        return (
            f"The student's head has {self.student_size} classes, the teacher's {self.teacher_size}: {self.classes} "
            f"{what} are compared. Left out: {'; '.join(parts) or 'nothing'}."
        )


def vocabulary_overlap(
    student_size: int,
    teacher_size: int,
    *,
    student_tokens: Mapping[str, int] | None = None,
    teacher_tokens: Mapping[str, int] | None = None,
) -> VocabularyOverlap:
    """How many leading rows of the two vocabularies mean the same tokens, and what the others are.

    Heads of one size whose tokens agree, as far as they are known, are compared whole: rows of padding that both have
    say the same. Else only the ids that both tokenizers name are compared; the others get no probability.

    Args:
        student_size: rows of the student's head. Heads are often padded beyond the tokenizer, differently per model
            size (Qwen2.5: 152064 and 151936 rows for 151665 tokens).
        teacher_size: rows of the teacher's head.
        student_tokens: token -> id of the student's tokenizer, if known.
        teacher_tokens: token -> id of the teacher's tokenizer, if known.

    Raises:
        ValueError: a token has another id; both sides have tokens of their own; tokens of one side stand among the
            shared ids; the teacher has no row for a token of the student's; or the sizes differ and the tokenizers
            do not show that only padding rows do.
    """
    rows = min(student_size, teacher_size)
    if student_tokens is None or teacher_tokens is None:
        if student_size != teacher_size:
            side = "student" if student_tokens is None else "teacher"
            raise ValueError(_unexplained_sizes(student_size, teacher_size, f"the {side}'s tokenizer is not known"))
        return VocabularyOverlap(student_size, teacher_size, rows)
    if student_tokens == teacher_tokens and student_size == teacher_size:
        return VocabularyOverlap(student_size, teacher_size, rows)
    if not is_extension(student_tokens, teacher_tokens):
        raise ValueError(_vocabulary_difference(student_tokens, teacher_tokens))
    shared = 1 + max((number for _, number in student_tokens.items() & teacher_tokens.items()), default=-1)
    if shared > rows:
        used = f"the tokenizers use ids up to {shared - 1}"
        raise ValueError(_unexplained_sizes(student_size, teacher_size, used))
    student_only = _only(student_tokens, teacher_tokens)
    teacher_only = _only(teacher_tokens, student_tokens)
    among = {token: number for token, number in (student_only | teacher_only).items() if number < shared}
    if among:
        raise ValueError(
            f"Only one of the tokenizers has {_some(among)} (ids {', '.join(map(str, [*among.values()][:8]))}), which "
            f"stand among the {shared} ids that both use. Add the same tokens to the other tokenizer."
        )
    unread = [token for token, number in student_only.items() if teacher_size <= number < student_size]
    if unread:
        raise ValueError(
            f"The student's tokenizer has {_some(unread)}, for which the teacher's {teacher_size} rows have none: it "
            f"could not read them. Call teacher.resize_token_embeddings({student_size}) on the loaded teacher; what "
            "the new rows predict is not compared."
        )
    return VocabularyOverlap(student_size, teacher_size, shared, (*student_only,), (*teacher_only,))


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


def is_unnamed(id2label: Mapping[int, str]) -> bool:
    """Whether labels have only the names that Transformers gives them."""
    return _is_default([str(id2label[number]).casefold() for number in sorted(id2label)])


def _is_default(names: list[str]) -> bool:
    return names == [f"label_{i}" for i in range(len(names))]


def _only(tokens: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """The tokens that the others do not have, by their ids."""
    return {token: tokens[token] for token in sorted(tokens.keys() - others.keys(), key=tokens.__getitem__)}


def _unexplained_sizes(student_size: int, teacher_size: int, known: str) -> str:
    return (
        f"The student's head has {student_size} classes, the teacher's {teacher_size}, and {known}: so rows beyond "
        f"{min(student_size, teacher_size)} may be tokens and not padding. Pass processing_class and "
        "teacher_processing_class (the same tokenizer twice, if it is one), or use a teacher with the student's "
        "tokenizer."
    )


def _some(names: Collection[str], limit: int = 8) -> str:
    listed = sorted(names) if isinstance(names, set) else [*names]
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
        "Logits can only be compared token by token: use a teacher with the student's tokenizer. Between causal "
        "language models there is also token_alignment='offsets' on columns made by tokenize_for_teacher: kd_loss="
        "'uld' then compares sorted probabilities, any other divergence the tokens that spell the same."
    )
