"""`hf-distill`: one file a command, loaded when it is asked for; `--help` loads no torch."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import hf_distill

# Each is a module of this package with DESCRIPTION, `add_arguments(parser)` and `run(arguments)`, which itself imports
# what is heavy. One with TAKES_MORE gets the options that are not its own as `arguments.more`.
COMMANDS = ("train", "student", "generate", "report", "card", "presets")
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
        command.set_defaults(run=module.run, takes_more=takes_more)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns: 0; 1 where it failed; 2 (by argparse, which exits) where the arguments are wrong; 130 where it was
    stopped.
    """
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if more and not arguments.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    arguments.more = more
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"hf-distill {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        remedy = _REMEDIES.get(arguments.command, "")
        print(f"hf-distill {arguments.command}: stopped{remedy}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
