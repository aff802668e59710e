"""`hf-distill student TEACHER OUT`: a smaller model with its teacher's weights, ready to be trained."""

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = "Build a student from a teacher: fewer layers, narrower, in another layout, with fewer tokens."


def parse_layers(text: str) -> Any:
    """`6` -> how many; `0,2,5` -> which; `encoder=6 decoder=0,11` parts -> (stack, either)."""
    stack, equals, choice = text.rpartition("=")
    try:
        numbers = [int(number) for number in choice.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a number of layers (6), their numbers from 0 (0,2,5), or either for a stack (decoder=2)"
        ) from None
    layers = numbers if "," in choice else numbers[0]
    return (stack, layers) if equals else layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, named as those of `build_student`."""
    parser.add_argument("teacher", help="Hub name or folder of the teacher")
    parser.add_argument("output", type=Path, help="folder for the student; new or empty")
    parser.add_argument(
        "--layers",
        type=parse_layers,
        nargs="+",
        metavar="LAYERS",
        help="how many to keep, evenly spread (6), or which, from 0 (0,2,5); by stack: encoder=6 decoder=2",
    )
    parser.add_argument("--hidden_size", type=int, help="width of the residual stream")
    parser.add_argument("--heads", type=int, help="attention heads to keep")
    parser.add_argument("--intermediate_size", type=int, help="width of the feed-forward layers")
    parser.add_argument(
        "--init",
        default="slice",
        choices=("slice", "importance", "svd", "random"),
        help="where a narrower student's weights come from (default: %(default)s)",
    )
    parser.add_argument("--architecture", help="model_type to copy into, e.g. distilbert")
    parser.add_argument("--corpus", type=Path, help="text file, a text a line: tokens it does not need are dropped")
    parser.add_argument("--tokenizer", help="Hub name or folder of the tokenizer (default: the teacher's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights that are new (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Builds the student, saves it with its tokenizer and prints what was copied.

    Raises:
        ValueError: the folder holds something already, or the student cannot be built so.
    """
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already and is not an empty folder. Choose another one.")
    from hf_distill.recipes.progress import quiet_libraries

    with quiet_libraries():
        _build(arguments, output)


def _build(arguments: argparse.Namespace, output: Path) -> None:
    from hf_distill.models.student import build_student

    tokenizer = _tokenizer(arguments.tokenizer or arguments.teacher, needed=arguments.tokenizer or arguments.corpus)
    names = ("hidden_size", "heads", "intermediate_size", "init", "architecture", "seed")
    built = build_student(
        arguments.teacher,
        layers=_layers(arguments.layers),
        tokenizer=tokenizer,
        corpus=arguments.corpus.read_text(encoding="utf-8").splitlines() if arguments.corpus else None,
        **{name: getattr(arguments, name) for name in names},
    )
    built.model.save_pretrained(output)
    if built.tokenizer is not None:
        built.tokenizer.save_pretrained(output)
    print(built.report)
    print(f"Saved in {output}" + ("" if built.tokenizer is not None else " without a tokenizer: none was found."))


def _layers(choices: list[Any] | None) -> Any:
    if choices is None:
        return None
    if all(isinstance(choice, tuple) for choice in choices):
        return dict(choices)
    if len(choices) == 1:
        return choices[0]
    raise ValueError(
        f"--layers {choices}: give one number, one list with commas (0,2,5), or every part with its stack "
        "(encoder=6 decoder=2)."
    )


def _tokenizer(name: str, *, needed: Any) -> Any:
    """The tokenizer or processor of that name; None where it has none and none was asked for."""
    from transformers import AutoProcessor, AutoTokenizer

    # A speech or vision model has a processor or an image processor, which Auto finds in this order.
    for auto in (AutoTokenizer,) if needed else (AutoProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = error
    if needed:
        raise ValueError(f"No tokenizer could be loaded from {name!r}: {reason}") from reason
    return None
