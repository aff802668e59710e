"""The arguments as a dataclass, a command line, JSON and YAML, and as they are read while a trainer lives."""

import dataclasses
import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
from tests.tiny import pair, rows
from tests.training import arguments, logged, make_trainer

OURS = {
    "task_weight": 0.25,
    "kd_weight": 1.5,
    "kd_loss": "logit_mse",
    "temperature": 4.0,
    "teacher_model_init_kwargs": {"dtype": "bfloat16", "revision": "main"},
    "model_init_kwargs": {"attn_implementation": "eager"},
}
CLASSES = [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments]


def on_the_command_line(options):
    """--name value pairs, as a shell would pass them."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def test_the_fields_tried_here_are_all_there_are():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in dataclasses.fields(DistillationTrainingArguments)} - inherited == {*OURS}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_help_text(cls):
    for name in OURS:
        assert len(cls.__dataclass_fields__[name].metadata["help"]) > 20, name


@pytest.mark.parametrize("cls", CLASSES)
def test_a_command_line_sets_every_field(cls, tmp_path):
    words = ["--output_dir", str(tmp_path), *on_the_command_line(OURS)]
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(words)
    assert {name: getattr(args, name) for name in OURS} == OURS
    assert args.distillation.logits.temperature == 4.0


@pytest.mark.parametrize("cls", CLASSES)
def test_an_empty_command_line_gives_the_defaults(cls, tmp_path):
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    default = cls(output_dir=str(tmp_path))
    assert {name: getattr(args, name) for name in OURS} == {name: getattr(default, name) for name in OURS}


def test_a_command_line_with_a_bad_value_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ValueError, match=r"temperature=0\.0.*positive"):
        HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--temperature", "0"]
        )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_sets_every_field(cls, kind, tmp_path):
    file = tmp_path / f"arguments.{kind}"  # JSON is YAML
    file.write_text(json.dumps({"output_dir": str(tmp_path), **OURS}))
    parser = HfArgumentParser(cls)
    (args,) = parser.parse_json_file(str(file)) if kind == "json" else parser.parse_yaml_file(str(file))
    assert {name: getattr(args, name) for name in OURS} == OURS


@pytest.mark.parametrize("cls", CLASSES)
def test_a_round_trip_through_a_dict_or_json_changes_nothing(cls, tmp_path):
    args = arguments(tmp_path, cls, **OURS)
    for values in (args.to_dict(), json.loads(args.to_json_string())):
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        again = cls(**{name: value for name, value in values.items() if name in known})
        assert again.to_dict() == args.to_dict()


def test_a_sanitized_dict_for_loggers_holds_every_field(tmp_path):
    values = arguments(tmp_path, **OURS).to_sanitized_dict()
    assert {name: values[name] for name in ("task_weight", "kd_weight", "kd_loss", "temperature")} == {
        name: OURS[name] for name in ("task_weight", "kd_weight", "kd_loss", "temperature")
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [("task_weight", 2.0), ("kd_weight", 3.0), ("kd_loss", "logit_mse"), ("temperature", 5.0)],
)
def test_a_field_changed_between_trainings_counts_from_the_next_one(field, value, tmp_path):
    changed = make_trainer(tmp_path, learning_rate=0.0)
    changed.train()
    setattr(changed.args, field, value)
    changed.train()
    fresh = make_trainer(tmp_path, learning_rate=0.0, **{field: value})
    fresh.train()
    assert logged(changed, "loss") == pytest.approx(logged(fresh, "loss"), rel=1e-7)


def test_training_without_arguments_uses_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, teacher = pair("bert")
    trainer = DistillationTrainer(student, teacher_model=teacher, train_dataset=rows("sequence"))
    assert isinstance(trainer.args, DistillationTrainingArguments)
    assert (trainer.args.kd_weight, trainer.args.task_weight, trainer.args.temperature) == (0.5, 0.5, 2.0)
