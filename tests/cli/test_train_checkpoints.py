"""`hf-distill train --resume` where the checkpoints are not what a finished saving leaves."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from hf_distill.cli.main import main
from tests.cli.recipe_cases import CASES, command

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
OPTIONS = {"report": "false", "card": "false", "save_strategy": "steps", "save_steps": "1", "max_steps": "3"}


def train(name, changes, out, *flags, **more):
    words = command(out.parent, changes, **OPTIONS, output_dir=str(out), **more)
    return main(["train", str(RECIPES / f"{name}.yaml"), *words, *flags])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe's changes, and a folder with checkpoints of the steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        changes = CASES["masked_language_model"](folder)
        assert train("masked_language_model", changes, folder / "out") == 0
        yield changes, folder / "out"


@pytest.fixture
def out(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "out")
    return tmp_path / "out"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def steps_of(out):
    log = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["step"] for entry in log if "loss" in entry]


@pytest.mark.parametrize(
    ("torn", "said", "going_on"),
    [
        ({3: "trainer_state.json"}, "checkpoint-3 (no trainer_state.json).", "checkpoint-2"),
        ({3: "model.safetensors"}, "checkpoint-3 (no weights).", "checkpoint-2"),
        (
            {1: "trainer_state.json", 2: "model.safetensors", 3: "trainer_state.json"},
            "checkpoint-3 (no trainer_state.json), ",
            None,
        ),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over_for_the_one_before(torn, said, going_on, trained, out, capsys):
    for step, name in torn.items():
        (out / f"checkpoint-{step}" / name).unlink()
    cut_in_half(out / "checkpoint-3" / "optimizer.pt")  # as the cut leaves it
    (out / "checkpoint-old").mkdir()
    capsys.readouterr()
    assert train("masked_language_model", trained[0], out, "--resume") == 0
    printed = capsys.readouterr().err
    assert printed.count("Passed over, as cut off while it was saved or removed: ") == 1
    assert f"{out}/{said}" in printed
    assert (f"Going on from {out / going_on}." if going_on else f"No checkpoint in {out}: beginning.") in printed
    assert steps_of(out) == [1, 2, 3]


def test_whole_checkpoints_are_numbers_and_not_words(trained, out, capsys):
    (out / "checkpoint-3").rename(out / "checkpoint-10")
    assert train("masked_language_model", trained[0], out, "--resume") == 0
    printed = capsys.readouterr().err
    assert f"Going on from {out / 'checkpoint-10'}." in printed
    assert "Passed over" not in printed


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_damaged_file_of_the_checkpoint_is_named_with_what_mends_it(name, trained, out, capsys):
    damaged = out / "checkpoint-3" / name
    cut_in_half(damaged)
    assert train("masked_language_model", trained[0], out, "--resume") == 1
    printed = capsys.readouterr().err
    assert f"hf-distill train: {damaged} is damaged (" in printed
    assert f"Delete {damaged.parent} to go on from the checkpoint before it." in printed
    assert "Traceback" not in printed
    damaged.write_bytes(b"")
    assert train("masked_language_model", trained[0], out, resume_from_checkpoint=str(damaged.parent)) == 1
    assert f"hf-distill train: {damaged} is damaged (" in capsys.readouterr().err


def test_what_is_said_to_mend_a_damaged_checkpoint_does(trained, out, capsys):
    cut_in_half(out / "checkpoint-3" / "optimizer.pt")
    assert train("masked_language_model", trained[0], out, "--resume") == 1
    shutil.rmtree(out / "checkpoint-3")
    assert train("masked_language_model", trained[0], out, "--resume") == 0
    assert f"Going on from {out / 'checkpoint-2'}." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint-2", "nowhere"])
def test_a_checkpoint_that_is_named_must_be_whole(name, trained, out, capsys):
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    assert train("masked_language_model", trained[0], out, resume_from_checkpoint=str(out / name)) == 1
    complaint = f"resume_from_checkpoint='{out / name}' is no whole checkpoint: no trainer_state.json. Name another"
    assert complaint in capsys.readouterr().err


def test_a_stage_s_student_that_is_half_saved_does_not_stop_it_from_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    changes, out = CASES["two_stages"](tmp_path), tmp_path / "out"
    assert train("two_stages", changes, out) == 0
    first = next((out / "_stages").glob("1-*"))
    lineage = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    lineage["stages"] = [{**lineage["stages"][0], "status": "training"}]
    (out / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    for path in (first / "model.safetensors", first / "checkpoint-3" / "model.safetensors"):
        cut_in_half(path)
    (first / "checkpoint-3" / "trainer_state.json").unlink()
    assert train("two_stages", changes, out, "--resume") == 0
    lineage = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    assert [stage["resumed_at_steps"] for stage in lineage["stages"]] == [[2], []]
    cut_in_half(first / "model.safetensors")
    capsys.readouterr()
    assert train("two_stages", changes, out, "--resume") == 1
    printed = capsys.readouterr().err
    assert f"{first / 'model.safetensors'} is damaged (" in printed
    assert "Begin in another output_dir." in printed
