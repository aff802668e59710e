"""Whether a TypeError was raised in so many words or is of an operation, however the function is written."""

import sys
from contextlib import contextmanager
from types import TracebackType

import pyarrow
import pytest

from hf_distill.cli.main import main


@contextmanager
def tidied():
    try:
        yield
    finally:
        len("tidied")


def expected(value):
    """Refuses None, in the words of whoever wrote it."""
    if value is None:
        raise TypeError(
            "value is None; "
            "expected a number."
        )  # fmt: skip
    return value + 1


def added(value):
    return value + 1


def with_finally(function):
    try:
        function(None)
    finally:
        len("tidied")


def with_again(function):
    try:
        function(None)
    except TypeError:
        raise


def with_context(function):
    with tidied():
        function(None)


def as_generator(function):
    list(function(each) for each in (1, None))


def when_hot(function):
    for number in range(1000):  # by then the interpreter has rewritten its operations
        function(number)
    function(None)


def traced(function):
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        function(None)
    finally:
        sys.settrace(before)


WAYS = (with_finally, with_again, with_context, as_generator, when_hot, traced)


def ending(monkeypatch, function, *args):
    """The command line, whose one command calls the function."""
    monkeypatch.setattr("hf_distill.cli.presets.run", lambda _: function(*args))
    return main(["presets"])


@pytest.mark.parametrize("way", WAYS)
def test_what_was_raised_is_told_in_its_words(way, monkeypatch, capsys):
    assert ending(monkeypatch, way, expected) == 1
    assert capsys.readouterr().err == "hf-distill presets: value is None; expected a number.\n"


@pytest.mark.parametrize("way", WAYS)
def test_what_an_operation_cannot_do_keeps_its_traceback(way, monkeypatch):
    with pytest.raises(TypeError, match="unsupported operand"):
        ending(monkeypatch, way, added)


def test_what_an_operation_cannot_do_is_raised_again_in_other_words(monkeypatch, capsys):
    def explained():
        try:
            added(None)
        except TypeError as error:
            raise TypeError("It is no number.") from error

    assert ending(monkeypatch, explained) == 1
    assert capsys.readouterr().err == "hf-distill presets: It is no number.\n"


def test_an_error_of_compiled_code_keeps_its_traceback(monkeypatch):
    with pytest.raises(TypeError, match="Cannot convert"):
        ending(monkeypatch, pyarrow.schema, [3])  # Cython writes a frame for it, which has never run


def test_a_frame_that_has_never_run_has_raised_nothing(monkeypatch):
    def ends_with_a_raise():
        raise TypeError

    with pytest.raises(TypeError) as caught:
        ends_with_a_raise()
    never_run = TracebackType(None, caught.tb.tb_next.tb_frame, -2, 1)

    def fail():
        raise TypeError("compiled").with_traceback(never_run)

    with pytest.raises(TypeError, match="compiled"):
        ending(monkeypatch, fail)
