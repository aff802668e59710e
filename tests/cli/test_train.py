"""`hf-distill train`: every example recipe at tiny size, resuming, rehearsing, and what a user may get wrong."""

import io
import json
import os
import re
from pathlib import Path

import datasets
import pytest
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file

from hf_distill import sources
from hf_distill.cli.main import main
from hf_distill.recipes.models import read_layers
from hf_distill.recipes.reading import read_recipe
from hf_distill.recipes.run import run_recipe
from hf_distill.recipes.values import check_folder
from tests import tiny
from tests.cli.recipe_cases import CASES, command, save
from tests.tokenizers_of_text import byte_level

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
QUICK = {"report": "false", "card": "false"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def train(folder, name, changes, *flags, **more):
    """The exit code, with the recipe's models and data changed."""
    options = {key.replace("__", "."): value for key, value in more.items()}
    return main(["train", str(RECIPES / f"{name}.yaml"), *command(folder, changes, **options), *flags])


def test_every_recipe_has_its_case():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_evaluates_and_saves_a_student(name, tmp_path, capsys):
    changes = CASES[name](tmp_path)
    capsys.readouterr()
    assert main(["--debug", "train", str(RECIPES / f"{name}.yaml"), *command(tmp_path, changes)]) == 0
    printed = capsys.readouterr()
    assert "eval_loss: " in printed.out
    assert f"The student is in {tmp_path / 'out'}." in printed.out
    assert "step 2/2" in printed.err
    assert "it/s" not in printed.err  # no bar of anybody
    assert "{'loss'" not in printed.out  # nor Trainer's own lines
    assert "distilled" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"] > 0
    config = next(
        path for path in (tmp_path / "out").glob("*config.json") if path.name in ("config.json", "adapter_config.json")
    )
    assert "distil" not in config.read_text(encoding="utf-8")


def test_the_student_is_what_was_asked_for_and_can_be_used(tmp_path):
    assert train(tmp_path, "text_classification", CASES["text_classification"](tmp_path), **QUICK) == 0
    student = hf.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    assert student.model.config.num_hidden_layers == 1
    assert student("rain sun")[0]["label"] in ("weather", "music", "furniture")


def test_a_training_goes_on_from_its_last_checkpoint(tmp_path, capsys):
    changes = {**CASES["text_classification"](tmp_path), **QUICK, "max_steps": "4"}
    alike = {"save_strategy": "steps", "save_steps": "2", "lr_scheduler_type": "constant"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(tmp_path, "text_classification", changes, **alike, max_steps="4", output_dir=str(whole)) == 0
    assert train(tmp_path, "text_classification", changes, "--resume", **alike, output_dir=str(halves)) == 0
    assert "No checkpoint in" in capsys.readouterr().err
    more = {**alike, "max_steps": "4", "output_dir": str(halves)}
    assert train(tmp_path, "text_classification", changes, "--resume", **more) == 0
    assert "Going on from" in capsys.readouterr().err
    log = json.loads((halves / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all((found[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("name", ["text_classification", "causal_language_model", "two_stages"])
def test_a_dry_run_leaves_nothing_and_says_that_all_fits(name, tmp_path, capsys):
    changes = CASES[name](tmp_path)
    before = sorted(path for path in tmp_path.iterdir() if path.name != "cache")
    assert train(tmp_path, name, changes, "--dry_run") == 0
    printed = capsys.readouterr()
    assert "Everything fits; nothing was trained." in printed.err
    assert ("layers (from 0): " in printed.err) == ("student.layers" in changes or "layers" in changes["student"])
    assert "step " not in printed.err
    assert printed.out == ""
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before


def test_a_report_that_fails_costs_neither_student_nor_card(tmp_path, capsys):
    changes = CASES["text_classification"](tmp_path)
    assert train(tmp_path, "text_classification", changes, report="{metric: acuracy, baselines: []}") == 1
    assert f"The student is trained, and in {tmp_path / 'out'}" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_report_is_made_where_it_is_asked_for(tmp_path, capsys):
    changes = CASES["text_classification"](tmp_path)
    report = "{baselines: [], batch_sizes: [1], repeats: 1, warm_up: 0}"
    assert train(tmp_path, "text_classification", changes, report=report) == 0
    assert "| teacher |" in capsys.readouterr().out
    assert (tmp_path / "out" / "distillation" / "report.md").is_file()
    written = json.loads((tmp_path / "out" / "distillation" / "report.json").read_text(encoding="utf-8"))
    assert written["data"]["name"] == "texts.csv, held out"
    assert str(tmp_path) not in json.dumps(written)


def test_stages_that_are_listed_train_one_after_another(tmp_path):
    changes = CASES["two_stages"](tmp_path)
    first = "{name: layers, distillation: {matches: [{name: hidden, student: 'hidden[*]', loss: hidden_mse}]}}"
    last = "{name: logits, distillation: {logits: {weight: 1}}, training: {learning_rate: 1e-3, max_steps: 1}}"
    assert train(tmp_path, "two_stages", changes, stages=f"[{first}, {last}]") == 0
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text(encoding="utf-8"))
    assert [(stage["name"], stage["asked"]["learning_rate"]) for stage in lineage["stages"]] == [
        ("layers", 5e-5),
        ("logits", 1e-3),
    ]


def test_arguments_of_a_recipe_win_over_a_preset_s_in_every_stage(tmp_path):
    changes = CASES["two_stages"](tmp_path)
    assert train(tmp_path, "two_stages", changes, learning_rate="2e-3") == 0
    stages = json.loads((tmp_path / "out" / "lineage.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["asked"]["learning_rate"] for stage in stages] == [2e-3, 2e-3]
    assert [stage["asked"]["max_steps"] for stage in stages] == [2, 2]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"data__columns__text": "txt"}, "no column 'txt' (data.columns.text)"),
        ({"data__train": "texts.tsv"}, "texts.tsv"),
        ({"data__eval_split": "dev"}, "has no split 'dev'; it has train."),
        ({"task": "fill-mask"}, "needs models with the head of AutoModelForMaskedLM, and this is a BertFor"),
        ({"student__layers": "9"}, "choose 1 to 3"),
        ({"student__layers": "many"}, "student.layers='many'"),
        ({"predict_with_generate": "true"}, "arguments.predict_with_generate is of text2text-generation alone"),
        ({"data__test_fraction": "0", "eval_strategy": "no", "report": "true"}, "there are none. Set data.eval."),
        ({"student__lora": "{rank: 3}"}, "student.lora: "),
        ({"kd_weight": "-1"}, "kd_weight=-1.0"),
        ({"preset": "tinybrt"}, "Did you mean 'tinybert'?"),
        ({"teacher": "nowhere/at-all"}, "teacher.name='nowhere/at-all' could not be loaded"),
        ({"student__processor": "nowhere/at-all"}, "Name one: student.processor."),
        ({"lerning_rate": "1"}, "--lerning_rate: unknown key. Did you mean 'learning_rate'?"),
        ({"report": "{batchsizes: [1]}"}, "Did you mean 'batch_sizes'?"),
        ({"model_init_kwargs": "{dtype: float32}"}, "this one is built. Drop them."),
    ],
)
def test_an_error_is_one_message_without_a_traceback_before_the_first_step(more, complaint, tmp_path, capsys):
    assert train(tmp_path, "text_classification", CASES["text_classification"](tmp_path), **more) == 1
    printed = capsys.readouterr().err
    assert "hf-distill train: " in printed
    assert complaint in printed
    assert "Traceback" not in printed
    assert "step 1/2" not in printed


@pytest.mark.parametrize("flags", [[], ["--dry_run"], ["--resume"]])
@pytest.mark.parametrize("place", ["texts.csv", "texts.csv/below"])
def test_a_folder_for_the_student_that_is_a_file_is_refused_before_anything_is_loaded(flags, place, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("text\na\n", encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: nowhere/t\nstudent: nowhere/s\ndata: nowhere.csv", encoding="utf-8")
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / place), *flags]) == 1
    complaint = f"arguments.output_dir='{tmp_path / place}', but {tmp_path / 'texts.csv'} is a file. Name a folder"
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("place", ["out", "out/below/it"])
def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_is_loaded(place, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: nowhere/t\nstudent: nowhere/s\ndata: nowhere.csv", encoding="utf-8")
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / place)]) == 1
    complaint = f"arguments.output_dir='{tmp_path / place}', but {tmp_path / 'out'} may not be written to by"
    assert complaint in capsys.readouterr().err


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"but {tmp_path} may not be written to by this user.")):
        check_folder(tmp_path / "new", "output_dir")
    (tmp_path / "new").mkdir()
    check_folder(tmp_path / "new", "output_dir")


