"""`hf-distill card FOLDER`: the model card of a distilled student."""

import argparse
from pathlib import Path

DESCRIPTION = "Write the model card of a trained student from what its training recorded."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", type=Path, help="output_dir of a distillation")


def run(arguments: argparse.Namespace) -> None:
    """Writes README.md into the folder.

    Raises:
        ValueError: no distillation ended there.
    """
    if not arguments.folder.is_dir():
        raise ValueError(f"{arguments.folder} is no folder. Give the output_dir of a distillation.")
    from hf_distill.card import write_card

    write_card(arguments.folder)
    print(f"Written: {arguments.folder / 'README.md'}")
