"""`hf-distill report` and `hf-distill card`: on folders, as after a training."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from hf_distill.cli.main import main
from hf_distill.cli.report import read_columns
from hf_distill.report.options import check_device
from tests import tiny
from tests.cli.recipe_cases import CASES, IDS, command, save, words
from tests.text import corpus, models

QUICK = ["--baselines", "--batch_sizes", "1", "--repeats", "1", "--warm_up", "0"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A teacher in `t`, a student in `s` with a tokenizer of its own, and texts in `texts.csv`."""
    CASES["text_classification"](tmp_path)
    torch.manual_seed(2)
    save(tmp_path / "s", tiny.bert(layers=1, **IDS), words(40))
    return tmp_path


def report(folder, *options, dataset="texts.csv"):
    places = [
        f"--{role}={folder / place}" for role, place in (("teacher", "t"), ("student", "s"), ("dataset", dataset))
    ]
    return main(["report", *places, *QUICK, *options])


def test_a_report_is_printed_and_written(folder, capsys):
    out = folder / "report"
    assert report(folder, "--columns", "text=sentence", "--output_dir", str(out), "--metric", "f1_macro") == 0
    printed = capsys.readouterr().out
    assert "| teacher |" in printed
    assert "**student**" in printed
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".png") == ["report.json", "report.md"]
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (written["metric"], written["data"]["name"]) == ("f1_macro", "texts.csv")
    assert [model["kind"] for model in written["models"]] == ["teacher", "student"]
    assert written["models"][0]["quality"]["items"] == 24
    assert str(folder) not in json.dumps(written)


def test_text_for_a_language_model_is_tokenised(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("\n".join(corpus.SENTENCES), encoding="utf-8")
    student, teacher = models.pair("llama")
    for name, model in (("t", teacher), ("s", student)):
        save(tmp_path / name, model, corpus.tokenizer())
    assert report(tmp_path, "--max_length", "16", dataset="corpus.txt") == 0
    assert "perplexity" in capsys.readouterr().out


def test_each_thing_measured_is_a_line_beside_the_report(folder, capsys):
    options = ["--columns", "text=sentence", "--baselines", "pruned", "--lengths", "8"]
    assert report(folder, *options) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith(("teacher", "student"))]
    assert lines == [
        "teacher: scores",
        "student: scores",
        "teacher, student: latency, batch 1, length 8",
        "teacher, pruned: made",
        "teacher, pruned: scores",
        "teacher, pruned: latency, batch 1, length 8",
    ]
    assert "latency, batch" not in printed.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "data.columns: {text: ...}"),
        (["--columns", "text"], "write NAME=COLUMN"),
        (["--columns", "text=sentence", "--split", "dev"], "no split 'dev'"),
        (["--columns", "text=sentence", "--metric", "f2"], "f2"),
        (["--columns", "text=sentence", "--output_dir", __file__], f"--output_dir='{__file__}', but {__file__} is a"),
        (["--columns", "text=sentence", "--task", "fill-mas"], "Did you mean 'fill-mask'?"),
        (
            ["--columns", "text=sentence", "--student", "nowhere/at-all"],
            "--student='nowhere/at-all' could not be loaded",
        ),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_in_words(folder, options, complaint, capsys):
    assert report(folder, *options) == 1
    printed = capsys.readouterr().err
    assert "hf-distill report: " in printed
    assert complaint in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("cuda:99", "is not on this machine. There are: cpu"),
        ("meta", "is not on this machine. There are: cpu"),
        ("nonsense", "is no device of torch's. There are: cpu"),
        ("cuda:x", "is no device of torch's. There are: cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device, complaint, tmp_path, capsys):
    assert report(tmp_path, "--device", device) == 1  # neither models nor rows are in the folder
    assert f"hf-distill report: --device={device!r} {complaint}" in capsys.readouterr().err


def test_a_recipe_s_device_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: nowhere/t\nstudent: nowhere/s\ndata: nowhere.csv", encoding="utf-8")
    options = ["--output_dir", str(tmp_path / "out"), "--report", "{device: cuda:99}"]
    assert main(["train", str(recipe), *options]) == 1
    assert "hf-distill train: report.device='cuda:99' is not on this machine. There" in capsys.readouterr().err


def test_devices_that_are_there_are_listed_and_taken(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in (None, "cpu", "cuda", "cuda:0", "cuda:1", torch.device("cuda", 1)):
        check_device(device, "device")
    with pytest.raises(ValueError, match=r"device='cuda:2' is not on this .*There are: cpu, cuda:0, cuda:1\.$"):
        check_device("cuda:2", "device")


def test_columns_are_pairs():
    assert read_columns(["text=a", "label=b=c"]) == {"text": "a", "label": "b=c"}


def test_a_report_needs_its_models(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--teacher", "t"])
    assert stop.value.code == 2
    assert "--student" in capsys.readouterr().err


def test_a_card_is_written_of_what_a_training_left(tmp_path, capsys):
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "text_classification.yaml"
    assert main(["train", str(recipe), *command(tmp_path, CASES["text_classification"](tmp_path), card="false")]) == 0
    card = tmp_path / "out" / "README.md"
    assert not card.exists()
    assert main(["card", str(tmp_path / "out")]) == 0
    assert f"Written: {card}" in capsys.readouterr().out
    assert "knowledge-distillation" in card.read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["nothing", "."])
def test_a_folder_without_a_training_has_no_card(place, tmp_path, capsys):
    assert main(["card", str(tmp_path / place)]) == 1
    printed = capsys.readouterr().err
    assert "hf-distill card: " in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("kind", ["image_classification", "audio_classification"])
def test_what_is_made_when_it_is_read_is_measured(kind, tmp_path):
    source = Path(CASES[kind](tmp_path)["data"])
    (tmp_path / "t").rename(tmp_path / "s")
    CASES[kind](tmp_path)
    columns = ["--columns", "label=keyword"] if kind == "audio_classification" else []
    assert report(tmp_path, *columns, "--output_dir", str(tmp_path), dataset=source.name) == 0
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [model["quality"]["items"] for model in written["models"]] == [written["data"]["rows"]] * 2


def test_labels_are_those_of_the_student_where_it_has_another_order(tmp_path, capsys):
    names, order = ["no", "yes", "maybe"], [2, 0, 1]
    torch.manual_seed(0)
    teacher, student = tiny.bert(**IDS), tiny.bert(**IDS)
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        teacher.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # it always says yes
        student.classifier.weight.copy_(teacher.classifier.weight[order])
        student.classifier.bias.copy_(teacher.classifier.bias[order])
    for name, model, own in (("t", teacher, names), ("s", student, [names[number] for number in order])):
        model.config.id2label = dict(enumerate(own))
        model.config.label2id = {label: number for number, label in enumerate(own)}
        save(tmp_path / name, model, words(40))
    (tmp_path / "texts.csv").write_text("text,label\nw1 w2,yes\nw3 w4,Yes\nw5 w6,no\n", encoding="utf-8")
    assert report(tmp_path, "--output_dir", str(tmp_path)) == 0
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    accuracies = [model["quality"]["metrics"]["accuracy"] for model in written["models"]]
    assert accuracies == pytest.approx([2 / 3, 2 / 3])
