"""`hf-distill report`: what a student kept of its teacher, and what it saves."""

import argparse
from pathlib import Path

DESCRIPTION = "Measure teacher and student on the same rows: quality, size, speed, and what else could be done."
# Of make_report, which knows what to do without each.
_NUMBERS = {
    "repeats": "timed runs of each point of the grid",
    "warm_up": "runs before these that are not timed",
    "threads": "CPU threads to time with",
    "batch_size": "rows at once where quality is measured",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, the rows, and how they are measured."""
    needed = parser.add_argument_group("what is compared")
    needed.add_argument("--teacher", required=True, help="Hub name or folder")
    needed.add_argument("--student", required=True, help="Hub name or folder")
    needed.add_argument("--undistilled", help="Hub name or folder of a student trained without the teacher")
    rows = parser.add_argument_group("on which rows")
    rows.add_argument("--dataset", required=True, help="file, folder, saved data set or Hub name")
    rows.add_argument("--config", help="configuration of a data set with several")
    rows.add_argument("--split", help="default: validation or test, where there is one")
    rows.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="as text=sentence label=intent")
    rows.add_argument("--max_length", type=int, help="tokens kept of a text (default: what both models read)")
    rows.add_argument("--task", help="checked against the models, as text-classification")
    rows.add_argument("--processor", help="tokenizer or processor of the student, if not with it")
    rows.add_argument("--teacher_processor", help="the same of the teacher")
    how = parser.add_argument_group("how")
    how.add_argument("--output_dir", type=Path, help="folder for report.json, report.md and the plots")
    how.add_argument("--metric", help="of the task's metrics, the one that retention is of")
    how.add_argument("--baselines", nargs="*", metavar="NAME", help="int8, pruned, low_rank; nothing behind it: none")
    how.add_argument("--batch_sizes", type=int, nargs="+", metavar="N", help="of the grid that is timed")
    how.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of the grid that is timed")
    for name, text in _NUMBERS.items():
        how.add_argument(f"--{name}", type=int, metavar="N", help=text)
    how.add_argument("--device", help="as cpu or cuda:0 (default: the first accelerator)")


def read_columns(pairs: list[str]) -> dict[str, str]:
    """NAME=COLUMN as a mapping.

    Raises:
        ValueError: one without an equals sign.
    """
    columns = {}
    for pair in pairs:
        name, _, column = pair.partition("=")
        if not (name and column):
            raise ValueError(f"--columns {pair}: write NAME=COLUMN, as text=sentence.")
        columns[name] = column
    return columns


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints the report, and writes it where a folder is named.

    Raises:
        ValueError: models or rows that cannot be compared.
    """
    from rich.console import Console

    from hf_distill.recipes.progress import TrainingProgress, quiet_libraries
    from hf_distill.recipes.recipe import TASKS, DataPart, Recipe, StudentPart, TeacherPart
    from hf_distill.recipes.values import check_folder

    if arguments.output_dir is not None:
        check_folder(arguments.output_dir, "--output_dir")

    if arguments.task is not None:
        from hf_distill.config.checks import check_choice

        check_choice("--task", arguments.task, TASKS)
    data = DataPart(
        train=arguments.dataset,
        eval=arguments.dataset,
        eval_split=arguments.split,
        config=arguments.config,
        columns=read_columns(arguments.columns),
        max_length=arguments.max_length,
    )
    student = StudentPart(name=arguments.student, processor=arguments.processor)
    teacher = TeacherPart(name=arguments.teacher, processor=arguments.teacher_processor)
    recipe = Recipe(data=data, student=student, teacher=teacher, task=arguments.task)
    names = ("undistilled", "metric", "baselines", "batch_sizes", "lengths", "device", "output_dir", *_NUMBERS)
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    from hf_distill.recipes.measure import report_of_recipe
    from hf_distill.report.markdown import headline, results_table

    progress = TrainingProgress(Console(stderr=True))
    with quiet_libraries():
        report = report_of_recipe(recipe, {"progress": progress.say, **options})
    print(f"{headline(report)}\n\n{results_table(report)}")
    if arguments.output_dir is not None:
        print(f"\nWritten: {arguments.output_dir}")
