"""Where phrases stand in a text: whole words, in any script."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Scripts that put no space between words (Han, kana, bopomofo, Thai, Lao, Burmese, Khmer), and Hangul, whose particles
# cling to the word: there a phrase may begin and end anywhere.
_UNSPACED_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u318f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{_UNSPACED_RANGES}]")
# Where a phrase may begin, and some places more: marks are no word characters to `re`.
_STARTS = re.compile(rf"(?<!\w)\S|[^\w\s]|[{_UNSPACED_RANGES}]|(?<=[{_UNSPACED_RANGES}])\S")


class Span(NamedTuple):
    """A phrase's place in a text, text[start:end], and its boost."""

    start: int
    end: int
    boost: float


class PhraseIndex:
    """Finds phrases in texts: whole words, over any white space, overlapping ones too.

    Words are whole where the script puts spaces between them: "art" is not in "heart", but 梗死 is in 心肌梗死.

    Args:
        boosts: each phrase and what it adds to the weight 1.
        match_case: whether upper and lower case differ.

    Raises:
        ValueError: there is no phrase, or one is empty.
    """

    def __init__(self, boosts: Mapping[str, float], *, match_case: bool = False) -> None:
        self._match_case = match_case
        self._boosts: dict[str, float] = {}
        for phrase, boost in boosts.items():
            # One letter with its accent may be written as one character or as two.
            for form in ("NFC", "NFD"):
                key = " ".join(self._folded(unicodedata.normalize(form, phrase)).split())
                if not key:
                    raise ValueError(f"A phrase is {phrase!r}, which is empty. Drop it.")
                self._boosts[key] = max(boost, self._boosts.get(key, 0.0))
        if not self._boosts:
            raise ValueError("There is no phrase to look for. Give at least one.")
        lengths: dict[str, set[int]] = {}
        for key in self._boosts:
            lengths.setdefault(key[0], set()).add(len(key))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}

    def spans(self, text: str) -> list[Span]:
        """Every place of every phrase."""
        folded = re.sub(r"\s", " ", self._folded(text))
        kept: Sequence[int] = range(len(folded))
        if "  " in folded:
            kept = [i for i in kept if folded[i] != " " or folded[i - 1 : i] != " "]
            folded = "".join(folded[i] for i in kept)
        found = []
        for place in _STARTS.finditer(folded):
            start = place.start()
            lengths = self._lengths.get(place.group())
            if lengths is None or _joined(folded, start):
                continue
            for length in lengths:
                end = start + length
                boost = self._boosts.get(folded[start:end])
                if boost is not None and end <= len(folded) and not _joined(folded, end):
                    found.append(Span(kept[start], kept[end - 1] + 1, boost))
        return found

    def strongest(self, text: str) -> float:
        """The largest boost of a phrase in the text, 0 without one."""
        return max((span.boost for span in self.spans(text)), default=0.0)

    def _folded(self, text: str) -> str:
        """The text without regard to case, as long as it was, so that places in it stay."""
        if self._match_case:
            return text
        folded = text.casefold()
        if len(folded) == len(text):
            return folded
        return "".join(c if len(folded := c.casefold()) > 1 else folded for c in text)


def is_unspaced(character: str) -> bool:
    """Whether a character's script puts no space between words, or, as Korean, joins particles to them."""
    return _UNSPACED.match(character) is not None


def _joined(text: str, place: int) -> bool:
    """Whether the characters on both sides of a place belong to one word of a script with spaces."""
    if not 0 < place < len(text):
        return False
    return all(_is_of_word(character) and not is_unspaced(character) for character in text[place - 1 : place + 1])


def _is_of_word(character: str) -> bool:
    # Accents and vowel signs are marks (M) of their own in some spellings and scripts.
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