def test_a_dry_run_makes_no_repository(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(hf.Trainer, "init_hf_repo", lambda *arguments, **options: made.append(1))
    for name in ("text_classification", "two_stages"):
        (tmp_path / name).mkdir()
        assert train(tmp_path, name, CASES[name](tmp_path / name), "--dry_run", push_to_hub="true") == 0
    assert not made


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"student.intermediate_size": "16"},
            "bert.encoder.layer.0.intermediate.dense.weight is (64, 32) there and (16, 32) here; "
            "bert.encoder.layer.0.intermediate.dense.bias is (64,) there and (16,) here; "
            "bert.encoder.layer.0.output.dense.weight is (32, 64) there and (32, 16) here; 3 more differ. ",
        ),
        ({"student.layers": "3"}, "bert.encoder.layer.2.attention.self.query.weight is not there and (32, 32) here"),
        ({"student.layers": "1"}, "bert.encoder.layer.1.attention.output.LayerNorm.bias is (32,) there and not here"),
        ({"student.lora": "{r: 2}"}, "base_model.model.bert.encoder.layer.0."),
    ],
)
def test_a_checkpoint_of_another_student_is_refused(change, complaint, tmp_path, capsys):
    changes = {**CASES["text_classification"](tmp_path), **QUICK, "student.layers": "2", "save_only_model": "true"}
    changes |= {"save_strategy": "steps", "save_steps": "1"}
    assert train(tmp_path, "text_classification", changes) == 0
    capsys.readouterr()
    assert train(tmp_path, "text_classification", {**changes, **change}, "--resume") == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'checkpoint-2'} is of another student than the recipe's: " in printed
    assert complaint in printed
    assert "begin in another arguments.output_dir" in printed
    assert "size mismatch" not in printed


