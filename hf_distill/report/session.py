"""The models of one report, measured on the same rows and timed in turns."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from hf_distill.collator import TEACHER_POSITIONS
from hf_distill.dataset_checks import find_label, kind_of_label
from hf_distill.models.heads import context_length, task_model
from hf_distill.pairing import ModelPair, pair_models, special_tokens
from hf_distill.provenance import public_name, without_paths_inside
from hf_distill.report.baselines import baselines_of
from hf_distill.report.contenders import Comparison, Contender, as_student, as_teacher, as_undistilled, at_work
from hf_distill.report.cost import FAILURES, Runner, measure_cost, measure_latencies
from hf_distill.report.loading import is_name, load_trained
from hf_distill.report.options import ReportOptions
from hf_distill.report.quality import Scorer
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, UNDISTILLED, ModelResult, Quality, Timing
from hf_distill.report.rows import make_rows
from hf_distill.report.sample_batches import SampleBatches
from hf_distill.setup import teacher_tokenizer
from hf_distill.signals import Task
from hf_distill.teachers import LocalTeacher, SparseTeacher, Teacher

_NO_HEAD = "It has no head, so there are no choices to compare."
_NO_COST = "What it costs could not be measured"
# Where nobody says how often: 30 passes of a large batch would take minutes, and long passes vary less.
_REPEATS, _SECONDS = 30, 4.0
_OTHER_TOKENS = "It reads tokens of its own, and the labels are the student's: it has no score of the task."


@dataclass(frozen=True)
class _Entry:
    """A model on its way into the report."""

    name: str
    kind: str
    contender: Contender
    size_bytes: int | None = None


class Session:
    """What all models of a report have in common, and the models.

    Teacher, student and undistilled student are in memory together, and are timed in turns. Of the baselines, each as
    large as the teacher, there is one at a time: it takes turns with the teacher, which is timed once more for it, and
    its times are brought to the pace that the machine had before by the ratio of the teacher's two medians.

    Attributes:
        metric: the score that retention refers to, once `results` has measured the teacher.

    Args:
        student: on the device, in evaluation mode.
        teacher: a module like the student, or a `Teacher`.
        dataset: the rows.
        options: of the report.
        teacher_name: as the caller gave the teacher.
        processing_class: the student's, if any.
        batch_size: rows at once.
        device: where batches go.

    Raises:
        ValueError: the models do not fit together, or there is no row.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        dataset: Any,
        options: ReportOptions,
        *,
        teacher_name: Any,
        processing_class: Any | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.student, self.teacher = student, teacher if isinstance(teacher, nn.Module) else teacher.model
        local = LocalTeacher(self.teacher)
        # What names a few classes in a training is asked for all of them here, and a model without autocast.
        self._is_other = not isinstance(teacher, nn.Module | SparseTeacher) and type(teacher) is not LocalTeacher
        asked: Any = teacher if self._is_other else local
        tokenizer = options.teacher_processing_class
        if tokenizer is None:
            tokenizer = teacher_tokenizer(teacher_name if is_name(teacher_name) else None, local, processing_class)
        self._options, self._device, self._processing_class = options, device, processing_class
        self._say = options.progress or (lambda line: None)
        self.pair = pair_models(
            student,
            self.teacher,
            student_tokenizer=processing_class,
            teacher_tokenizer=tokenizer,
            token_alignment="offsets" if _has_positions(dataset) else "none",
            device=device,
        )
        rows = make_rows(
            dataset,
            task=self.pair.task,
            student=student,
            teacher=self.teacher,
            processing_class=processing_class,
            teacher_processing_class=tokenizer,
            data_collator=options.data_collator,
            batch_size=batch_size,
        )
        self.scorer = _scorer(student, self.pair, dataset, options)
        self._comparison = Comparison(
            rows,
            self.pair,
            student=student,
            teacher=asked,
            scorer=self.scorer,
            special_tokens=special_tokens(processing_class, device),
            device=device,
        )
        self._rows = rows
        self.metric: str | None = None

    def results(self) -> Iterator[ModelResult]:
        """The teacher, the student and the undistilled student, then each baseline when it is measured.

        Raises:
            ValueError: the metric wanted is none of the teacher's scores.
        """
        first = self._first()
        yield from first
        reference = first[0].cost
        yield from self._baselines(() if reference is None else reference.timings)

    def _first(self) -> list[ModelResult]:
        teacher = as_teacher(self.teacher, self.pair, is_reference=True)
        entries = [
            _Entry("teacher", TEACHER, teacher),
            _Entry("student", STUDENT, as_student(self.student, self.pair)),
        ]
        with ExitStack() as stack:
            if self._options.undistilled is not None:
                undistilled = self._undistilled(self._options.undistilled, stack)
                entries.append(_Entry("student, undistilled", UNDISTILLED, undistilled))
            qualities = [self._quality(entry) for entry in entries]
            runners = [self._runner(entry.contender) for entry in entries]
            timed = self._latencies(runners, ", ".join(entry.name for entry in entries))
            found = [self._result(*each) for each in zip(entries, qualities, runners, timed, strict=True)]
        notes = []
        if self.pair.task is not Task.EMBEDDING and not teacher.labelled:
            notes.append(_OTHER_TOKENS)
        if self._is_other:
            notes.append(f"What it costs is measured on its {type(task_model(self.teacher)).__name__} alone.")
        found[0] = _noted(found[0], found[0].note, *notes)
        if self.pair.vocabulary is not None and not self.pair.vocabulary.is_whole:
            found[1] = _noted(found[1], str(self.pair.vocabulary), found[1].note)
        return found

    def _undistilled(self, given: Any, stack: ExitStack) -> Contender:
        model = load_trained(given, "undistilled", like=self.student) if is_name(given) else given
        stack.enter_context(at_work(model, self._device))
        # As if it taught the student: that brings its classes into the student's order.
        own_pair = pair_models(
            self.student,
            model,
            student_tokenizer=self._processing_class,
            teacher_tokenizer=self._processing_class,
            device=self._device,
        )
        return as_undistilled(model, own_pair, self.pair)

    def _baselines(self, reference: Sequence[Timing]) -> Iterator[ModelResult]:
        samples = self._samples(as_teacher(self.teacher, self.pair))
        example = samples(1, self._lengths(samples)[0])
        for name in self._options.baselines:
            called = f"teacher, {name}"
            self._say(f"{called}: made")
            _, model, size_bytes, note = next(baselines_of(self.teacher, (name,), example=example))
            if model is None:
                yield ModelResult(called, BASELINE, note=note)
                continue
            try:
                found = self._baseline(called, model, size_bytes, reference)
                found = _noted(found, note, found.note)
            except Exception as error:  # whatever a smaller model cannot do is worth a note, and not the report
                found = ModelResult(called, BASELINE, note=_failure("It could not be measured", error))
            del model  # or it would be in memory while the next is made
            yield found

    def _baseline(
        self, name: str, model: nn.Module, size_bytes: int | None, reference: Sequence[Timing]
    ) -> ModelResult:
        entry = _Entry(name, BASELINE, as_teacher(model, self.pair), size_bytes)
        quality = self._quality(entry)
        runner = self._runner(entry.contender)
        beside, timed = self._latencies([self._runner(as_teacher(self.teacher, self.pair)), runner], name)
        if not isinstance(beside, Exception) and not isinstance(timed, Exception):
            timed = _on_the_first_machine(timed, beside, reference)
        return replace(self._result(entry, quality, runner, timed), source=None)

    def _quality(self, entry: _Entry) -> Quality | None:
        if self.pair.task is Task.EMBEDDING:
            return None
        self._say(f"{entry.name}: scores")
        quality = self._comparison.quality(entry.contender)
        if self.metric is None and quality.metrics:  # refused, if it must be, before the work is done
            self.metric = self.scorer.metric(self._options.metric, quality.metrics)
        return quality

    def _runner(self, contender: Contender) -> Runner:
        samples = self._samples(contender)
        return Runner(contender.model, samples, self._lengths(samples))

    def _latencies(self, runners: Sequence[Runner], names: str) -> list[tuple[Timing, ...] | Exception]:
        def say(batch_size: int, length: int | None) -> None:
            self._say(f"{names}: latency, batch {batch_size}" + ("" if length is None else f", length {length}"))

        options = self._options
        return measure_latencies(
            runners,
            batch_sizes=options.batch_sizes,
            repeats=options.repeats or _REPEATS,
            warm_up=options.warm_up,
            seconds=_SECONDS if options.repeats is None else math.inf,
            progress=say,
        )

    def _result(
        self, entry: _Entry, quality: Quality | None, runner: Runner, timed: Sequence[Timing] | Exception
    ) -> ModelResult:
        model, cost = runner.model, None
        inner = task_model(model)
        notes = [_NO_HEAD] if quality is None else []
        limit = context_length(model)
        if limit is not None and any(length is not None and length > limit for length in runner.lengths):
            notes.append(f"It reads {limit} tokens at most, so longer rows are not timed.")
        if isinstance(timed, Exception):
            notes.append(_failure(_NO_COST, timed))
        else:
            try:
                cost = measure_cost(
                    model,
                    make_batch=runner.make_batch,
                    batch_sizes=self._options.batch_sizes,
                    lengths=runner.lengths,
                    repeats=self._options.repeats or _REPEATS,
                    warm_up=self._options.warm_up,
                    size_bytes=entry.size_bytes,
                    timings=timed,
                )
            except FAILURES as error:
                notes.append(_failure(_NO_COST, error))
        source, _ = public_name(getattr(inner, "name_or_path", None), getattr(inner.config, "_commit_hash", None))
        return ModelResult(entry.name, entry.kind, source, quality, cost, " ".join(notes) or None)

    def _samples(self, contender: Contender) -> SampleBatches:
        def read(collated: Any) -> Any:
            return contender.inputs(*self._comparison.split(collated))

        return SampleBatches(self._rows, contender.model, task=self.pair.task, inputs_of=read)

    def _lengths(self, samples: SampleBatches) -> tuple[int | None, ...]:
        """Those asked for, or the usual ones of the student's rows: the same for all models."""
        if not hasattr(self, "_usual"):
            student = self._samples(as_student(self.student, self.pair))
            if self._options.lengths is not None and not student.has_length:
                raise ValueError(
                    f"lengths={list(self._options.lengths)}, but the inputs of {type(self.student).__name__} have one "
                    "size. Drop it."
                )
            asked = self._options.lengths
            self._usual = student.usual_lengths() if asked is None else tuple(sorted(asked))
        return self._usual if samples.has_length else (None,)


