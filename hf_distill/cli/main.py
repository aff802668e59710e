"""`hf-distill`: one file a command, loaded when it is asked for; `--help` loads no torch."""

import argparse
import dis
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import hf_distill

# Each is a module of this package with DESCRIPTION, `add_arguments(parser)` and `run(arguments)`, which itself imports
# what is heavy. One with TAKES_MORE gets the options that are not its own as `arguments.more`.
COMMANDS = ("train", "student", "generate", "report", "card", "presets")
# What libraries raise for files, connections and memory, by name: the classes take seconds to import.
_OF_LIBRARIES = {"SafetensorError", "DatasetsError", "HTTPError", "OutOfMemoryError"}
_REMEDIES = {"generate": "; repeat the command to go on", "train": "; repeat the command with --resume to go on"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="hf-distill", description="Knowledge distillation for Transformers.")
    parser.add_argument("--version", action="version", version=f"hf-distill {hf_distill.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"hf_distill.cli.{name}")
        takes_more = getattr(module, "TAKES_MORE", False)
        command = commands.add_parser(
            name, help=module.DESCRIPTION, description=module.DESCRIPTION, allow_abbrev=not takes_more
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.set_defaults(run=module.run, takes_more=takes_more, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns: 0; 1 where it failed; 2 (by argparse, which exits) where the arguments are wrong; 130 where it was
    stopped; 141 where nobody reads its output any more (`| head`).
    """
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # else the interpreter flushes at its end, and complains where it cannot
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if more and not arguments.takes_more:
        _refuse(arguments.parser, more)
    arguments.more = more
    try:
        arguments.run(arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            print(flush=True)  # raises again if it is the output that breaks
        if arguments.debug or not _is_for_users(error):
            raise
        print(f"hf-distill {arguments.command}: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        remedy = _REMEDIES.get(arguments.command, "")
        print(f"hf-distill {arguments.command}: stopped{remedy}", file=sys.stderr)
        return 130
    return 0


def _refuse(parser: argparse.ArgumentParser, more: Sequence[str]) -> NoReturn:
    """Ends with the usage of the command whose words these are not, and the option that may be meant."""
    from hf_distill.config.checks import did_you_mean

    option = next((word.partition("=")[0] for word in more if word.startswith("--")), None)
    meant = "" if option is None else did_you_mean(option, parser._option_string_actions)
    parser.error(f"unrecognized arguments: {' '.join(more)}.{meant}")


def _is_for_users(error: Exception) -> bool:
    """Whether an error says what is wrong with what was given; a bug of ours is told with its traceback."""
    if isinstance(error, KeyError):
        return " " in _said(error)  # a sentence, and not a key that was looked up
    if isinstance(error, TypeError):
        # Not an operation on something that it cannot be done with, but options that go to a function as they are.
        return _was_raised(error) or "unexpected keyword argument" in str(error)
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ValueError | OSError | ImportError) or not names.isdisjoint(_OF_LIBRARIES)


def _was_raised(error: Exception) -> bool:
    """Whether a `raise` made the error, and no operation and nothing compiled."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    # By offset and not in `co_code`, which is empty in the frames that Cython writes for Python 3.10.
    instructions = dis.get_instructions(last.tb_frame.f_code)
    return any(each.offset == last.tb_lasti and each.opname == "RAISE_VARARGS" for each in instructions)


def _said(error: Exception) -> str:
    # As text, a KeyError has its message in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
