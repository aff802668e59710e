"""The models of one report, measured one after another."""

from collections.abc import Iterator
from dataclasses import replace
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
from hf_distill.report.cost import measure_cost
from hf_distill.report.loading import is_name, load_trained
from hf_distill.report.options import ReportOptions
from hf_distill.report.quality import Scorer
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, UNDISTILLED, Cost, ModelResult, Quality
from hf_distill.report.rows import make_rows
from hf_distill.report.sample_batches import SampleBatches
from hf_distill.setup import teacher_tokenizer
from hf_distill.signals import Task
from hf_distill.teachers import LocalTeacher, SparseTeacher, Teacher

_NO_HEAD = "It has no head, so there are no choices to compare."
_OTHER_TOKENS = "It reads tokens of its own, and the labels are the student's: it has no score of the task."


class Session:
    """What all models of a report have in common, and the models.

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

    def results(self) -> Iterator[ModelResult]:
        """The teacher, the student, the undistilled student and the baselines, each when it is measured."""
        teacher = as_teacher(self.teacher, self.pair, is_reference=True)
        found = self._result("teacher", TEACHER, teacher)
        notes = [found.note] if found.note else []
        if self.pair.task is not Task.EMBEDDING and not teacher.labelled:
            notes.append(_OTHER_TOKENS)
        if self._is_other:
            notes.append(f"What it costs is measured on its {type(task_model(self.teacher)).__name__} alone.")
        yield replace(found, note=" ".join(notes) or None)
        found = self._result("student", STUDENT, as_student(self.student, self.pair))
        if self.pair.vocabulary is not None and not self.pair.vocabulary.is_whole:
            found = replace(found, note=" ".join(filter(None, (str(self.pair.vocabulary), found.note))))
        yield found
        if self._options.undistilled is not None:
            yield self._undistilled(self._options.undistilled)
        yield from self._baselines()

    def _undistilled(self, given: Any) -> ModelResult:
        model = load_trained(given, "undistilled", like=self.student) if is_name(given) else given
        with at_work(model, self._device):
            # As if it taught the student: that brings its classes into the student's order.
            own_pair = pair_models(
                self.student,
                model,
                student_tokenizer=self._processing_class,
                teacher_tokenizer=self._processing_class,
                device=self._device,
            )
            contender = as_undistilled(model, own_pair, self.pair)
            return self._result("student, undistilled", UNDISTILLED, contender)

    def _baselines(self) -> Iterator[ModelResult]:
        samples = self._samples(as_teacher(self.teacher, self.pair))
        example = samples(1, self._lengths(samples)[0])
        for name, model, size_bytes, note in baselines_of(self.teacher, self._options.baselines, example=example):
            called = f"teacher, {name}"
            if model is None:
                yield ModelResult(called, BASELINE, note=note)
                continue
            try:
                found = self._result(called, BASELINE, as_teacher(model, self.pair), size_bytes=size_bytes)
                found = replace(found, source=None, note=" ".join(filter(None, (note, found.note))) or None)
            except Exception as error:  # whatever a smaller model cannot do is worth a note, and not the report
                found = ModelResult(called, BASELINE, note=_failure("It could not be measured", error))
            del model  # or it would be in memory while the next is made
            yield found

    def _result(self, name: str, kind: str, contender: Contender, *, size_bytes: int | None = None) -> ModelResult:
        inner = task_model(contender.model)
        quality: Quality | None = None
        notes = []
        if self.pair.task is Task.EMBEDDING:
            notes.append(_NO_HEAD)
        else:
            quality = self._comparison.quality(contender)
        cost: Cost | None = None
        samples = self._samples(contender)
        lengths = self._lengths(samples)
        limit = context_length(contender.model)
        if limit is not None and any(length is not None and length > limit for length in lengths):
            notes.append(f"It reads {limit} tokens at most, so longer rows are not timed.")
        try:
            cost = measure_cost(
                contender.model,
                make_batch=samples,
                batch_sizes=self._options.batch_sizes,
                lengths=lengths,
                repeats=self._options.repeats,
                warm_up=self._options.warm_up,
                size_bytes=size_bytes,
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
            notes.append(_failure("What it costs could not be measured", error))
        source, _ = public_name(getattr(inner, "name_or_path", None), getattr(inner.config, "_commit_hash", None))
        return ModelResult(name, kind, source, quality, cost, " ".join(notes) or None)

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


def _failure(what: str, error: Exception) -> str:
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{what}: {without_paths_inside(message).rstrip('.')}."
