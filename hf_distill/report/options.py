"""How a report is measured."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The keywords of `make_report`.

    Attributes:
        undistilled: the student trained without the teacher, a module, name or path; it reads the student's inputs.
        processing_class: the student's tokenizer or processor; that of a student's folder is found there.
        teacher_processing_class: the teacher's, where it is another; likewise.
        data_collator: None takes the one that pads for the task.
        compute_metrics: as of `Trainer`, given the labelled rows alone; None takes `compute_metrics_for` the task.
        preprocess_logits_for_metrics: as of `Trainer`. A language model's `compute_metrics` gets what this returns, by
            default the likeliest tokens and their labels' negative log-likelihoods: the logits of all rows are never
            kept. Its accuracy and perplexity are there without either.
        metric: the score that retention refers to; None takes accuracy of classes and choices, f1_micro of several
            labels, mse of numbers, entity_f1 of IOB2 tags, f1 of answers, perplexity of language models, or else the
            first score there is.
        higher_is_better: of that score; None tells by its name: not of losses, errors and perplexities.
        baselines: what is made of the teacher to compare the student with: `hf_distill.report.baselines.BASELINES`.
        batch_sizes: of the latency grid.
        lengths: of the latency grid, in tokens (samples, of sound); None takes the median and the greatest of the
            rows. Images have none.
        repeats: timed passes of each cell of the grid; None takes 30, or as many as a cell has time for where a pass
            takes long, at least 10.
        warm_up: passes before them.
        threads: of the processor, while this measures; None leaves their number.
        device: None takes the student's, or the accelerator for a student given by name.
        batch_size: rows at once where quality is measured; None takes that of the training's evaluations, where there
            is a record of it, or 32.
        data_name: what the data set is called; None takes the name it has.
        output_dir: where `report.json`, `report.md` and the plots are written; None writes nothing.
        training: the run's record; that of a student's folder is found there.
        progress: is told what is measured next, in a line; `print` will do. None tells nobody.

    Raises:
        ValueError: a number of threads or rows below 1.
    """

    undistilled: nn.Module | str | os.PathLike | None = None
    processing_class: Any | None = None
    teacher_processing_class: Any | None = None
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None
    metric: str | None = None
    higher_is_better: bool | None = None
    baselines: Sequence[str] = ("int8", "pruned", "low_rank")
    batch_sizes: Sequence[int] = (1, 8, 32)
    lengths: Sequence[int] | None = None
    repeats: int | None = None
    warm_up: int = 5
    threads: int | None = None
    device: str | torch.device | None = None
    batch_size: int | None = None
    data_name: str | None = None
    output_dir: str | os.PathLike | None = None
    training: Mapping[str, Any] | None = None
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a whole number, at least 1.")
        for name in ("batch_sizes", "lengths"):
            values = getattr(self, name) or ()
            if any(value < 1 for value in values):
                raise ValueError(f"{name} is {list(values)}; expected whole numbers, at least 1.")


def check_device(device: str | torch.device | None, where: str) -> None:
    """Refuses a device that this machine has not.

    Args:
        device: as torch writes it, with or without a number; None is none in particular.
        where: what it is called, for the error.

    Raises:
        ValueError: with the devices there are.
    """
    if device is None:
        return
    there = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        there += [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{where}={str(device)!r} is no device of torch's. There are: {', '.join(there)}.") from error
    if wanted.type != "cpu" and f"{wanted.type}:{wanted.index or 0}" not in there:
        raise ValueError(f"{where}={str(device)!r} is not on this machine. There are: {', '.join(there)}.")
