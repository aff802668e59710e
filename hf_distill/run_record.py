"""The record of a training: which student learned what from which teacher, on which data, and how it went."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from hf_distill.lineage import FINISHED, Lineage
from hf_distill.logit_setup import known_problem_type
from hf_distill.provenance import (
    describe_data,
    describe_hardware,
    describe_model,
    describe_teacher,
    is_hub_id,
    public_name,
    versions,
    without_paths,
    write_json,
)

FORMAT = 1
EVIDENCE_FOLDER = "distillation"
RECORD_NAME = "run.json"
# What of the arguments makes a student what it is; no other is written, since some hold paths, names or tokens.
_ALWAYS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
)
_IF_CHANGED = (
    "activation_checkpointing",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "assistant_only_loss",
    "auto_find_batch_size",
    "bf16",
    "completion_only_loss",
    "data_seed",
    "fp16",
    "full_determinism",
    "generation_kwargs",
    "generation_temperature",
    "label_smoothing_factor",
    "lmbda",
    "load_best_model_at_end",
    "lr_scheduler_kwargs",
    "max_length",
    "max_new_tokens",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "optim_args",
    "packing",
    "packing_strategy",
    "padding_free",
    "tf32",
    "torch_compile",
    "train_sampling_strategy",
    "truncation_mode",
)


@dataclass(frozen=True)
class RunRecord:
    """What `distillation/run.json` holds: plain values, and nothing that is private to the machine or its user.

    Attributes:
        name: of the student: the last part of the repository's name or of the folder.
        repo_id: of its repository on the Hub, where it has one.
        created: when the record was made, UTC.
        task: the kind of head, as `Task` names it.
        problem_type: of sequence classification.
        student: name, revision, class, model_type, parameters, hash of the weights, and whether the name is the Hub's.
        teacher: the same, and its kind; empty without one.
        terms: what was minimised, as `DistillationConfig.to_dict` has it.
        logit_loss: the loss of the logits that was computed, which may be another for several labels or numbers.
        layers: match -> [student's feature, teacher's feature] of every pair of layers.
        preset: its name.
        stages: of a run of several, in order: name, terms, teacher, data, steps and metrics of each.
        arguments: those that make a student what it is.
        processing: the class of the tokenizer or processor that is saved with it.
        data: `train` and `eval`: name, rows and fingerprint.
        log_history: every log, of numbers alone.
        train_metrics: of the end of the training.
        wall_time_s: of the training, of all stages together.
        hardware: device and number of processes.
        versions: of the packages.
    """

    task: str
    student: Mapping[str, Any]
    terms: Mapping[str, Any]
    name: str | None = None
    repo_id: str | None = None
    created: str | None = None
    problem_type: str | None = None
    teacher: Mapping[str, Any] = field(default_factory=dict)
    logit_loss: str | None = None
    layers: Mapping[str, Sequence[Sequence[str | None]]] = field(default_factory=dict)
    preset: str | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    processing: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    train_metrics: Mapping[str, Any] = field(default_factory=dict)
    wall_time_s: float | None = None
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: Any) -> "RunRecord":
        """The record of a trainer as it is now; needs the main process alone."""
        args, config = trainer.args, trainer.args.distillation
        whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        student = describe_model(trainer.model, whole=whole)
        student["trained_parameters"] = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
        stages = _stages(Path(args.output_dir), student.get("weights"))
        log = [{k: v for k, v in entry.items() if _is_number(v)} for entry in trainer.state.log_history]
        ended: dict[str, Any] = next((entry for entry in reversed(log) if "train_runtime" in entry), {})
        seconds = [stage["metrics"].get("train_runtime") for stage in stages] or [ended.get("train_runtime")]
        repo = getattr(trainer, "hub_model_id", None) or args.hub_model_id
        repo = repo if repo and is_hub_id(repo) else None
        content = {
            "name": repo.rpartition("/")[2] if repo else public_name(args.output_dir)[0],
            "repo_id": repo,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "task": str(trainer._pair.task),
            "problem_type": known_problem_type(trainer, trainer._some_label),
            "student": student,
            "teacher": {} if trainer.teacher is None else describe_teacher(trainer.teacher),
            "terms": config.to_dict(),
            "logit_loss": trainer._loss_of_logits().name if config.logits.weight > 0 else None,
            "layers": _layers(trainer),
            "preset": args.preset,
            "stages": stages,
            "arguments": _arguments(trainer),
            "processing": None if trainer.processing_class is None else type(trainer.processing_class).__name__,
            "data": {"train": describe_data(trainer.train_dataset), "eval": describe_data(trainer.eval_dataset)},
            "log_history": log,
            "train_metrics": {key: value for key, value in ended.items() if key != "step"},
            "wall_time_s": sum(filter(None, seconds)) or None,
            "hardware": describe_hardware(args.device, args.world_size),
            "versions": versions(),
        }
        return cls(**without_paths(content))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "RunRecord":
        """The record that `to_dict` wrote.

        Raises:
            ValueError: it is of another format.
        """
        if content.get("format") != FORMAT:
            raise ValueError(
                f"A record of format {content.get('format')!r}; this version reads {FORMAT}. Take the version that "
                f"wrote it ({content.get('versions', {}).get('hf-distill')}), or train again."
            )
        known = {own.name for own in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def write(self, folder: str | os.PathLike) -> Path:
        """Writes `distillation/run.json` in a folder, whole or not at all, and returns its path."""
        path = record_path(folder)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "RunRecord":
        """The record in a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no record, or one of another format.
        """
        path = record_path(folder)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: {folder} holds no record of a distillation. Give the output_dir of one, whose "
                "student was saved with trainer.save_model()."
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of a distillation ({error!r}). Save the student again.") from error

    def same_student(self, other: "RunRecord") -> bool:
        """Whether both are of a student with the same weights, as far as that is known."""
        return self.student.get("weights") is not None and self.student.get("weights") == other.student.get("weights")

    def with_logs(self, logs: Sequence[Mapping[str, Any]]) -> "RunRecord":
        """The record with further logs, each once."""
        new = [entry for entry in logs if entry not in self.log_history]
        return replace(self, log_history=[*self.log_history, *new])


def record_path(folder: str | os.PathLike) -> Path:
    """Where a folder's record is."""
    return Path(folder, EVIDENCE_FOLDER, RECORD_NAME)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _arguments(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    defaults = {own.name: own.default for own in fields(args)}
    names = [name for name in _ALWAYS if hasattr(args, name)]
    found = {name: getattr(args, name) for name in names}
    now = {name: getattr(args, name, None) for name in _IF_CHANGED}
    # None and False both stand for what is off.
    found |= {name: value for name, value in now.items() if (value or None) != (defaults.get(name) or None)}
    found = {name: value.value if isinstance(value, Enum) else value for name, value in found.items()}
    # `auto_find_batch_size` may have found another.
    found["per_device_train_batch_size"] = trainer.state.train_batch_size or args.train_batch_size
    return found


def _layers(trainer: Any) -> dict[str, list[list[str | None]]]:
    if trainer._layers is None:
        return {}
    return {
        match.term.name: [
            [str(pair.student), None if pair.teacher is None else str(pair.teacher)]
            for stack in match.stacks
            for pair in stack.pairs
        ]
        for match in trainer._layers.plan.matches
    }


def _stages(folder: Path, weights: str | None) -> list[dict[str, Any]]:
    """The stages that made the student in a folder; none where its lineage is of another student."""
    lineage = Lineage(folder, writes=False)
    try:
        lineage.read()
    except (OSError, ValueError):
        return []
    last = lineage.stages[-1] if lineage.stages else {}
    if last.get("status") != FINISHED or last["student"]["after"].get("weights") != weights:
        return []
    return [_stage(stage, folder) for stage in lineage.stages]


def _stage(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def model(entry: Mapping[str, Any] | None, after: str = "") -> dict[str, Any]:
        if entry is None:
            return {}
        name = entry.get("name") or None
        if name is not None and (folder / name).exists():
            name = str((folder / name).resolve())
        public, on_hub = public_name(name)
        described = entry.get(after, entry)
        return {
            "origin": entry.get("origin"),
            "name": public,
            "on_hub": on_hub,
            "class": described.get("class"),
            "parameters": described.get("parameters"),
        }

    asked = stage["asked"]
    return {
        "name": stage["name"],
        "terms": asked["distillation"],
        "teacher": model(stage["teacher"]),
        "student": model(stage["student"], "after"),
        "data": stage["data"],
        "learning_rate": asked.get("learning_rate"),
        "steps": stage["steps"],
        "epochs": stage["epochs"],
        "metrics": {key: value for key, value in stage["metrics"].items() if _is_number(value)},
    }
