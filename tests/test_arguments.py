"""The arguments as a dataclass, a command line, JSON and YAML, and as they are read while a trainer lives."""

import dataclasses
import json
import pickle

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_distill import (
    DistillationConfig,
    DistillationTrainer,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
)
from hf_distill.config import LayerMap
from hf_distill.presets import load_preset, preset_names
from hf_distill.temperature import write_temperature
from tests.tiny import pair, rows
from tests.training import arguments, logged, make_trainer

OURS = {
    "task_weight": 0.25,
    "kd_weight": 1.5,
    "kd_loss": "jsd",
    "kd_options": {"beta": 0.25},
    "temperature": 4.0,
    "temperature_schedule": "cosine",
    "temperature_final": 2.0,
    "temperature_squared": False,
    "logit_transform": "standardize",
    "teacher_scale": {"kind": "linear", "from": 0.5, "to": 1.0},
    "item_weights": [{"by": "phrases", "phrases": ["heart attack"], "boost": 0.3}],
    "token_alignment": "offsets",
    "weight_schedules": {"kd": {"kind": "linear", "from": 1, "to": 0.1}, "hidden": "warmup"},
    "loss_balance": "uncertainty",
    "hidden_weight": 2.0,
    "hidden_loss": "hidden_cosine",
    "attention_weight": 3.0,
    "attention_loss": "attention_kl",
    "layer_mapping": [[1, 2], [2, 4]],
    "preset": "tinybert",
    "teacher_model_init_kwargs": {"dtype": "bfloat16", "revision": "main"},
    "model_init_kwargs": {"attn_implementation": "eager"},
    "evaluate_teacher": True,
    "dataset_text_field": "content",
    "max_length": 512,
    "truncation_mode": "keep_start",  # keep_end cuts nothing of wrapped rows
    "packing": True,
    "packing_strategy": "wrapped",
    "padding_free": False,  # True leaves nothing to pad
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "pad_to_multiple_of": 8,
    "lmbda": 0.25,
    "max_new_tokens": 64,
    "generation_temperature": 0.8,
    "generation_kwargs": {"top_p": 0.9},
}
RECIPE = {
    "task": {"weight": 0.25},
    "logits": {"loss": "logit_mse", "weight": 2, "temperature": 3},
    "matches": [
        {"name": "hidden", "student": "hidden[*]", "loss": "hidden_mse", "map": "last", "weight": 5},
        {"name": "mine", "student": "pooled(cls)@hidden[-1]", "loss": "cka"},
    ],
}
CLASSES = [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments]


