"""A report on models and rows that are given by name."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.recipes.data import eval_rows, metrics_of, prepare, text_length
from hf_distill.recipes.models import named, with_processors
from hf_distill.recipes.recipe import DataPart, Recipe
from hf_distill.report import make_report
from hf_distill.report.loading import load_trained, read_run_record
from hf_distill.report.options import check_device
from hf_distill.report.results import Report
from hf_distill.teachers import load_teacher
from hf_distill.text.preparation import prepare_text


def report_of_recipe(recipe: Recipe, options: Mapping[str, Any]) -> Report:
    """The report on a recipe's models and the rows of its `data.eval`.

    Args:
        recipe: both models by name.
        options: of `make_report`.

    Raises:
        ValueError: models or rows that cannot be compared, or a device that is not there.
    """
    check_device(options.get("device"), "--device")
    student_name, data = recipe.student.name, recipe.data
    assert student_name is not None
    assert recipe.teacher.name is not None
    with named("--teacher", recipe.teacher.name):
        teacher = load_teacher(recipe.teacher.name, None)
    with named("--student", student_name):
        student = load_trained(student_name, "student", like=teacher)
    models = with_processors(recipe, student, teacher=teacher)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(output_dir=folder, report_to="none")
    is_text = models.task == "text-generation"
    rows = prepare(None, eval_rows(data), replace(data, max_length=None) if is_text else data, models, args).eval
    if is_text:
        args.max_length = text_length(data, models)
        rows = prepare_text(rows, models.processor, args, name="the data")
    if torch.accelerator.is_available():
        options = {"device": torch.accelerator.current_accelerator(), **options}
    return make_report(
        teacher,
        models.student,
        rows,
        processing_class=models.processor,
        teacher_processing_class=models.teacher_processor,
        compute_metrics=metrics_of(models, True),
        training=read_run_record(student_name),
        **{"data_name": data_name(data), **options},
    )


def data_name(data: DataPart, *, is_held_out: bool = False) -> str:
    """What the rows to evaluate on are called, without where they lie.

    Args:
        data: where they come from.
        is_held_out: whether they are some of the split to train on.
    """
    source = data.train if data.eval is None else data.eval
    name = Path(source).name if Path(source).exists() else source
    return f"{name}, held out" if is_held_out else name