def _scorer(student: nn.Module, pair: ModelPair, dataset: Any, options: ReportOptions) -> Scorer:
    config = task_model(student).config
    kind = kind_of_label(pair.task, config, find_label(dataset, pair.task, required=False))
    if pair.task is Task.SEQUENCE_CLASSIFICATION and pair.problem_type is not None:
        kind = pair.problem_type
    named = pair.task.has_named_labels and kind != "regression"
    return Scorer(
        pair.task,
        kind,
        class_names=[str(config.id2label[number]) for number in sorted(config.id2label)] if named else None,
        compute_metrics=options.compute_metrics,
        preprocess=options.preprocess_logits_for_metrics,
    )


def _has_positions(dataset: Any) -> bool:
    names = getattr(dataset, "column_names", None)
    if names is None:
        names = next(iter(islice(dataset, 1)), ())
    return TEACHER_POSITIONS in names


def _on_the_first_machine(
    timings: Sequence[Timing], beside: Sequence[Timing], first: Sequence[Timing]
) -> tuple[Timing, ...]:
    """A baseline's times, had the machine been as fast as when the first models were timed.

    Args:
        timings: of the baseline.
        beside: of the teacher that took turns with it.
        first: of the teacher among the first. A cell that is not in both teachers' grids is left as it is.
    """
    now, before = ({(each.batch_size, each.length): each.p50_ms for each in grid} for grid in (beside, first))
    found = []
    for each in timings:
        cell = (each.batch_size, each.length)
        pace = before[cell] / now[cell] if before.get(cell) and now.get(cell) else 1.0
        found.append(
            replace(
                each,
                p50_ms=each.p50_ms * pace,
                p95_ms=each.p95_ms * pace,
                rows_per_second=each.rows_per_second / pace,
            )
        )
    return tuple(found)


def _noted(result: ModelResult, *notes: str | None) -> ModelResult:
    return replace(result, note=" ".join(filter(None, notes)) or None)


def _failure(what: str, error: Exception) -> str:
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{what}: {without_paths_inside(message).rstrip('.')}."
