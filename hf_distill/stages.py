"""A run of several trainings, each with its own terms, data and learning rate, that can be taken up in the middle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.lineage import FINISHED, LINEAGE_NAME, Lineage
from hf_distill.setup import check_arguments
from hf_distill.stage_plan import STAGES_FOLDER, Stage, announced, asked, plan_stages, preset_stages
from hf_distill.stage_runner import StageRunner
from hf_distill.teachers import Teacher
from hf_distill.trainer import DistillationMixin, DistillationTrainer

__all__ = ["Stage", "StagedRun", "preset_stages", "run_stages"]


@dataclass(frozen=True)
class StagedRun:
    """What a run of stages leaves.

    Attributes:
        trainer: the last stage's, with the trained student, whose `output_dir` is now the run's.
        metrics: by stage, its training metrics and its last evaluation's.
        lineage: what `lineage.json` holds.
    """

    trainer: Any
    metrics: Mapping[str, Mapping[str, float]]
    lineage: Mapping[str, Any]


def run_stages(
    stages: Sequence[Stage] | str,
    *,
    model: PreTrainedModel | nn.Module | str | None = None,
    teacher_model: PreTrainedModel | nn.Module | Teacher | str | None = None,
    args: DistillationTrainingArguments,
    train_dataset: Any = None,
    trainer_cls: type[DistillationMixin] = DistillationTrainer,
    resume: bool = False,
    **trainer_kwargs: Any,
) -> StagedRun:
    """Trains stage after stage, and saves the last student in `args.output_dir`.

    Each stage trains and saves in a folder of its own under `_stages/`, with a fresh optimizer and schedule and its
    own seed (`args.seed`, then one more each). What was done is written to `lineage.json`.

    Args:
        stages: in order; or the name of a preset.
        model: the student, unless the stages bring theirs; as for the trainer.
        teacher_model: the teacher of the stages that name none; as for the trainer.
        args: what holds for all stages.
        train_dataset: a data set, or a mapping of them, from which each stage names one.
        trainer_cls: such as `Seq2SeqDistillationTrainer`.
        resume: go on with what `output_dir` holds: finished stages are skipped, the one that was interrupted goes on
            from its last checkpoint, and ends with the bits of a run that was not. Starts where there is nothing yet.
        trainer_kwargs: the trainer's other arguments, in every stage.

    Raises:
        ValueError: before the first step, for anything that is wrong with any stage; for an `output_dir` that holds a
            run already, or one of other stages.
    """
    stages = announced(stages, preset_stages(stages)) if isinstance(stages, str) else tuple(stages)
    check_arguments(args, trainer_cls._arguments_class)
    shared: dict[str, Any] = {
        "teacher_model": teacher_model,
        "train_dataset": train_dataset,
        "trainer_cls": trainer_cls,
        "trainer_kwargs": trainer_kwargs,
    }
    arguments = plan_stages(stages, args, model=model, **shared)
    lineage = _open_lineage(arguments[-1], Path(str(args.output_dir)), resume=resume)
    lineage.check([asked(own, stage) for own, stage in zip(arguments, stages, strict=True)])
    runner = StageRunner(args, lineage, student=model, **shared)
    if any(lineage.status(number) != FINISHED for number in range(1, len(stages) + 1)):
        runner.rehearse(stages)
    for number, stage in enumerate(stages, 1):
        runner.run(number, stage, is_last=number == len(stages))
    trainer = runner.trainer
    trainer.args.output_dir, trainer.args.push_to_hub = args.output_dir, args.push_to_hub
    trainer.save_model()
    metrics = {entry["name"]: entry["metrics"] for entry in lineage.stages}
    return StagedRun(trainer, metrics, lineage.as_dict())


def _open_lineage(args: Any, folder: Path, *, resume: bool) -> Lineage:
    """What the folder holds of the run, read by all processes before one of them writes."""
    lineage = Lineage(folder, writes=args.process_index == 0)
    if lineage.path.exists() and resume:
        lineage.read()
    elif lineage.path.exists() or any(path.is_file() for path in (folder / STAGES_FOLDER).rglob("*")):
        raise ValueError(
            f"{folder} holds a run of stages already. "
            + ("Pass resume=True to go on with it, take" if lineage.path.exists() else f"{LINEAGE_NAME} is gone: take")
            + f" another output_dir, or delete {LINEAGE_NAME} and {STAGES_FOLDER} there."
        )
    args.distributed_state.wait_for_everyone()
    return lineage