def on_the_command_line(options):
    """--name value pairs, as a shell would pass them."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words


def test_the_fields_tried_here_are_all_there_are():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in dataclasses.fields(DistillationTrainingArguments)} - inherited == {
        *OURS,
        "distillation_config",  # in place of a preset
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_help_text(cls):
    for name in (*OURS, "distillation_config"):
        assert len(cls.__dataclass_fields__[name].metadata["help"]) > 20, name


@pytest.mark.parametrize("cls", CLASSES)
def test_a_command_line_sets_every_field(cls, tmp_path):
    words = ["--output_dir", str(tmp_path), *on_the_command_line(OURS)]
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(words)
    assert {name: getattr(args, name) for name in OURS} == OURS
    terms = args.distillation
    assert [terms.logits.temperature.at(progress) for progress in (0, 1)] == [4.0, 2.0]
    assert terms.logits.options == {"beta": 0.25}
    assert (terms.logits.temperature_squared, terms.logits.transform) == (False, "standardize")
    assert terms.logits.teacher_scale.at(0) == 0.5
    assert terms.logits.item_weights[0].phrases == ("heart attack",)
    assert terms.logits.weight_at(1.0) == pytest.approx(0.15)
    assert terms.terms["hidden"].weight_at(0.05) == pytest.approx(1.0)
    assert terms.balance.kind == "uncertainty"


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
    plain = [name for name, value in OURS.items() if not isinstance(value, dict | list)]
    assert {name: values[name] for name in plain} == {name: OURS[name] for name in plain}


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


def test_without_a_preset_the_numbers_are_the_defaults(tmp_path):
    args = arguments(tmp_path)
    assert (args.task_weight, args.kd_weight, args.kd_loss, args.temperature) == (0.5, 0.5, "forward_kl", 2.0)
    assert (args.hidden_weight, args.attention_weight) == (0.0, 0.0)
    assert args.distillation.matches == ()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_alone_is_what_the_preset_says(name, tmp_path):
    args = arguments(tmp_path, preset=name)
    assert args.distillation == load_preset(name).config()
    assert args.task_weight == args.distillation.task.weight
    assert args.temperature == write_temperature(args.distillation.logits.temperature)


def test_a_field_that_is_given_wins_over_the_preset_and_the_others_stay(tmp_path):
    args = arguments(tmp_path, preset="tinybert", task_weight=0.25, hidden_weight=7.0, layer_mapping="last")
    preset = load_preset("tinybert").config()
    hidden, attention = args.distillation.matches
    assert (args.task_weight, args.distillation.task.weight, args.distillation.task.active) == (0.25, 0.25, (0.0, 1.0))
    assert args.distillation.logits == preset.logits
    assert hidden == dataclasses.replace(preset.matches[0], weight=7.0, map=LayerMap("last"))
    assert attention == dataclasses.replace(preset.matches[1], map=LayerMap("last"))


@pytest.mark.parametrize("form", ["file", "values", "config", "command line"])
def test_a_config_may_be_a_file_values_or_itself_and_given_fields_win(form, tmp_path):
    config = DistillationConfig.from_dict(RECIPE)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    if form == "command line":
        words = ["--output_dir", str(tmp_path), "--distillation_config", json.dumps(RECIPE), "--temperature", "6"]
        (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(words)
    else:
        given = {"file": str(tmp_path / "recipe.yaml"), "values": RECIPE, "config": config}[form]
        args = arguments(tmp_path, distillation_config=given, temperature=6.0)
    assert (args.task_weight, args.kd_weight, args.kd_loss, args.hidden_weight) == (0.25, 2.0, "logit_mse", 5.0)
    assert args.distillation == dataclasses.replace(config, logits=dataclasses.replace(config.logits, temperature=6.0))


def test_a_config_stays_what_was_trained_when_its_file_changes(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: {weight: 2}")
    args = arguments(tmp_path, distillation_config=str(file))
    file.unlink()
    again = DistillationTrainingArguments(**{**json.loads(args.to_json_string()), **_not_made_by_us(args)})
    assert again.distillation == args.distillation
    assert again.distillation.task.weight == 2


def _not_made_by_us(args):
    """Fields that Transformers writes in a form that it does not read."""
    return {"accelerator_config": args.accelerator_config}


@pytest.mark.parametrize(
    "options",
    [
        OURS,
        {"distillation_config": RECIPE},
        {"preset": "pkd", "kd_weight": 0.0},
        {"hidden_weight": 1.0},
        {"attention_weight": 1.0, "layer_mapping": {1: 2}},
    ],
)
def test_a_copy_of_the_arguments_means_the_same(options, tmp_path):
    args = arguments(tmp_path, **options)
    for again in (dataclasses.replace(args), pickle.loads(pickle.dumps(args)), arguments(tmp_path, **_ours(args))):
        assert again.distillation == args.distillation
        assert again.to_dict() == args.to_dict()


def _ours(args):
    return {name: value for name, value in args.to_dict().items() if name in (*OURS, "distillation_config")}


def test_hidden_states_and_attention_have_a_short_form(tmp_path):
    args = arguments(tmp_path, hidden_weight=2.0, attention_weight=3.0, layer_mapping={0: 0, 1: 2, 2: 4})
    hidden, attention = args.distillation.matches
    assert [str(part) for part in (hidden.student, attention.student)] == ["hidden[*]", "attention_scores[*]"]
    assert [match.name for match in args.distillation.matches] == ["hidden", "attention"]
    assert (hidden.loss, attention.loss, hidden.weight, attention.weight) == ("hidden_mse", "attention_mse", 2.0, 3.0)
    assert hidden.map == LayerMap("explicit", ((0, 0), (1, 2), (2, 4)))
    assert attention.map == LayerMap("explicit", ((1, 2), (2, 4))), "the embeddings have no attention"
    assert (hidden.projection.kind, hidden.projection.when) == ("linear", "mismatch")


def test_losses_of_probabilities_compare_probabilities(tmp_path):
    for loss, kind in (("attention_kl", "attention_probs"), ("attention_mse", "attention_scores")):
        (match,) = arguments(tmp_path, attention_weight=1.0, attention_loss=loss).distillation.matches
        assert (match.loss, match.student.kind) == (loss, kind)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"preset": "tinybert", "distillation_config": RECIPE}, r"each says what is minimised.*to_yaml\(\)"),
        ({"preset": "tinybrt"}, r"Did you mean 'tinybert'\?"),
        ({"distillation_config": "no.yaml"}, r"no\.yaml' is no file"),
        ({"distillation_config": {"taks": {}}}, r"taks: unknown key\. Did you mean 'task'\?"),
        ({"hidden_loss": "hidden_mse"}, r"hidden_loss='hidden_mse', but hidden_weight is 0, so nobody reads it"),
        ({"attention_loss": "attention_kl"}, r"attention_weight is 0, so nobody reads it"),
        ({"layer_mapping": "last"}, r"layer_mapping='last', but hidden_weight and attention_weight are 0"),
        ({"hidden_weight": 1.0, "layer_mapping": "lats"}, r"layer_mapping: strategy='lats'.*Did you mean 'last'\?"),
        ({"hidden_weight": 1.0, "hidden_loss": "attention_mse"}, r"Match 'hidden': student is 'hidden\[\*\]', but"),
        ({"hidden_weight": -1.0}, r"Match 'hidden': weight=-1\.0"),
        ({"preset": "distilbert", "layer_mapping": "last"}, r"already are one pair of layers"),
        ({"preset": "distilbert", "task_weight": 0, "kd_weight": 0, "hidden_weight": 0}, r"All weights are zero"),
    ],
)
def test_what_nobody_would_read_is_refused(options, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        arguments(tmp_path, **options)


def test_a_search_may_change_every_field_and_the_terms_follow(tmp_path):
    args = arguments(tmp_path, preset="tinybert", kd_weight=0.5)
    first = args.distillation
    assert args.distillation is first, "read in every step, compiled once"
    args.hidden_weight = 4.0
    args.layer_mapping = {1: 1}
    args.temperature = 8.0
    assert [match.weight for match in args.distillation.matches] == [4.0, 1.0]
    assert args.distillation.matches[1].map == LayerMap("explicit", ((1, 1),))
    assert args.distillation.logits.temperature == 8.0
    args.layer_mapping[2] = 2
    assert args.distillation.matches[1].map == LayerMap("explicit", ((1, 1), (2, 2)))


def test_a_search_over_presets_keeps_what_was_given_and_takes_the_rest_from_the_new_one(tmp_path):
    args = arguments(tmp_path, preset="tinybert", kd_weight=0.25)
    args.preset = "pkd"
    assert args.distillation == arguments(tmp_path, preset="pkd", kd_weight=0.25).distillation
    assert (args.kd_weight, args.temperature, args.hidden_weight) == (0.25, 10.0, 100.0)


def test_a_search_that_tries_no_weight_may_keep_the_loss(tmp_path):
    args = arguments(tmp_path, hidden_weight=1.0, hidden_loss="hidden_cosine")
    args.hidden_weight = 0.0
    assert args.distillation.matches == ()
