"""What the tokens of two tokenizers spell, and which of them spell the same: classes that may be compared."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers.models import WordPiece
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

_TOKENS_OF_A_TEXT, _TEXTS = 3, 4000  # of a trial
_SPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BYTE_OF = {character: value for value, character in bytes_to_unicode().items()}


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of text that each token spells, by its id, with the marks of its kind of tokenizer undone.

    A byte-level token is its bytes, SentencePiece's mark is a space and `<0x0A>` a byte; a WordPiece token without
    `##` begins with a space where its script has any. What has no such mark is taken as it is written. Special tokens
    spell nothing and are left out. SentencePiece's single bytes come last.

    Args:
        tokenizer: a fast one (with a Rust backend).
    """
    backend, special = tokenizer.backend_tokenizer, {*tokenizer.all_special_ids}
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    written = b" ".join(part.__getstate__() for part in parts if part is not None).decode()
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    if _SPACE in written:
        single = {number: bytes.fromhex(token[3:5]) for number, token in vocabulary.items() if _BYTE.fullmatch(token)}
        words = {number: token for number, token in vocabulary.items() if number not in single}
        return {number: words[number].replace(_SPACE, " ").encode() for number in sorted(words)} | single
    spell: Callable[[str], bytes] = str.encode
    if '"ByteLevel"' in written:
        spell = _byte_level
    elif isinstance(backend.model, WordPiece):
        spell = partial(_word_piece, prefix=backend.model.continuing_subword_prefix)
    return {
        number: added[number].encode() if number in added else spell(vocabulary[number])
        for number in sorted(vocabulary)
    }


def _byte_level(token: str) -> bytes:
    # A token that was added without being declared so may hold a character that stands for no byte.
    return bytes(_BYTE_OF[character] for character in token) if {*token} <= _BYTE_OF.keys() else token.encode()


def _word_piece(token: str, *, prefix: str) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    # Punctuation and Chinese characters are split off whether a space precedes them or not.
    stands_apart = token[:1].isalnum() and unicodedata.east_asian_width(token[0]) not in "WF"
    return (" " + token if stands_apart else token).encode()


def cut_otherwise(student_tokenizer: Any, teacher_tokenizer: Any) -> str | None:
    """A text that two tokenizers of one vocabulary cut into other tokens, with both cuts; None where none was found.

    The same ids mean the same text to both, but other merges, another normaliser or another way to split words give
    other tokens for it. Tried are texts of a few tokens each, from all over the vocabulary.

    Args:
        student_tokenizer: of any kind; only fast ones are tried.
        teacher_tokenizer: likewise, with the same ids for the tokens that both have.
    """
    own, other = (getattr(each, "backend_tokenizer", None) for each in (student_tokenizer, teacher_tokenizer))
    if own is None or other is None or own is other:
        return None
    size = min(own.get_vocab_size(), other.get_vocab_size())
    step = max(_TOKENS_OF_A_TEXT, size // _TEXTS)
    texts = own.decode_batch([[*range(start, start + _TOKENS_OF_A_TEXT)] for start in range(0, size, step)])
    cuts = (backend.encode_batch_fast(texts, add_special_tokens=False) for backend in (own, other))
    for text, student, teacher in zip(texts, *cuts, strict=True):
        if student.ids == teacher.ids:
            continue
        names = [[*map(own.id_to_token, cut.ids)] for cut in (student, teacher)]
        # A token that one side alone has is no difference of the way to cut.
        if names == [[*map(other.id_to_token, cut.ids)] for cut in (student, teacher)]:
            return f"{text!r} is {names[0]} to the student's and {names[1]} to the teacher's"
    return None


@dataclass(frozen=True)
class SharedTokens:
    """Classes of two vocabularies that spell the same, and those that only one of them has.

    Attributes:
        student: (shared,) int64 ids of the tokens that both have, in the student's vocabulary.
        teacher: (shared,) int64 ids of the same tokens in the teacher's.
        student_rest: (any,) int64 the student's further tokens.
        teacher_rest: (any,) int64 the teacher's.
        student_rows: how many leading rows of the student's head hold all of its tokens.
        teacher_rows: likewise of the teacher's.
    """

    student: Tensor
    teacher: Tensor
    student_rest: Tensor
    teacher_rest: Tensor
    student_rows: int
    teacher_rows: int

    @classmethod
    def of(
        cls,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_size: int,
        teacher_size: int,
        device: torch.device | None = None,
    ) -> "SharedTokens":
        """Those of two fast tokenizers.

        The end of a text is one class whatever its name; other special tokens are shared where they are written alike.
        Of several tokens that spell the same the first ones pair up.

        Args:
            student_tokenizer: the student's.
            teacher_tokenizer: the teacher's.
            student_size: rows of the student's head; a token beyond them has no class.
            teacher_size: rows of the teacher's head.
            device: where the indices live.

        Raises:
            ValueError: no token spells the same.
        """
        sides = (student_tokenizer, student_size), (teacher_tokenizer, teacher_size)
        student, teacher = ({i: name for i, name in _names(t).items() if i < size} for t, size in sides)
        places: dict[bytes | str, list[int]] = defaultdict(list)
        for number, name in reversed(teacher.items()):
            places[name].append(number)
        pairs = sorted((number, places[name].pop()) for number, name in student.items() if places.get(name))
        if not pairs:
            raise ValueError(
                f"None of the student's {len(student)} tokens spells what one of the teacher's {len(teacher)} does. "
                "Take kd_loss='uld', which compares no tokens, or check that the tokenizers are those of the models."
            )
        own, others = zip(*pairs, strict=True)
        rests = sorted(student.keys() - {*own}), sorted(teacher.keys() - {*others})
        a, b, c, d = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (own, others, *rests))
        return cls(a, b, c, d, student_rows=max(student) + 1, teacher_rows=max(teacher) + 1)

    def compared(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over the shared tokens and, where both sides have further ones, one class for all of these.

        That class has the probability of the tokens in it at temperature 1. Rows that are no token have none.

        Args:
            student_logits: (..., student's classes).
            teacher_logits: (..., teacher's classes), of the same items.

        Returns: two of (..., shared) or (..., shared + 1).
        """
        if not (len(self.student_rest) and len(self.teacher_rest)):
            # A class that is impossible to one side alone would make a divergence infinite.
            return student_logits.index_select(-1, self.student), teacher_logits.index_select(-1, self.teacher)
        return (
            _with_rest(student_logits, self.student, self.student_rest),
            _with_rest(teacher_logits, self.teacher, self.teacher_rest),
        )

    def all_tokens(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over all tokens of each side, without the rows that are no token.

        Args:
            student_logits: (..., student's classes).
            teacher_logits: (..., teacher's classes).
        """
        return student_logits[..., : self.student_rows], teacher_logits[..., : self.teacher_rows]


def _with_rest(logits: Tensor, shared: Tensor, rest: Tensor) -> Tensor:
    # In float32: a bfloat16 of the sum of thousands of classes is off by a hundredth.
    others = torch.logsumexp(logits.index_select(-1, rest).float(), -1, keepdim=True)
    return torch.cat([logits.index_select(-1, shared).float(), others], -1)


def _names(tokenizer: Any) -> dict[int, bytes | str]:
    """What makes a token the same as another, by its id: bytes for text, a name for special tokens."""
    names: Mapping[int, bytes | str] = token_bytes(tokenizer)
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {**names, **special, **({} if tokenizer.eos_token_id is None else {tokenizer.eos_token_id: "end of text"})}
