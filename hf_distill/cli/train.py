"""`hf-distill train RECIPE`: a training that is written down."""

import argparse
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from hf_distill.recipes.recipe import Recipe

DESCRIPTION = "Train a student as a recipe says: models, data and arguments in a YAML file."
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and what of it is changed."""
    parser.usage = "hf-distill train RECIPE [--KEY VALUE ...] [--resume] [--dry_run]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _keys()
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; its paths begin at the working directory")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir, if any")
    parser.add_argument("--dry_run", action="store_true", help="load and check everything, and train nothing")


def _keys() -> str:
    """The keys of a recipe with what they mean."""
    lines = [
        "--KEY VALUE changes the recipe: any field of DistillationTrainingArguments (--learning_rate 1e-4), or one of",
        "these keys (--student.layers 3). Values are YAML: --data.columns '{text: sentence}'.",
        "All keys and fields with their defaults are in docs/options.md.",
        "",
    ]
    for name, hint in get_type_hints(Recipe).items():
        lines += _lines(name, hint)
    return "\n".join(lines)


def _lines(name: str, hint: Any) -> list[str]:
    own = next(field for field in fields(Recipe) if field.name == name)
    if not is_dataclass(hint):
        return [f"  {name:28}{own.metadata['help']}"]
    return [f"  {f'{name}.{field.name}':28}{field.metadata['help']}" for field in fields(hint)]


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints the metrics.

    Raises:
        ValueError: the recipe is wrong, or cannot be trained.
    """
    from accelerate import PartialState

    from hf_distill.cli.tables import print_values
    from hf_distill.recipes.reading import read_recipe
    from hf_distill.recipes.run import run_recipe
    from hf_distill.report.markdown import headline, results_table

    recipe = read_recipe(arguments.recipe, arguments.more)
    trained = run_recipe(recipe, resume=arguments.resume, dry_run=arguments.dry_run)
    if trained is None or not PartialState().is_main_process:
        return
    print_values(trained.metrics)
    if trained.report is not None:
        print(f"\n{headline(trained.report)}\n\n{results_table(trained.report)}\n")
    print(f"The student is in {trained.folder}.")
