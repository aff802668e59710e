"""One stage after the other: what goes from each to the next, and where an interrupted one goes on."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_distill.checkpoints import check_undamaged, checkpoint_to_resume
from hf_distill.lineage import FINISHED, TRAINING, Lineage
from hf_distill.models.fingerprint import fingerprint, weights_fingerprint
from hf_distill.models.saved import load_weights
from hf_distill.stage_plan import PREVIOUS, Stage, asked, named, stage_arguments, stage_dataset
from hf_distill.teachers import AdapterOffTeacher, load_student

logger = logging.get_logger(__name__)


class StageRunner:
    """Runs stages in order, or takes from the lineage what was run before.

    Args:
        args: the run's arguments.
        lineage: where it is written down, and what is there already.
        student: what the first stage begins with, unless it has a student of its own.
        teacher_model: the teacher of the stages that name none.
        train_dataset: the run's data set, or a mapping of them.
        trainer_cls: makes each stage's trainer.
        trainer_kwargs: what every trainer gets.

    Attributes:
        trainer: of the last stage that was run.
    """

    def __init__(
        self,
        args: Any,
        lineage: Lineage,
        *,
        student: Any,
        teacher_model: Any,
        train_dataset: Any,
        trainer_cls: type[Any],
        trainer_kwargs: Mapping[str, Any],
    ) -> None:
        self.trainer: Any = None
        self._args, self._lineage, self._student = args, lineage, student
        self._teacher_model, self._train_dataset = teacher_model, train_dataset
        self._trainer_cls, self._trainer_kwargs = trainer_cls, trainer_kwargs
        self._loaded: dict[tuple[str, ...], nn.Module] = {}

    def rehearse(self, stages: Sequence[Stage]) -> None:
        """Makes every stage's trainer once, which checks its terms against its models and data, and trains nothing.

        Of a run that is pushed it makes the repository, as every `Trainer` does that pushes: who may not is told now.

        Raises:
            ValueError: what the trainer raises, with the stage's name.
            HfHubHTTPError: the Hub refuses the repository.
        """
        begins_with = self._student
        for number, stage in enumerate(stages, 1):
            args, previous = stage_arguments(self._args, stage, number), self._student
            with named(stage):
                self._choose_student(stage, args)
                trainer = self._make_trainer(stage, args, previous)
            self._student = trainer.model
            if number == 1 and stage.student is None:
                begins_with = self._student  # loaded now, if it was a name
        self._student = begins_with
        if self._args.push_to_hub:
            trainer.args = self._args  # the run's repository: the stages push none
            trainer.init_hf_repo()

    def run(self, number: int, stage: Stage, *, is_last: bool) -> None:
        """Trains a stage, or takes its student from where it was saved; numbers count from 1."""
        # Made anew: making arguments sets the precision that the next trainer finds.
        args, previous = stage_arguments(self._args, stage, number), self._student
        self._choose_student(stage, args)
        finished = self._lineage.status(number) == FINISHED
        if finished:
            logger.info(f"Stage {number} ({stage.name}) is finished: its student is loaded from {args.output_dir}")
            self._restore(number, args)
        if not finished or is_last:
            self.trainer = self._make_trainer(stage, args, previous)
            self._student = self.trainer.model
        if not finished:
            self._train(number, stage, args)
            if not is_last:
                _release(self.trainer)

    def _choose_student(self, stage: Stage, args: Any) -> None:
        """A stage's new student, if it has one; one that a function makes is made from the stage's seed."""
        if stage.student is None:
            return
        if isinstance(stage.student, nn.Module | str | os.PathLike):
            self._student = stage.student
            return
        make: Callable[[Any], Any] = stage.student
        set_seed(args.seed)
        self._student = make(self._student)
        if not isinstance(self._student, nn.Module):
            raise TypeError(f"The function student= returned a {type(self._student).__name__}, expected a model.")

    def _make_trainer(self, stage: Stage, args: Any, previous: Any) -> Any:
        teacher = self._teacher_model if stage.teacher is None else stage.teacher
        if isinstance(teacher, str) and teacher == PREVIOUS:
            teacher = previous
        name = None
        if isinstance(teacher, str | os.PathLike):
            name = (os.fspath(teacher), repr(args.teacher_model_init_kwargs))
            # For a student with another head the same name is another teacher.
            teacher = self._loaded.get((*name, type(self._student).__name__), teacher)
        kwargs = {**self._trainer_kwargs, **stage.trainer_kwargs}
        data = stage_dataset(stage, self._train_dataset)
        trainer = self._trainer_cls(self._student, args, teacher_model=teacher, train_dataset=data, **kwargs)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "Stages hand the student on in memory, where FSDP and DeepSpeed keep shards of it. Train each stage "
                "as a run of its own, with model= the folder of the stage before."
            )
        if name is not None and trainer.teacher is not None:
            for student in (self._student, trainer.model):
                self._loaded[(*name, type(student).__name__)] = trainer.teacher.model
        return trainer

    def _restore(self, number: int, args: Any) -> None:
        check_undamaged(Path(args.output_dir))
        if isinstance(self._student, nn.Module):
            load_weights(self._student, args.output_dir)
        else:
            kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("revision", "subfolder")}
            self._student = load_student(args.output_dir, None, kwargs)
        found = weights_fingerprint(self._student)
        expected = self._lineage.stage(number)["student"]["after"]["weights"]
        if found != expected:
            raise ValueError(
                f"The student in {args.output_dir} has the weights {found}, but the lineage says that the stage ended "
                f"with {expected}: it was changed since, or does not fit the student given. Give the student that the "
                "run began with, or start again under another output_dir."
            )

    def _train(self, number: int, stage: Stage, args: Any) -> None:
        trainer, began = self.trainer, self._lineage.status(number) == TRAINING
        record = self._record(stage, args)
        if began:
            _check_start(self._lineage.stage(number), record)
        checkpoint = _last_checkpoint(args) if began else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self._lineage.begin(number, record, resumed_at=step if began else None)
        metrics: dict[str, Any] = {}
        if checkpoint and (ended := _ended(checkpoint)) is not None:
            best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{ended.best_global_step}")
            load_weights(trainer.model, best if args.load_best_model_at_end else checkpoint)
            trainer.state = ended
        else:
            metrics |= trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        state = trainer.state
        metrics |= {key: value for log in state.log_history for key, value in log.items() if key.startswith("eval_")}
        outcome = {"steps": state.global_step, "epochs": state.epoch, "metrics": metrics}
        if state.best_metric is not None:
            outcome |= {"best_metric": state.best_metric, "best_step": state.best_global_step}
        self._lineage.finish(number, outcome, student_after=fingerprint(trainer.model))

    def _record(self, stage: Stage, args: Any) -> dict[str, Any]:
        """What a stage begins with."""
        wanted, student, data = asked(args, stage), self.trainer.model, self.trainer.train_dataset
        return {
            "name": stage.name,
            "folder": os.path.relpath(args.output_dir, self._args.output_dir),
            "asked": wanted,
            "teacher": self._teacher_record(wanted["teacher"]),
            "student": {
                "origin": wanted["student"],
                "name": self._relative(getattr(student, "name_or_path", "")),
                "before": fingerprint(student),
            },
            "data": {
                "rows": len(data) if hasattr(data, "__len__") else None,
                "fingerprint": getattr(data, "_fingerprint", None),  # of a datasets.Dataset
            },
            "processes": args.world_size,
            "batch_per_device": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }

    def _teacher_record(self, origin: str) -> dict[str, Any] | None:
        teacher = self.trainer.teacher
        if teacher is None:
            return None
        if isinstance(teacher, AdapterOffTeacher):
            return {"origin": "the student with its adapters off"}
        name = self._relative(getattr(teacher.model, "name_or_path", ""))
        return {"origin": origin, "name": name, **fingerprint(teacher.model)}

    def _relative(self, name: str) -> str:
        if not os.path.isdir(name):
            return name
        folder = os.path.relpath(name, self._args.output_dir)
        # The file is pushed with the student: what lies elsewhere on this machine is named without its way there.
        return Path(name).resolve().name if folder.startswith(os.pardir) else folder


def _check_start(began: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuses another teacher than the stage began with; of data one cannot be as sure, so it warns."""
    name = f"Stage {began['number']} ({began['name']})"
    before, now = ((entry["teacher"] or {}).get("weights") for entry in (began, record))
    if before != now:
        raise ValueError(
            f"{name} began with a teacher of weights {before}, and this one has {now}. Give the same teacher, or "
            "start again under another output_dir."
        )
    if began["data"] != record["data"]:
        logger.warning(
            f"{name} began with the data {began['data']} and goes on with {record['data']}. If the rows are others, "
            "start again under another output_dir."
        )


def _last_checkpoint(args: Any) -> Path | None:
    """The last one that was written to its end and holds all that a training needs to go on; None: from the start."""
    return None if args.save_only_model else checkpoint_to_resume(Path(args.output_dir))


def _ended(checkpoint: Path) -> TrainerState | None:
    """The state of a training that had nothing left to do but to save its student, or None where steps remain.

    Where the last step is not the end of an epoch, `Trainer` 5.23 would take one more after such a checkpoint.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"] else None


def _release(trainer: Any) -> None:
    """Takes off the student what a trainer put on it, so that the next finds it as a saved one would be."""
    model = trainer.model
    # Not `unwrap_model(keep_fp32_wrapper=False)`: accelerate 1.15 then strips Transformers' own decorators too.
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        del model.forward
        if model.forward != forward:  # it was no method of the class before either
            model.forward = forward
    trainer.accelerator.free_memory()
