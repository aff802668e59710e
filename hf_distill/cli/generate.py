"""`hf-distill generate TEACHER PROMPTS OUT`: a data set of the teacher's answers, for a student to train on."""

import argparse
from dataclasses import fields
from typing import get_args, get_type_hints

from hf_distill.generation.arguments import GenerationArguments

DESCRIPTION = "Write a data set of the teacher's answers: sequence-level distillation."
_OWN = ("tokenizer", "teacher_model_init_kwargs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, named as those of `generate_answers`."""
    parser.add_argument("teacher", help="Hub name or folder of the teacher")
    parser.add_argument("prompts", help="file (txt, csv, json, jsonl, parquet), folder or Hub name of the prompts")
    parser.add_argument("output", help="folder for the answers; one begun with the same settings is gone on with")
    parser.add_argument("--tokenizer", help="Hub name or folder of the tokenizer. Not given: the teacher's.")
    parser.add_argument(
        "--teacher_model_init_kwargs",
        metavar="JSON",
        help='Arguments of from_pretrained for the teacher, e.g. \'{"dtype": "bfloat16"}\'.',
    )
    hints = get_type_hints(GenerationArguments)
    for field in fields(GenerationArguments):
        option, text = f"--{field.name}", field.metadata["help"].replace("%", "%%")
        types = get_args(hints[field.name]) or (hints[field.name],)
        if types == (bool,):
            parser.add_argument(option, action="store_true", help=text)
        elif str in types and len(types) == 3:  # a dict, JSON, or nothing
            parser.add_argument(option, metavar="JSON", help=text)
        else:
            default = "" if field.default is None else " (default: %(default)s)"
            parser.add_argument(option, type=types[0], default=field.default, help=text + default)


def run(arguments: argparse.Namespace) -> None:
    """Writes the answers and prints what the data set holds.

    Raises:
        ValueError: the prompts cannot be answered so, or the folder holds something else.
    """
    from accelerate import PartialState

    from hf_distill.generation.answers import generate_answers

    names = (*_OWN, *GenerationArguments.names())
    summary = generate_answers(
        arguments.teacher, arguments.prompts, arguments.output, **{name: getattr(arguments, name) for name in names}
    )
    if PartialState().is_main_process:
        print(summary)