def test_adapters_and_stages_of_another_shape_are_refused(tmp_path, capsys):
    changes = {**CASES["two_stages"](tmp_path), **QUICK, "save_strategy": "no"}
    assert train(tmp_path, "two_stages", changes) == 0
    wider = {**changes, "student": "{layers: 2, hidden_size: 24, heads: 4}"}
    assert train(tmp_path, "two_stages", wider, "--resume") == 1
    assert "_stages/1-" in (printed := capsys.readouterr().err)
    assert "bert.embeddings.word_embeddings.weight is (" in printed
    assert train(tmp_path, "two_stages", changes, "--resume") == 0
    adapted = {"student": "{name: " + changes["teacher"] + ", lora: {r: 2}}", "output_dir": str(tmp_path / "adapters")}
    adapted = {**changes, **adapted, "stages": "null", "save_strategy": "steps", "save_steps": "1"}
    assert train(tmp_path, "two_stages", adapted, output_dir=adapted["output_dir"]) == 0
    adapted["student"] = adapted["student"].replace("r: 2", "r: 3")
    assert train(tmp_path, "two_stages", adapted, "--resume", output_dir=adapted["output_dir"]) == 1
    assert "lora_A.weight is (2, 32) there and (3, 32) here; " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    changes = {**CASES["text_classification"](tmp_path), **QUICK, "save_strategy": "steps", "save_steps": "1"}
    assert train(tmp_path, "text_classification", changes) == 0
    weights = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(b"no tensors")
    assert train(tmp_path, "text_classification", changes, "--resume") == 1
    assert f"{weights} is damaged (" in capsys.readouterr().err


def test_damaged_weights_of_a_teacher_are_named(tmp_path, capsys):
    changes = CASES["text_classification"](tmp_path)
    (tmp_path / "t" / "model.safetensors").write_bytes(b"no tensors")
    assert train(tmp_path, "text_classification", changes) == 1
    assert f"teacher.name='{tmp_path / 't'}' could not be loaded: SafetensorError: " in capsys.readouterr().err


