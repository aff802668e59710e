"""The page about losses, temperatures and weights says what the code does: its tables and examples are read back."""

import inspect
import json
import re
import shlex
from dataclasses import fields

import pytest
import yaml
from transformers import HfArgumentParser

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.arguments import FLAT_FIELDS
from hf_distill.config import DistillationConfig, LogitTerm
from hf_distill.config.terms import BALANCES, TRANSFORMS
from hf_distill.losses import LOSSES
from hf_distill.losses.difficulty import DIFFICULTIES
from hf_distill.schedules import SCHEDULES, Schedule
from hf_distill.temperature import POLICIES, read_temperature, write_temperature
from hf_distill.temperature.per_item import DIRECTIONS
from hf_distill.weighting import read_item_weights, write_item_weights
from tests import tiny
from tests.test_docs import DOCS, ROOT, blocks

PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
LOGIT_LOSSES = [name for name in LOSSES if LOSSES.get(name).feature == "logits"]
FLAT_OF_LAYERS = {"hidden_weight", "hidden_loss", "attention_weight", "attention_loss", "layer_mapping"}
QUICK_START, WEIGHED, FLAT, PYTHON = blocks(PAGE, "python")
LANGUAGES = ("en", "de", "zh")


def table_under(heading):
    """The cells of the rows of a section's first table, without its head."""
    section = PAGE.split(f"# {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE).group()
    return [[cell.strip() for cell in row.strip("|").split(" |")] for row in table.splitlines()[2:]]


ROWS = {cells[0].strip("`"): cells for cells in table_under("Losses of the logits")}


def inline(key):
    """Every mapping in the text that begins with a key, as it would stand in a recipe."""
    return [yaml.safe_load(text) for text in re.findall(rf"`(\{{{key}: [^`]*\}})`", PAGE)]


def test_the_table_has_every_loss_of_logits_and_no_other():
    assert {*ROWS} == {*LOGIT_LOSSES}


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_the_row_of_a_loss_has_its_options_heads_classes_and_paper(name):
    spec = LOSSES.get(name)
    _, _, options, heads, classes, paper = ROWS[name]
    parameters = inspect.signature(spec.function).parameters
    defaults = {option: parameters[option].default for option in spec.options}
    assert {key: value for text in re.findall(r"`(.+?)`", options) for key, value in yaml.safe_load(text).items()} == (
        defaults
    )
    wanted = [spec.compares, *["label"] * spec.takes_targets, *["rows"] * spec.compares_rows]
    assert heads.split(", ") == wanted
    assert int(classes) == spec.min_classes
    assert all(number in paper for number in re.findall(r"arXiv:[\d.]+\d", spec.paper))


def test_the_losses_without_a_temperature_are_named():
    sentence = re.search(r"((?:`\w+`(?:, | and |,\n| and\n))+`\w+`)\s+have no temperature", PAGE.replace("\n", " "))
    assert {*re.findall(r"`(\w+)`", sentence.group(1))} == {
        name for name in LOGIT_LOSSES if not LOSSES.get(name).takes_temperature
    }


WORDS = {
    "policies": POLICIES,
    "schedules": SCHEDULES,
    "signals": DIFFICULTIES,
    "directions": DIRECTIONS,
    "balances": [kind for kind in BALANCES if kind != "none"],
    "transforms": [kind for kind in TRANSFORMS if kind != "none"],
    "fields": [field.name for field in fields(LogitTerm)],
    "arguments": {*FLAT_FIELDS} - FLAT_OF_LAYERS,
}


@pytest.mark.parametrize("kind", WORDS)
def test_every_word_of_the_language_is_explained(kind):
    assert [word for word in WORDS[kind] if not re.search(rf"\b{word}\b", PAGE)] == []


def test_the_policies_in_the_text_are_read_and_written():
    policies = [read_temperature(value) for value in inline("policy")]
    assert {value["policy"] for value in inline("policy")} >= {"adaptive", "flsw", "cwsm", "learned", "linear"}
    assert [read_temperature(write_temperature(policy)) for policy in policies] == policies


def test_the_adaptive_and_learned_policies_stand_with_their_defaults():
    for value in inline("policy"):
        if value["policy"] in ("adaptive", "flsw", "cwsm", "learned"):
            assert read_temperature(value) == read_temperature({"policy": value["policy"]})


def test_the_schedules_in_the_text_are_read_and_written():
    schedules = [Schedule.of(value) for value in inline("kind")]
    assert {schedule.kind for schedule in schedules} == {"linear", "warmup", "step", "piecewise", "constant"}
    assert [Schedule.of(schedule.to_plain()) for schedule in schedules] == schedules
    assert Schedule.of("warmup") in schedules


def test_the_item_weights_in_the_text_are_read_and_written():
    written = inline("by")
    assert {value["by"] for value in written} == {"phrases", "column", "group", "teacher"}
    for value in written:
        weights = read_item_weights(value)
        assert read_item_weights(write_item_weights(weights)) == weights


@pytest.mark.parametrize("text", blocks(PAGE, "yaml"))
def test_the_recipes_load_and_survive_being_written(text):
    config = DistillationConfig.from_yaml(text)
    assert DistillationConfig.from_yaml(config.to_yaml()) == config


def data():
    texts = ("a heart attack", "ein Herzinfarkt", "急性心肌梗死", "none")
    return [
        {**row, "text": texts[number % 4], "language": LANGUAGES[number % 3]}
        for number, row in enumerate(tiny.rows("sequence"))
    ]


def run(code, monkeypatch, tmp_path, **names):
    monkeypatch.chdir(tmp_path)
    names = {"DistillationTrainingArguments": DistillationTrainingArguments, **names}
    exec(code, names)
    return names


def test_the_quick_start_runs_and_logs_what_the_page_says(tmp_path, monkeypatch):
    student, teacher = tiny.pair("bert")
    short = QUICK_START.replace('"distilled",', '"distilled", logging_steps=1, use_cpu=True, report_to="none",')
    trainer = run(short, monkeypatch, tmp_path, student=student, teacher=teacher, train=data())["trainer"]
    first = trainer.state.log_history[0]
    assert {"temperature", "temperature_min", "temperature_max", "weight_task", "loss_kd"} <= {*first}
    assert first["temperature"] == 8
    assert all(f"`{name}`" in PAGE for name in first if name.startswith("temperature"))


def test_the_three_forms_of_one_recipe_are_the_same_training(tmp_path, monkeypatch):
    flat = run(FLAT, monkeypatch, tmp_path)["flat"].distillation
    (written,) = (text for text in blocks(PAGE, "yaml") if "Herzinfarkt" in text)
    assert DistillationConfig.from_yaml(written) == flat
    assert run(PYTHON, monkeypatch, tmp_path)["config"] == flat
    assert DistillationTrainingArguments("out", distillation_config=written_to(tmp_path, written)).distillation == flat


def written_to(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_command_line_is_the_same_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = blocks(PAGE, "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", "train.py"]
    (parsed,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(words[2:])
    assert parsed.distillation == run(FLAT, monkeypatch, tmp_path)["flat"].distillation


def test_the_recipe_trains_on_texts_with_phrases_and_languages(tmp_path, monkeypatch):
    student, teacher = tiny.pair("bert")
    args = run(
        FLAT.replace('"distilled",', '"distilled", max_steps=2, logging_steps=1, use_cpu=True, report_to="none",'),
        monkeypatch,
        tmp_path,
    )["flat"]
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data())
    trainer.train()
    log = trainer.state.log_history[0]
    assert 1 <= log["temperature_min"] <= log["temperature"] <= log["temperature_max"] <= 6


def test_phrases_are_weighed_before_texts_are_cut_into_blocks(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer(["after", "a", "heart", "attack", "or", "stroke"])
    texts = ["after a heart attack or a stroke", "a stroke"]
    tokenized = [{"text": text, **tokenizer(text)} for text in texts]
    (tmp_path / "terms.txt").write_text("heart attack\t0.5\nstroke\n")
    by_mapping = WEIGHED.replace(
        "rows = weigh_phrases(tokenized, tokenizer, file", "of_file = weigh_phrases(tokenized, tokenizer, file"
    )
    names = run(by_mapping, monkeypatch, tmp_path, tokenized=tokenized, tokenizer=tokenizer)
    for rows in (names["rows"], names["of_file"]):
        weights = [[weight for weight in row["distill_weight"] if weight != 1] for row in rows]
        assert weights == [[1.5, 1.5, 1.3], [1.3]]
    assert names["args"].distillation.logits.item_weights


REFUSED = [
    {"kd_loss": "jds"},
    {"kd_loss": "hidden_mse"},
    {"kd_loss": "jsd", "kd_options": {"gamma": 1}},
    {"temperature": {"policy": "linear", "from": 2, "to": 0}},
    {"teacher_scale": {"kind": "linear", "from": 0, "to": 1}},
    {"weight_schedules": {"kd": {"kind": "linear", "from": 1, "to": -1}}},
    {"weight_schedules": {"kd": 0}},
    {"weight_schedules": {"hidden": "warmup"}},
    {"weight_schedules": {"task": "warmup"}, "task_weight": 0.0},
    {"temperature_schedule": "linear"},
    {"temperature_final": 2.0, "temperature": {"policy": "flsw"}},
    {"loss_balance": "uncertainty", "task_weight": 0.0},
    {"loss_balance": "magnitude", "kd_weight": 0.0, "hidden_weight": 1.0},
    {"item_weights": [{"by": "column"}], "kd_weight": 0.0},
    {"item_weights": [{"by": "phrases"}]},
    {"item_weights": [{"by": "group", "column": "language", "size_power": 0.5, "follow": "loss"}]},
    {"item_weights": [{"by": "group", "column": name, "follow": "loss"} for name in "ab"]},
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_what_the_page_says_is_refused_is(values):
    with pytest.raises(ValueError, match=r"\w"):
        DistillationTrainingArguments("distilled", **values)


def test_every_figure_is_shown_and_described_in_words():
    found = re.findall(r"^!\[(.+)\]\((figures/\w+\.svg)\)$", PAGE, flags=re.MULTILINE)
    shown = {path: words for words, path in found}
    assert {*shown} == {f"figures/{path.name}" for path in (DOCS / "figures").glob("*.svg")}
    assert all(len(words) > 100 for words in shown.values())


def test_the_factors_beside_other_libraries_are_those_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text(encoding="utf-8"))
    rows = table_under("Parity with other libraries")
    for comparison in measured["comparisons"]:
        if not comparison["agrees"]:
            continue
        loss = re.findall(r"\w+", comparison["ours"].split(", beta")[0])[-1 if "then" in comparison["ours"] else 0]
        ours = [factor for _, names, factor in rows if f"`{loss}`" in names]
        beta = re.search(r"beta=([\d.]+)", comparison["ours"])
        factor = comparison["factor"]
        if loss == "jsd" and float(beta.group(1)) not in (0, 1):
            value = float(beta.group(1))
            assert float(factor.removesuffix("/T²")) == pytest.approx(value * (1 - value))
            factor = "β (1 − β)/T²"
        elif loss == "jsd":  # at its ends, where it is the KL of the row below
            ours = [factor for _, names, factor in rows if "`forward_kl`" in names]
        assert any(factor in written for written in ours), comparison["rival"]
    versions = {name: ".".join(number.split(".")[:2]) for name, number in measured["contenders"].items()}
    text = " ".join(row[0] for row in rows).lower()
    assert all(f"{name} {version}" in text for name, version in versions.items())
