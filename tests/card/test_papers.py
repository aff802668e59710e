"""Every paper that something in the package names has an entry, and is cited where it is used."""

import re
from pathlib import Path

import pytest

from hf_distill.card.papers import arxiv_ids, bibliography, citations, linked
from hf_distill.losses import LOSSES
from hf_distill.presets import load_preset, preset_names

PACKAGE = Path(__file__).resolve().parents[2] / "hf_distill"
BIB = (PACKAGE / "card/papers.bib").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*LOSSES])
def test_every_paper_of_a_loss_has_an_entry(name):
    ids = arxiv_ids(LOSSES.get(name).paper)
    assert ids, f"{name} names no arXiv number"
    assert set(ids) <= set(bibliography())


@pytest.mark.parametrize("name", preset_names())
def test_every_paper_of_a_preset_has_an_entry(name):
    assert set(arxiv_ids(load_preset(name).paper)) <= set(bibliography())


def test_every_number_in_the_words_of_a_card_has_an_entry():
    text = "".join((PACKAGE / "card" / name).read_text(encoding="utf-8") for name in ("words.py", "rendering.py"))
    assert len(arxiv_ids(text)) > 8
    assert set(arxiv_ids(text)) <= set(bibliography())


def test_the_first_author_and_the_year_are_those_that_losses_and_presets_give():
    """The entry's year may be that of the proceedings, so at most two after the number's."""
    papers = [LOSSES.get(name).paper for name in LOSSES] + [load_preset(name).paper for name in preset_names()]
    checked = 0
    for paper in papers:
        for author, number in re.findall(r"([A-Z][\w\u00c0-\u024f]+)[^;]*?arXiv:(\d{4}\.\d{4,5})", paper):
            entry = bibliography()[number]
            year = int(re.search(r"year = \{(\d{4})\}", entry)[1])
            assert 0 <= year - (2000 + int(number[:2])) <= 2, entry
            surnames = re.search(r"author = \{(.*)\}", entry)[1]
            names = re.findall(r"[A-Z][\w\u00c0-\u024f]+", paper.partition(number)[0])
            assert any(name in surnames.replace('{\\"a}', "ä") for name in [author, *names]), (paper, surnames)
            checked += 1
    assert checked > 40


def test_entries_are_well_formed_and_their_keys_and_numbers_unique():
    entries = [*bibliography().values()]
    keys = [re.match(r"@\w+\{([a-z0-9]+),", entry)[1] for entry in entries]
    assert len({*keys}) == len(keys)
    assert len(re.findall(r"^@", BIB, re.MULTILINE)) == len(entries) == len(re.findall("eprint", BIB))
    for entry in entries:
        assert entry.count("{") == entry.count("}"), entry
        assert all(f"  {name} = {{" in entry for name in ("title", "author", "year", "eprint", "archivePrefix")), entry


def test_citations_come_once_and_in_order_and_an_unknown_number_by_itself():
    text = citations(["1910.01108", "1503.02531", "1910.01108", "9912.34567"])
    assert re.findall(r"eprint = \{(.*)\}", text) == ["1910.01108", "1503.02531", "9912.34567"]
    assert "Sanh, Victor" in text


def test_numbers_become_links():
    assert (
        linked("GKD, arXiv:2306.13649; no 12.5")
        == "GKD, [arXiv:2306.13649](https://arxiv.org/abs/2306.13649); no 12.5"
    )