def test_a_report_on_rows_held_out_reads_them_once(tmp_path, monkeypatch):
    changes, read = CASES["masked_language_model"](tmp_path), []
    load = sources._load
    monkeypatch.setattr(sources, "_load", lambda *given, **options: read.append(given) or load(*given, **options))
    report = "{baselines: [], batch_sizes: [1], lengths: [8], repeats: 1, warm_up: 0}"
    assert train(tmp_path, "masked_language_model", changes, report=report, card="false") == 0
    assert len(read) == 1


def test_a_recipe_without_a_folder_for_the_student_is_refused(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("teacher: t\nstudent: s\ndata: d.csv", encoding="utf-8")
    assert main(["train", str(tmp_path / "r.yaml")]) == 1
    assert "arguments.output_dir is missing" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_distill.recipes.run.run_recipe", stop)
    assert train(tmp_path, "text_classification", {}) == 130
    assert capsys.readouterr().err == "hf-distill train: stopped; repeat the command with --resume to go on\n"


def test_a_terminal_sees_a_bar_and_the_lines_above_it(tmp_path):
    screen = io.StringIO()
    words = command(tmp_path, CASES["text_classification"](tmp_path), **QUICK)
    recipe = read_recipe(RECIPES / "text_classification.yaml", words)
    trained = run_recipe(recipe, console=Console(file=screen, force_terminal=True, width=100))
    seen = screen.getvalue()
    assert "training" in seen
    assert "2/2" in seen
    assert "evaluation: loss" in seen
    assert seen.endswith("\x1b[?25h") or "\x1b[?25h" in seen  # the cursor is back
    assert trained.metrics["eval_agreement"] >= 0


def test_layers_are_a_number_or_numbers():
    assert [read_layers(value) for value in (3, "3", "0,2", [0, 2], None, {"decoder": 1})] == [
        3,
        3,
        [0, 2],
        [0, 2],
        None,
        {"decoder": 1},
    ]


def test_bars_of_other_libraries_are_as_they_were(tmp_path):
    before = datasets.are_progress_bars_disabled(), hf.utils.logging.is_progress_bar_enabled()
    assert train(tmp_path, "masked_language_model", CASES["masked_language_model"](tmp_path), "--dry_run") == 0
    assert (datasets.are_progress_bars_disabled(), hf.utils.logging.is_progress_bar_enabled()) == before


def test_a_student_with_adapters_may_have_its_own_base_for_a_teacher(tmp_path):
    changes = CASES["chat"](tmp_path)
    del changes["teacher"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "student: {lora: {r: 4}}\ndata: {test_fraction: 0}\narguments: {kd_weight: 0.5}", encoding="utf-8"
    )
    assert (
        main(
            ["--debug", "train", str(recipe), *command(tmp_path, changes, **{"student.name": changes.pop("student")})]
        )
        == 0
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_teacher_with_another_tokenizer_is_aligned_by_the_text(tmp_path, capsys):
    changes = CASES["causal_language_model"](tmp_path)
    other = byte_level(300)
    changes["data.max_length"] = changes.pop("max_length")
    changes["teacher"] = save(tmp_path / "other", tiny.llama(hidden=48, vocab_size=len(other)), other)
    more = {
        "token_alignment": "offsets",
        "packing": "false",
        "packing_strategy": "bfd",
        "max_length": "1024",
    }
    assert train(tmp_path, "causal_language_model", changes, **more) == 0
    assert "loss_kd" in capsys.readouterr().err


def test_a_checkpoint_may_be_named(tmp_path, capsys):
    changes = {**CASES["masked_language_model"](tmp_path), **QUICK}
    assert train(tmp_path, "masked_language_model", changes, save_strategy="steps", save_steps="1") == 0
    capsys.readouterr()
    place = str(tmp_path / "out" / "checkpoint-1")
    assert train(tmp_path, "masked_language_model", changes, resume_from_checkpoint=place) == 0
    assert "step 1/2  epoch" not in capsys.readouterr().err
    assert train(tmp_path, "masked_language_model", changes, resume_from_checkpoint=place, stages="tinybert") == 1
    assert "is of one training" in capsys.readouterr().err
