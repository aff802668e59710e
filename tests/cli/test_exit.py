"""How a command ends: in words where the user can mend it, with a traceback where we must, in silence in a pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError

from hf_distill.cli.main import main


def ending(monkeypatch, error):
    """The command line, whose one command ends so."""

    def fail(arguments):
        if isinstance(error, Exception):
            raise error
        error()

    monkeypatch.setattr("hf_distill.cli.presets.run", fail)
    return main(["presets"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a is 1; expected 2."), "a is 1; expected 2."),
        (TypeError("A teacher is a dict; expected a model."), "A teacher is a dict; expected a model."),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), "[Errno 2] No such file or directory: 'x.csv'"),
        (KeyError("The metric 'f2' is unknown."), "The metric 'f2' is unknown."),
        (SafetensorError("header too large"), "header too large"),
        (DatasetsError("a file is damaged"), "a file is damaged"),
        (ConnectionError(), "ConnectionError"),
        (lambda: (lambda: None)(nothing=1), "unexpected keyword argument 'nothing'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, said, monkeypatch, capsys):
    assert ending(monkeypatch, error) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("hf-distill presets: ")
    assert printed.endswith(f"{said}\n")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lambda: {}["weight"], KeyError),
        (lambda: None + 1, TypeError),
        (lambda: len(3), TypeError),
        (lambda: [][0], IndexError),
        (lambda: None.weight, AttributeError),
        (RuntimeError("size mismatch"), RuntimeError),
    ],
)
def test_a_bug_keeps_its_traceback(error, kind, monkeypatch):
    with pytest.raises(kind):
        ending(monkeypatch, error)


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [("presets", ""), ("presets", "1"), ("presets show tinybert", ""), ("presets --help", "")],
)
def test_a_reader_that_has_gone_ends_a_command_in_silence(words, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hf_distill", *words.split()]
    own = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=own, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_help_of_a_recipe_says_where_all_its_keys_are(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    place = Path(__file__).parents[2] / "docs" / "options.md"
    assert "docs/options.md" in capsys.readouterr().out
    assert "## Keys of a recipe" in place.read_text(encoding="utf-8")


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys):
    assert ending(monkeypatch, BrokenPipeError(32, "Broken pipe")) == 1
    assert capsys.readouterr().err == "hf-distill presets: [Errno 32] Broken pipe\n"
