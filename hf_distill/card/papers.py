"""The papers behind losses, presets and settings, as BibTeX."""

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")
_ENTRY = re.compile(r"^@\w+\{.*?^\}$", re.MULTILINE | re.DOTALL)


def arxiv_ids(text: str) -> list[str]:
    """The arXiv numbers in a text, in order, each once."""
    return list(dict.fromkeys(_ARXIV.findall(text)))


def linked(text: str) -> str:
    """The text with its arXiv numbers as links."""
    return re.sub(rf"arXiv:({_ARXIV.pattern})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


@cache
def bibliography() -> dict[str, str]:
    """Every entry that comes with the package by its arXiv number."""
    text = (files(__package__) / "papers.bib").read_text(encoding="utf-8")
    return {_number(entry): entry for entry in _ENTRY.findall(text)}


def citations(ids: Iterable[str]) -> str:
    """The BibTeX of these arXiv numbers, each once, in order; what is not known gets an entry by its number."""
    known = bibliography()
    return "\n\n".join(known.get(number) or _by_number(number) for number in dict.fromkeys(ids))


def _number(entry: str) -> str:
    found = re.search(rf"eprint\s*=\s*\{{({_ARXIV.pattern})\}}", entry)
    assert found, f"an entry of papers.bib has no eprint: {entry[:60]}"
    return found[1]


def _by_number(number: str) -> str:
    # A loss that a user registered may name any paper.
    return f"@misc{{arxiv{number},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
