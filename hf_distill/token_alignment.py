"""Which positions of two tokenisations of one text have read the same, so that both predict what comes next."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from hf_distill.shared_tokens import token_bytes

NO_POSITION = -1


def tokenize_for_teacher(
    texts: str | Sequence[str],
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    max_length: int | None = None,
    teacher_max_length: int | None = None,
    add_special_tokens: bool = True,
    append_eos: bool = False,
) -> dict[str, list[list[int]]]:
    """The columns that `token_alignment="offsets"` reads: each text in the tokens of the student and of the teacher.

    Made for `Dataset.map(..., batched=True)`. Both read the same text, special tokens at its ends aside; the teacher's
    are cut after the last position that a position of the student has use for.

    Args:
        texts: the texts, or one.
        student_tokenizer: a fast tokenizer.
        teacher_tokenizer: a fast tokenizer of any other kind.
        max_length: the student's tokens beyond are cut off; None keeps all.
        teacher_max_length: likewise the teacher's.
        add_special_tokens: whether each tokenizer adds those that it begins and ends a text with.
        append_eos: whether each text ends with the end-of-text token of either tokenizer, also where it adds none by
            itself. Written into the text it would be other words to the other tokenizer.

    Returns: `input_ids`, `attention_mask`, `labels` (every token), `teacher_input_ids`, `teacher_attention_mask`, and
        `teacher_positions`: for each of the student's tokens the teacher's position that has read the same text, -1
        where there is none.

    Raises:
        ValueError: something else than texts; a tokenizer without a Rust backend, which does not tell where in the
            text its tokens lie, or without an end-of-text token to append.
    """
    if isinstance(texts, Mapping):
        raise ValueError(
            f"tokenize_for_teacher was given rows of the columns {', '.join(texts)}, expected texts. In Dataset.map "
            "name the column that holds them: input_columns='text', batched=True."
        )
    texts = [texts] if isinstance(texts, str) else list(texts)
    if others := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(
            f"tokenize_for_teacher was given {others[0]!r}, expected texts. Conversations cannot be aligned; leave "
            "out rows without a text (Dataset.filter)."
        )
    student_read, teacher_read = (
        _Reader(tokenizer, side, add_special_tokens=add_special_tokens, append_eos=append_eos)
        for side, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer))
    )
    names = "input_ids", "attention_mask", "labels", "teacher_input_ids", "teacher_attention_mask", "teacher_positions"
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    for text in texts:
        student_ids, student_prefixes = student_read(text)
        teacher_ids, teacher_prefixes = teacher_read(text)
        positions = paired_positions(student_prefixes[:max_length], teacher_prefixes[:teacher_max_length])
        used = max(positions, default=NO_POSITION) + 1
        own, other = student_ids[:max_length], teacher_ids[: max(used, 1)]
        values = (own, [1] * len(own), own, other, [1] * len(other), positions)
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    return columns


def paired_positions(student_prefixes: Sequence[Hashable], teacher_prefixes: Sequence[Hashable]) -> list[int]:
    """For each of the student's positions the teacher's that has read the same, or -1.

    Args:
        student_prefixes: what each position has read, as `read_prefixes` says it.
        teacher_prefixes: likewise of the teacher's.
    """
    places = {prefix: place for place, prefix in enumerate(teacher_prefixes)}
    return [places.get(prefix, NO_POSITION) for prefix in student_prefixes]


def read_prefixes(
    text: str,
    spelled: Sequence[bytes],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[bool],
) -> list[Hashable]:
    """What each position of a tokenised text has read, up to and with its own token: equal where that is equal.

    It is the number of bytes of the text, where that is known. A special token in front of the text has read none of
    it and is told by its distance from it, one behind it by its own place.

    Args:
        text: the text.
        spelled: what each token spells, as `token_bytes` says it; of a special token anything.
        offsets: (start, end) of each token, in characters of the text.
        special: whether each token was added around the text.
    """
    sizes, written = [0, *accumulate(len(character.encode()) for character in text)], text.encode()
    ends = [_end(text, *offset, own) for offset, own in zip(offsets, spelled, strict=True)]
    inside = [place for place, is_special in enumerate(special) if not is_special]
    first, last = (inside[0], inside[-1]) if inside else (len(special), len(special))
    prefixes: list[Any] = []
    for place in reversed(range(len(special))):
        following = place + 1
        if special[place]:
            prefixes.append(("before", first - place) if place < first else ("after", place - last))
        elif following <= last and offsets[following][0] < ends[place]:
            # Pieces of one character, or a space put in front of a text, are told to lie where what follows lies.
            later, own = prefixes[-1], spelled[following]
            is_known = isinstance(later, int) and own and written[:later].endswith(own)
            prefixes.append(later - len(own) if is_known else (later, own))
        else:
            prefixes.append(sizes[ends[place]])
    return prefixes[::-1]


def _end(text: str, start: int, end: int, spelled: bytes) -> int:
    """Where a token ends, also if its tokenizer leaves white space out of its offsets."""
    token = spelled.decode("utf-8", "ignore")
    trailing = len(token) - len(token.rstrip())
    # Of nothing but white space it leaves out the beginning alone, save at the beginning of a text.
    trimmed = end == 0 if trailing == len(token) else trailing > 0 and not text[start:end][-1:].isspace()
    return end + trailing if trimmed and text[end : end + trailing] == token[-trailing:] else end


class _Reader:
    """Tokenises a text and says what each position has read."""

    def __init__(self, tokenizer: Any, side: str, *, add_special_tokens: bool, append_eos: bool) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"The {side}'s tokenizer is a {type(tokenizer).__name__}, which does not tell where in the text its "
                "tokens lie. Load a fast one: AutoTokenizer.from_pretrained(name), with `tokenizers` able to read it."
            )
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError(
                f"append_eos=True, but the {side}'s tokenizer has no eos_token. Set one, or leave it out."
            )
        self._tokenizer, self._spelled = tokenizer, token_bytes(tokenizer)
        self._add_special_tokens, self._append_eos = add_special_tokens, append_eos

    def __call__(self, text: str) -> tuple[list[int], list[Hashable]]:
        encoding = self._tokenizer(
            text,
            add_special_tokens=self._add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        special = [bool(mark) for mark in encoding["special_tokens_mask"]]
        if self._append_eos and not (special[-1:] == [True] and ids[-1] == self._tokenizer.eos_token_id):
            ids, offsets, special = [*ids, self._tokenizer.eos_token_id], [*offsets, (0, 0)], [*special, True]
        spelled = [self._spelled.get(token, b"") for token in ids]
        return ids, read_prefixes(text, spelled, offsets, special)
