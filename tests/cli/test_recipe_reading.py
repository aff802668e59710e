"""A recipe from YAML and a command line: what is read, and what is refused with which words."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_distill.recipes.reading import argument_types, read_overrides, read_recipe, recipe_of, stages_of
from hf_distill.recipes.recipe import DataPart, Recipe, StudentPart, TeacherPart

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
LEAST = {"teacher": "t", "student": "s", "data": "rows.csv"}


def changed(*words, **values):
    return recipe_of({**LEAST, **values}, read_overrides(words))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_what_a_person_would_write(path):
    recipe = read_recipe(path)
    assert recipe.arguments["output_dir"] in ("distilled", "adapter")
    assert recipe.teacher.name


def test_a_name_alone_stands_for_its_section():
    recipe = changed()
    assert recipe.teacher == TeacherPart(name="t")
    assert recipe.student == StudentPart(name="s")
    assert recipe.data == DataPart(train="rows.csv")


def test_what_yaml_takes_for_a_text_is_read_as_the_number_it_is_for():
    recipe = changed(arguments={"learning_rate": "1e-4", "max_steps": "1e3", "weight_decay": 1}, data={"train": "x"})
    assert recipe.arguments == {"learning_rate": 1e-4, "max_steps": 1000, "weight_decay": 1.0}
    assert all(type(value) in (int, float) for value in recipe.arguments.values())


def test_no_is_a_word_where_a_word_is_expected_and_else_false():
    text = "arguments: {eval_strategy: no, bf16: no, report_to: none}\nteacher: t\nstudent: s\ndata: d"
    assert recipe_of(yaml.safe_load(text)).arguments == {"eval_strategy": "no", "bf16": False, "report_to": "none"}


def test_an_argument_that_is_left_empty_is_not_given_unless_nothing_is_a_value_of_it():
    given = {"learning_rate": None, "kd_weight": None, "seed": 3, "max_length": None}
    assert changed(arguments=given).arguments == {"seed": 3, "max_length": None}


def test_the_command_line_changes_arguments_and_keys_with_dots():
    recipe = changed(
        *[
            "--learning_rate",
            "1e-4",
            "--packing",
            "--seed=7",
            "--student",
            "{layers: 3}",
            "--data.columns.text",
            "body",
        ],
        *[
            "--kd-options.beta",
            "0.5",
            "--arguments.debug",
            "underflow_overflow",
            "--max_steps",
            "-1",
            "--data",
            "new.csv",
        ],
        data={"train": "rows.csv", "columns": {"label": "intent"}},
        arguments={"learning_rate": 1, "kd_loss": "jsd"},
    )
    assert recipe.arguments == {
        "learning_rate": 1e-4,
        "kd_loss": "jsd",
        "packing": True,
        "seed": 7,
        "kd_options": {"beta": 0.5},
        "debug": "underflow_overflow",
        "max_steps": -1,
    }
    assert recipe.student == StudentPart(layers=3)
    assert recipe.data == DataPart(train="new.csv", columns={"label": "intent", "text": "body"})


def test_a_later_change_wins_and_leaves_the_file_s_values_alone():
    values = {**LEAST, "arguments": {"kd_options": {"beta": 1}}}
    assert recipe_of(values, read_overrides(["--seed", "1", "--seed", "2", "--kd_options.beta", "2"])).arguments == {
        "seed": 2,
        "kd_options": {"beta": 2},
    }
    assert values["arguments"] == {"kd_options": {"beta": 1}}


def test_no_argument_is_called_as_a_section():
    assert not {field.name for field in fields(Recipe)} & {*argument_types()}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"techer": "t"}, r"^techer: unknown key\. Did you mean 'teacher'\? Known: data, student, teacher"),
        ({"student": {"layrs": 3}}, r"^student\.layrs: unknown key\. Did you mean 'layers'\?"),
        ({"data": {"train": "x", "colums": {}}}, r"^data\.colums: unknown key\. Did you mean 'columns'\?"),
        (
            {"arguments": {"learning_rat": 1}},
            r"^arguments\.learning_rat: unknown key\. Did you mean 'learning_rate'\?",
        ),
        ({"stages": [{"name": "a", "trainng": {}}]}, r"^stages\[0\]\.trainng: .*Did you mean 'training'\?"),
        (
            {"stages": [{"name": "a", "training": {"lerning_rate": 1}}]},
            r"stages\[0\]\.training\.lerning_rate: .*'learn",
        ),
        ({"stages": [{}]}, r"stages\[0\] lacks a name"),
        ({"stages": "tinybrt"}, r"stages='tinybrt' is unknown\. Did you mean 'tinybert'\?"),
        ({"task": "text-clasification"}, r"task='text-clasification' is unknown\. Did you mean 'text-classification'"),
        ({"arguments": {"learning_rate": "fast"}}, r"^arguments\.learning_rate='fast', expected a number\.$"),
        ({"arguments": {"num_train_epochs": True}}, r"^arguments\.num_train_epochs=True, expected a number"),
        ({"arguments": {"max_steps": 2.5}}, r"^arguments\.max_steps=2\.5, expected a whole number"),
        ({"arguments": {"packing": "yes"}}, r"^arguments\.packing='yes', expected true or false"),
        ({"arguments": [1]}, r"^arguments is \[1\]; expected a mapping"),
        ({"data": {"train": ["a"]}}, r"^data\.train=\['a'\], expected a text"),
        ({"data": {"train": "x", "columns": "text"}}, r"^data\.columns='text', expected a mapping"),
        ({"data": {"train": "x", "test_fraction": 2}}, r"^data\.test_fraction=2\.0, but it is a share"),
        ({"data": {"eval": "x"}}, r"train"),
        (
            {"student": {"name": "s", "layers": 3}},
            r"student\.name='s' is trained as it is, and student\.layers builds",
        ),
        ({"student": {}}, r"student says nothing"),
        ({"teacher": {}, "student": {"layers": 2}}, r"teacher\.name is missing"),
        ({"teacher": {}, "report": True}, r"report compares .*teacher\.name is missing"),
        ({"report": {"repeat": 3}}, r"^report\.repeat: unknown key\. Did you mean 'repeats'\?"),
        ({"report": {"repeats": "often"}}, r"^report\.repeats='often', expected a whole number"),
        ({"report": {"repeats": 0}}, r"repeats is 0; expected a whole number, at least 1"),
        ({"report": {"baselines": ["int9"]}}, r"^report\.baselines='int9' is unknown\. Did you mean 'int8'\?"),
        ({"report": "yes"}, r"^report='yes', expected true or false or a mapping"),
        ({"student": {"name": "s", "lora": {}}, "stages": "tinybert"}, r"lora beside stages"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        recipe_of({**LEAST, **values})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--learing_rate", "1"], r"--learing_rate: unknown key\. Did you mean 'learning_rate'\?"),
        (["--studnt", "x"], r"--studnt: unknown key\. Did you mean 'student'\?"),
        (["--student.layer", "x"], r"student\.layer: unknown key\. Did you mean 'layers'\?"),
        (["--layers", "3"], r"--layers: unknown key\. .* student\.layers"),
        (["--seed", "1", "2"], r"'2' follows no key"),
        (["--seed", "many"], r"arguments\.seed='many', expected a whole number"),
        (["--data.columns", "{text: "], r"--data\.columns .* is no YAML"),
    ],
)
def test_a_change_that_is_wrong_is_said(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        changed(*words)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("teacher: t\nstudent: [1\ndata: x\n", r"r\.yaml: line \d: "),
        ("teacher: t\n\tstudent: s\n", r"r\.yaml: line 2: "),
        ("teacher: t\nteacher: u\n", r"yaml: 'teacher' is written twice, in line 1 and line 2"),
        ("- a\n", r"r\.yaml: The recipe is \['a'\]; expected a mapping with data, student"),
        ("", r"r\.yaml: data is missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_line(text, complaint, tmp_path):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_recipe(tmp_path / "r.yaml")


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"none\.yaml is no file\. Relative paths begin at {tmp_path}"):
        read_recipe("none.yaml")


def test_stages_are_read_with_their_numbers():
    terms = {"logits": {"weight": 1}}
    listed = [{"name": "a", "distillation": terms, "training": {"learning_rate": "1e-3"}}, {"name": "b"}]
    first, second = stages_of(changed(stages=listed))
    assert (first.name, first.training, first.distillation) == ("a", {"learning_rate": 1e-3}, terms)
    assert (second.name, second.training) == ("b", {})
