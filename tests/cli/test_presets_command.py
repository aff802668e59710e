"""`hf-distill presets`: the list, and what it shows can be copied into a recipe."""

import subprocess
import sys

import pytest
import yaml

from hf_distill import DistillationConfig
from hf_distill.cli.main import main
from hf_distill.presets import load_preset, preset_names
from hf_distill.recipes.reading import recipe_of, stages_of

LEAST = {"teacher": "t", "student": "s", "data": "rows.csv"}


def shown(name, capsys):
    assert main(["presets", "show", name]) == 0
    return capsys.readouterr().out


def test_the_list_has_every_preset_with_its_title_and_paper(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(preset_names())
    for line in lines:
        preset = load_preset(line.split()[0])
        assert preset.title in line
        assert preset.paper in line


@pytest.mark.parametrize("name", preset_names())
def test_what_is_shown_can_be_copied_and_says_the_same_as_the_preset(name, capsys):
    printed, preset = shown(name, capsys), load_preset(name)
    assert preset.title in printed
    assert preset.paper in printed
    assert preset.notes.split()[0] in printed
    short = yaml.safe_load(printed.split("In a recipe:")[1].split("\n\n")[1])
    assert recipe_of({**LEAST, **short}).arguments == {"preset": name}
    recipe = recipe_of({**LEAST, **yaml.safe_load(printed.split("Written out, to change:")[1])})
    if len(preset.stages) == 1:
        assert DistillationConfig.load(recipe.arguments["distillation_config"]) == preset.stages[0].config
        return
    for stage, expected in zip(stages_of(recipe), preset.stages, strict=True):
        assert stage.name == expected.name
        assert DistillationConfig.load(stage.distillation) == expected.config
        assert stage.training == expected.training


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tinybrt"], "'tinybrt' is unknown. Did you mean 'tinybert'?"),
        (["TinyBERT"], "'TinyBERT' is unknown. Did you mean 'tinybert'?"),
    ],
)
def test_a_preset_that_is_not_there_is_refused(words, complaint, capsys):
    assert main(["presets", "show", *words]) == 1
    assert complaint in capsys.readouterr().err


def test_show_without_a_name_says_what_is_missing_and_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["presets", "show"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: hf-distill presets [show NAME]")
    assert f"show lacks the NAME of a preset. Known: {', '.join(preset_names())}." in printed


def test_presets_are_listed_and_shown_without_torch():
    code = "import sys; from hf_distill.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for words in (["presets"], ["presets", "show", "dkd"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n")
