"""`make_report`: a teacher, its student and what one would try instead, on the same rows."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_distill.config.checks import did_you_mean
from hf_distill.files import whole_file
from hf_distill.metrics.direction import smaller_is_better
from hf_distill.provenance import describe_data, public_name
from hf_distill.report.baselines import BASELINES
from hf_distill.report.contenders import at_work
from hf_distill.report.environment import environment
from hf_distill.report.loading import is_name, load_models, load_processing_class, read_run_record
from hf_distill.report.markdown import to_markdown
from hf_distill.report.options import ReportOptions, check_device
from hf_distill.report.plots import PLOTS, write_plots
from hf_distill.report.results import Report
from hf_distill.report.rows import check_rows
from hf_distill.report.session import Session
from hf_distill.teachers import Teacher

_BATCH_SIZE = 32


def make_report(
    teacher: nn.Module | Teacher | str | os.PathLike,
    student: nn.Module | str | os.PathLike,
    dataset: Any,
    **options: Any,
) -> Report:
    """What the student kept of the teacher, and what each of them costs, measured on the same rows.

    Models are left as and where they were. They run in the dtype they have, without autocast, so that a student from a
    training and the same from its folder give the same numbers. What is random in a batch (masks) is the same for all.

    Latencies are taken in turns, so that a machine that slows down does so for all: teacher, student and undistilled
    student are in memory together. Of the baselines there is one at a time, and the teacher is timed again beside it.

    Args:
        teacher: a module; a name or path, loaded with the student's kind of head; or a `Teacher`.
        student: a module, or the name or path of a trained model.
        dataset: tokenised rows, as the student's collator takes them, with `teacher_*` columns where the teacher reads
            tokens of its own. Rows without labels count for agreement and KL, not for the task's metrics.
        options: the attributes of `hf_distill.report.options.ReportOptions`.

    Raises:
        ValueError: the models do not fit together, as in a training; a metric that there is not; lengths of inputs
            that have none; no row; a device that this machine has not.
        TypeError: an unknown option, or a model that is none.
    """
    known = [own.name for own in fields(ReportOptions)]
    for name in options:
        if name not in known:
            raise TypeError(f"A report has no option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    chosen = ReportOptions(**options)
    check_device(chosen.device, "device")
    with _threads(chosen.threads):
        report = _measured(teacher, student, dataset, chosen)
    if chosen.output_dir is not None:
        write_report(report, chosen.output_dir)
    return report


def write_report(report: Report, folder: str | os.PathLike) -> None:
    """Writes `report.json`, the plots that there is data for, and `report.md`, in place of an earlier report's.

    Without matplotlib there are no plots, and a warning says how to have them.
    """
    folder = Path(folder)
    for name in PLOTS:
        (folder / name).unlink(missing_ok=True)  # what this report has not was another's
    report.write_json(folder / "report.json")
    plots: Sequence[Path] = ()
    try:
        plots = write_plots(report, folder)
    except ImportError as error:
        warnings.warn(f"The report is written without plots. {error}", stacklevel=3)
    with whole_file(folder / "report.md") as whole:
        whole.write_text(to_markdown(report, plots=plots), encoding="utf-8")


def _measured(teacher: Any, student: Any, dataset: Any, options: ReportOptions) -> Report:
    check_rows(dataset)
    for name in options.baselines:
        BASELINES.get(name)  # refuses an unknown one
    training = read_run_record(student) if options.training is None else options.training
    known = (training or {}).get("arguments", {}).get("per_device_eval_batch_size")
    batch_size = options.batch_size or known or _BATCH_SIZE
    processing_class = options.processing_class or load_processing_class(student)
    by_name = is_name(student)
    model, source = load_models(student, teacher)
    device = _device(options.device, model, by_name=by_name)
    with ExitStack() as stack:
        for each in (model, source if isinstance(source, nn.Module) else source.model):
            stack.enter_context(at_work(each, device))
        session = Session(
            model,
            source,
            dataset,
            options,
            teacher_name=teacher,
            processing_class=processing_class,
            batch_size=batch_size,
            device=device,
        )
        models = tuple(session.results())
        metric = session.scorer.metric(options.metric, {}) if session.metric is None else session.metric
        surroundings = environment(
            {"teacher": session.teacher, "student": session.student}, device, latency=_method(options)
        )
    higher = options.higher_is_better
    if higher is None:
        higher = metric is None or not smaller_is_better(metric)
    return Report(
        task=str(session.pair.task),
        data=_data(dataset, options.data_name),
        metric=metric,
        higher_is_better=higher,
        models=models,
        environment=surroundings,
        training=training,
    )


def _data(dataset: Any, name: str | None) -> dict[str, Any]:
    found = dict(describe_data(dataset))
    return found if name is None else {**found, "name": public_name(name)[0]}


def _method(options: ReportOptions) -> str:
    timed = "up to 30 (10 where they take long)" if options.repeats is None else options.repeats
    return (
        f"one forward pass without gradients of rows without padding; {timed} timed after "
        f"{options.warm_up} to warm up, the models in turns; median (p50) and 95th percentile (p95); baselines in "
        "turns with the teacher, as multiples of its time"
    )


def _device(wanted: str | torch.device | None, student: nn.Module, *, by_name: bool) -> torch.device:
    if wanted is not None:
        return torch.device(wanted)
    accelerator = torch.accelerator.current_accelerator() if by_name and torch.accelerator.is_available() else None
    return next(student.parameters()).device if accelerator is None else accelerator


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
