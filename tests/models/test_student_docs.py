"""The examples of docs/students.md run, on a small teacher."""

import re
from pathlib import Path

import pytest

from tests.tiny import bert, tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "students.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SMALLER = {"hidden_size=384": "hidden_size=16", "intermediate_size=1536": "intermediate_size=32"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, tmp_path, monkeypatch, capsys):
    words = "the film plot was good bad".split()
    bert("MaskedLM", layers=12, vocab_size=11).save_pretrained(tmp_path / "bert-base-uncased")
    tokenizer([*words]).save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    for full, small in SMALLER.items():
        example = example.replace(full, small)
    exec(compile(example, "docs/students.md", "exec"), {})
    assert "print" not in example or "BertForMaskedLM" in capsys.readouterr().out


def test_there_are_examples():
    assert len(EXAMPLES) == 4
    assert all(any(full in example for example in EXAMPLES) for full in SMALLER)
