"""The demo: a teacher with every label, and one small student with few labels, alone and distilled."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, set_seed

from hf_distill.demo.corpus import keep_labels, labelled_rows, load_corpus
from hf_distill.demo.measurement import Scores, measure_cost, predict_logits, score
from hf_distill.demo.models import STUDENT_SHAPE, TEACHER_SHAPE, build_classifier, load_classifier, load_tokenizers
from hf_distill.demo.results import DemoResults, ModelResult
from hf_distill.demo.settings import DemoSettings
from hf_distill.demo.training import Run, distil, encode, train_on_labels
from hf_distill.recipes.progress import quiet_libraries

PRETRAINED_LEARNING_RATE = 1e-4
TEACHER_LEARNING_RATE = 2e-3
STUDENT_LEARNING_RATE = 3e-3
TEACHER_SEED = 0
ALONE, DISTILLED, ALL_LABELS = "student alone", "student distilled", "student all labels"


def run_demo(settings: DemoSettings, console: Console | None = None) -> DemoResults:
    """Trains and measures everything, writes `results.json` and two models to `output_dir`; returns the results."""
    start = time.perf_counter()
    columns = (TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _quiet(settings.threads), Progress(*columns, console=console) as progress:
        experiment = Experiment(settings, progress)
        teacher = experiment.train_teacher()
        for seed in range(settings.seeds):
            experiment.train_students(seed)
        students = experiment.student_results()
    results = DemoResults(
        settings=settings,
        teacher=teacher,
        students=students,
        test_rows=len(experiment.test),
        seconds=time.perf_counter() - start,
    )
    results.write_json(Path(settings.output_dir) / "results.json")
    return results


class Experiment:
    """The data, the teacher, and the scores of the students so far.

    Args:
        settings: what to train, on what, for how long.
        progress: gets one bar for each training.
    """

    def __init__(self, settings: DemoSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.corpus = load_corpus(
            settings.dataset, text_column=settings.text_column, label_column=settings.label_column
        )
        self.student_tokenizer, self.teacher_tokenizer = load_tokenizers(
            settings.student, settings.teacher, self.corpus.train["text"]
        )
        same = self.student_tokenizer.get_vocab() == self.teacher_tokenizer.get_vocab()
        self.other_teacher_tokenizer = None if same else self.teacher_tokenizer
        self.labelled, self.test = labelled_rows(self.corpus.train), labelled_rows(self.corpus.test)
        self.student_test = self._encode(self.test)
        self.scores: dict[str, list[Scores]] = {ALONE: [], DISTILLED: [], ALL_LABELS: []}
        self.distilled: PreTrainedModel | None = None

    def train_teacher(self) -> ModelResult:
        """Trains the teacher on every label, or takes it as it comes if it has no steps to train."""
        settings, names, tokenizer = self.settings, self.corpus.label_names, self.teacher_tokenizer
        if settings.teacher is not None and settings.teacher_steps == 0:
            self.teacher = load_classifier(settings.teacher, label_names=names)
        else:
            set_seed(TEACHER_SEED)
            self.teacher = build_classifier(
                settings.teacher, shape=TEACHER_SHAPE, tokenizer=tokenizer, label_names=names
            )
            rate = settings.teacher_learning_rate
            if rate is None:
                rate = PRETRAINED_LEARNING_RATE if settings.teacher else TEACHER_LEARNING_RATE
            rows = encode(self.labelled, tokenizer, max_length=settings.max_length)
            run = self._run("teacher", seed=TEACHER_SEED, steps=settings.teacher_steps, learning_rate=rate)
            train_on_labels(self.teacher, rows, tokenizer, run)
        test = encode(self.test, tokenizer, max_length=settings.max_length)
        self.teacher_logits = predict_logits(self.teacher, test, tokenizer)
        return ModelResult(
            model="teacher",
            labels=len(self.labelled) if settings.teacher_steps else None,
            unlabelled=0,
            runs=(score(self.teacher_logits, self.teacher_logits, self.test["label"]),),
            cost=measure_cost(self.teacher, tokenizer, test, Path(settings.output_dir) / "teacher"),
        )

    def train_students(self, seed: int) -> None:
        """Trains the three students of a seed, from the same weights and for the same number of steps."""
        settings = self.settings
        rows = keep_labels(self.corpus, per_class=settings.labels_per_class, seed=seed)
        rate = settings.student_learning_rate
        if rate is None:
            rate = PRETRAINED_LEARNING_RATE if settings.student else STUDENT_LEARNING_RATE
        for kind, scores in self.scores.items():
            set_seed(seed)
            student = build_classifier(
                settings.student,
                shape=STUDENT_SHAPE,
                tokenizer=self.student_tokenizer,
                label_names=self.corpus.label_names,
            )
            run = self._run(f"{kind}, seed {seed}", seed=seed, steps=settings.student_steps, learning_rate=rate)
            if kind == DISTILLED:
                self._distil(student, rows, run)
            else:
                seen = labelled_rows(rows) if kind == ALONE else self.labelled
                train_on_labels(student, self._encode(seen), self.student_tokenizer, run)
            logits = predict_logits(student, self.student_test, self.student_tokenizer)
            scores.append(score(logits, self.teacher_logits, self.test["label"]))

    def student_results(self) -> tuple[ModelResult, ...]:
        """Returns a result for each kind of student, after saving the last distilled one."""
        assert self.distilled is not None
        # The students differ in what they learned from and not in size: one is weighed and timed for all.
        folder = Path(self.settings.output_dir) / "student"
        cost = measure_cost(self.distilled, self.student_tokenizer, self.student_test, folder)
        few = len(labelled_rows(keep_labels(self.corpus, per_class=self.settings.labels_per_class, seed=0)))
        seen = {
            ALONE: (few, 0),
            DISTILLED: (few, len(self.corpus.train) - few),
            ALL_LABELS: (len(self.labelled), 0),
        }
        return tuple(
            ModelResult(model=kind, labels=seen[kind][0], unlabelled=seen[kind][1], runs=tuple(scores), cost=cost)
            for kind, scores in self.scores.items()
        )

    def _distil(self, student: PreTrainedModel, rows: Dataset, run: Run) -> None:
        settings = self.settings
        distil(
            student,
            self.teacher,
            encode(
                rows,
                self.student_tokenizer,
                max_length=settings.max_length,
                teacher_tokenizer=self.other_teacher_tokenizer,
            ),
            self.student_tokenizer,
            run,
            teacher_tokenizer=self.other_teacher_tokenizer,
            temperature=settings.temperature,
            kd_weight=settings.kd_weight,
            task_weight=settings.task_weight,
        )
        self.distilled = student

    def _encode(self, rows: Dataset) -> Dataset:
        return encode(rows, self.student_tokenizer, max_length=self.settings.max_length)

    def _run(self, description: str, *, seed: int, steps: int, learning_rate: float) -> Run:
        task = self.progress.add_task(description, total=steps)
        return Run(
            steps=steps,
            batch_size=self.settings.batch_size,
            learning_rate=learning_rate,
            seed=seed,
            output_dir=self.settings.output_dir,
            on_step=lambda: self.progress.advance(task),
        )


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """Sets the CPU threads and silences other libraries' bars, and puts all of it back."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with quiet_libraries():
            yield
    finally:
        torch.set_num_threads(threads_before)
