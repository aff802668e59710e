"""From a recipe to a trained, measured and saved student."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PrinterCallback, Seq2SeqTrainingArguments, TrainingArguments

from hf_distill.arguments import Seq2SeqDistillationTrainingArguments
from hf_distill.checkpoints import check_undamaged, last_checkpoint, missing_part
from hf_distill.lineage import FINISHED, Lineage
from hf_distill.models.student.report import count_parameters
from hf_distill.recipes.checkpoints import check_checkpoint
from hf_distill.recipes.data import metrics_of, prepare, split_rows
from hf_distill.recipes.measure import data_name
from hf_distill.recipes.models import Models, adapters, load_models
from hf_distill.recipes.progress import TrainingProgress, quiet_libraries
from hf_distill.recipes.reading import stages_of
from hf_distill.recipes.recipe import Recipe
from hf_distill.recipes.values import check_folder
from hf_distill.report.options import check_device
from hf_distill.stage_plan import STAGES_FOLDER, Stage, plan_stages
from hf_distill.stage_runner import StageRunner
from hf_distill.stages import preset_stages, run_stages
from hf_distill.trainer import DistillationTrainer, Seq2SeqDistillationTrainer

_GENERATION = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)} - {
    field.name for field in dataclasses.fields(TrainingArguments)
}


@dataclass(frozen=True)
class Trained:
    """What a recipe leaves.

    Attributes:
        folder: where the student is.
        metrics: of the training and of the evaluation at its end.
        report: of teacher and student, if it was asked for.
    """

    folder: Path
    metrics: Mapping[str, float]
    report: Any | None = None


def run_recipe(
    recipe: Recipe, *, resume: bool = False, dry_run: bool = False, console: Console | None = None
) -> Trained | None:
    """Trains, evaluates and saves a student, and writes its report and card.

    Args:
        recipe: what to do.
        resume: go on from the last checkpoint, or begin where there is none.
        dry_run: load and check everything, make the first batch, train nothing and leave nothing.
        console: where progress is printed; None: standard error.

    Returns: what was trained; None of a dry run.

    Raises:
        ValueError: anything that cannot be trained as asked, before the first step.
    """
    progress = TrainingProgress(console or Console(stderr=True))
    with ExitStack() as stack:
        stack.callback(progress.close)
        stack.enter_context(quiet_libraries())
        arguments = dict(recipe.arguments)
        if "output_dir" not in arguments:
            raise ValueError("arguments.output_dir is missing: the folder for the student.")
        check_folder(arguments["output_dir"], "arguments.output_dir")
        check_device((recipe.report_options or {}).get("device"), "report.device")
        if dry_run:  # leaves no repository on the Hub either
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            arguments |= {"output_dir": folder, "push_to_hub": False}
        # Short trainings would end before Trainer's 500 steps to their first log, and have no losses to show.
        defaults = {
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "logging_steps": 0.05,
        }
        args = Seq2SeqDistillationTrainingArguments(**{**defaults, **arguments})
        job = _Job(recipe, args, progress)
        if dry_run:
            job.rehearse()
            return None
        return job.train(resume=resume)


class _Job:
    """One recipe with its models and data loaded."""

    def __init__(self, recipe: Recipe, args: Any, progress: TrainingProgress) -> None:
        self._recipe, self._args, self._progress = recipe, args, progress
        self._models = models = load_models(recipe, args)
        if unread := sorted(_GENERATION & {*recipe.arguments}) if models.task != "text2text-generation" else []:
            raise ValueError(f"arguments.{unread[0]} is of text2text-generation alone, and the task is {models.task}.")
        if recipe.stages is not None and args.resume_from_checkpoint:
            raise ValueError(
                "arguments.resume_from_checkpoint is of one training, and there are stages. Use --resume."
            )
        with args.main_process_first(desc="reading the rows"):
            rows = split_rows(recipe.data)
        if recipe.report_options is not None and rows.eval is None:
            raise ValueError("report measures on rows to evaluate on, and there are none. Set data.eval.")
        self._data_name = data_name(recipe.data, is_held_out=rows.is_held_out)
        data = prepare(rows.train, rows.eval, recipe.data, models, args)
        if data.is_lazy:
            args.remove_unused_columns = False
        self._train_dataset = data.train
        pads = hasattr(models.processor, "pad")  # an image processor has nothing to pad
        self._options = {
            "eval_dataset": data.eval,
            "data_collator": data.collator,
            "processing_class": models.processor,
            "teacher_processing_class": models.teacher_processor if pads else None,
            "compute_metrics": None if data.eval is None else metrics_of(models, recipe.metrics),
            "callbacks": [] if not args.disable_tqdm else [progress],
        }
        self._class = _without_printer(
            Seq2SeqDistillationTrainer if models.task == "text2text-generation" else DistillationTrainer
        )
        for line in _summary(models, data.train, data.eval):
            self._say(line)

    def _say(self, line: str) -> None:
        if PartialState().is_main_process:
            self._progress.say(line)

    def train(self, *, resume: bool) -> Trained:
        """Trains what the recipe says, in one training or in stages."""
        args, metrics = self._args, {}
        folder = Path(args.output_dir)
        if self._recipe.stages is not None:
            stages = self._stages()
            if resume and stages[0].student is None:
                self._check_first(folder, stages[0])
            run = run_stages(
                stages,
                model=self._models.student,
                args=args,
                teacher_model=self._models.teacher,
                train_dataset=self._train_dataset,
                trainer_cls=self._class,
                resume=resume,
                **self._options,
            )
            trainer = run.trainer
        else:
            trainer = self._trainer()
            checkpoint = self._last(folder) if resume else self._named()
            if checkpoint is not None:
                check_undamaged(checkpoint)
                if not trainer.is_deepspeed_enabled:  # ZeRO 3 leaves parameters empty
                    check_checkpoint(trainer.model, checkpoint)
            done = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            metrics = dict(done.metrics)
            trainer.save_model()
            trainer.save_state()
            trainer.save_metrics("train", metrics)
        metrics |= self._evaluate(trainer)
        report, failed = self._report(trainer)
        if self._recipe.card and trainer.is_world_process_zero():
            trainer.create_model_card()
        if args.push_to_hub:
            trainer.push_to_hub()
        if failed is not None:
            raise ValueError(
                f"{failed} The student is trained, and in {folder}; `hf-distill report` measures it."
            ) from failed
        return Trained(folder, metrics, report)

    def _report(self, trainer: Any) -> tuple[Any | None, ValueError | None]:
        """The report, if it was asked for; or why there is none, which must not cost the card."""
        options = self._recipe.report_options
        if options is None:
            return None, None
        try:
            named = {"data_name": self._data_name, "progress": self._progress.say}
            return trainer.report(**{**named, **options}), None
        except ValueError as error:
            return None, error

    def _trainer(self) -> Any:
        return self._class(
            model=self._models.student,
            teacher_model=self._models.teacher,
            args=self._args,
            train_dataset=self._train_dataset,
            peft_config=adapters(self._recipe.student),
            **self._options,
        )

    def _named(self) -> Path | None:
        """The checkpoint that the recipe names."""
        name = self._args.resume_from_checkpoint
        missing = missing_part(Path(name)) if name else None
        if missing is not None:
            raise ValueError(
                f"arguments.resume_from_checkpoint={name!r} is no whole checkpoint: {missing}. Name another, or leave "
                "it out: --resume takes the last that is whole."
            )
        return Path(name) if name else None

    def _check_first(self, folder: Path, stage: Stage) -> None:
        """Refuses what the first stage left of another student, before the stages' trainers are made."""
        lineage = Lineage(folder, writes=False)
        if lineage.path.exists():
            lineage.read()
        saved = folder / STAGES_FOLDER / f"1-{stage.name}"
        place = saved if lineage.status(1) == FINISHED else last_checkpoint(saved)[0]
        if place is not None:
            check_undamaged(place)
            check_checkpoint(self._models.student, place)

    def _last(self, folder: Path) -> Path | None:
        found, warning = last_checkpoint(folder)
        if warning is not None:
            self._say(warning)
        self._say(f"No checkpoint in {folder}: beginning." if found is None else f"Going on from {found}.")
        return found

    def _stages(self) -> tuple[Stage, ...]:
        stages = self._recipe.stages
        if not isinstance(stages, str):
            return tuple(stages_of(self._recipe))
        own = {name for stage in preset_stages(stages) for name in stage.training} | {"max_steps", "layer_mapping"}
        given = {name: value for name, value in self._recipe.arguments.items() if name in own}
        return preset_stages(stages, **given)

    def _evaluate(self, trainer: Any) -> dict[str, float]:
        if self._options["eval_dataset"] is None:
            return {}
        metrics = trainer.evaluate()
        if self._models.task in ("text-generation", "fill-mask", "text2text-generation") and "eval_loss" in metrics:
            metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
        trainer.save_metrics("eval", metrics)
        return metrics

    def rehearse(self) -> None:
        """Makes what would train, and a batch for it."""
        if self._recipe.stages is None:
            next(iter(self._trainer().get_train_dataloader()))
        else:
            shared: dict[str, Any] = {
                "teacher_model": self._models.teacher,
                "train_dataset": self._train_dataset,
                "trainer_cls": self._class,
                "trainer_kwargs": self._options,
            }
            stages, student = self._stages(), self._models.student
            plan_stages(stages, self._args, model=student, **shared)
            lineage = Lineage(Path(self._args.output_dir), writes=False)
            StageRunner(self._args, lineage, student=student, **shared).rehearse(stages)
        self._say("Everything fits; nothing was trained.")


def _without_printer(cls: Any) -> Any:
    """The trainer class, whose trainers leave it to the callbacks they are given to print."""

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.remove_callback(PrinterCallback)

    return type(cls.__name__, (cls,), {"__init__": make, "__module__": cls.__module__})


def _summary(models: Models, train: Any, held_out: Any) -> list[str]:
    """What is about to be trained, in a few lines."""
    named = [("student", models.student), ("teacher", models.teacher)]
    lines = [f"task: {models.task}"]
    for name, model in named:
        if model is not None:
            lines.append(f"{name}: {type(model).__name__}, {count_parameters(model):,} parameters")
    if models.built is not None:
        lines.append(models.built)
    evaluated = "none" if held_out is None else f"{len(held_out):,}"
    return [*lines, f"rows: {len(train):,} to train on, {evaluated} to evaluate on"]
