"""The record beside a student: true, whole, and without anything that is private to the machine or its user."""

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, DatasetInfo, load_dataset, load_from_disk
from peft import LoraConfig

from hf_distill import DistillationTrainer, Stage, provenance, run_stages
from hf_distill.config import DistillationConfig
from hf_distill.generation.folder import AnswerFolder
from hf_distill.lineage import Lineage
from hf_distill.models.fingerprint import weights_fingerprint
from hf_distill.provenance import STUDENT_ADAPTERS_OFF, describe_data, public_name, without_paths
from hf_distill.run_record import RunRecord, record_path
from tests import tiny
from tests.card.cards import fill_the_disk
from tests.training import arguments, make_trainer, values

TOKEN = "hf_planted0secret0token"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record") / "out"
    train = Dataset.from_list(values(tiny.rows("sequence")))
    options = {"preset": "tinybert", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "temperature": 3.0}
    trainer = make_trainer(folder, "bert", train_dataset=train, processing_class=tiny.tokenizer(), **options)
    trainer.train()
    trainer.save_model()
    return trainer, folder, train


def test_the_record_says_what_was_trained_by_whom_on_what(run):
    trainer, folder, train = run
    record = RunRecord.read(folder)
    saved = transformers.BertForSequenceClassification.from_pretrained(folder)
    assert record.student["weights"] == weights_fingerprint(saved)
    assert record.student["parameters"] == sum(p.numel() for p in saved.parameters())
    assert record.teacher["weights"] == weights_fingerprint(trainer.teacher.model)
    assert record.teacher["weights"] != record.student["weights"]
    assert (record.student["class"], record.student["model_type"]) == ("BertForSequenceClassification", "bert")
    assert (record.task, record.problem_type) == ("sequence_classification", "single_label_classification")
    assert DistillationConfig.from_dict(record.terms) == trainer.args.distillation
    assert (record.preset, record.logit_loss, record.name) == ("tinybert", "forward_kl", "out")
    assert record.layers["hidden"] == [
        ["hidden[0]", "hidden[0]"],
        ["hidden[1]", "hidden[2]"],
        ["hidden[2]", "hidden[3]"],
    ]
    assert record.data["train"]["rows"] == len(train) == 8
    assert record.data["train"]["fingerprint"] == train._fingerprint
    assert record.arguments["learning_rate"] == trainer.args.learning_rate
    assert record.arguments["max_steps"] == 4
    assert record.log_history == trainer.state.log_history
    assert record.wall_time_s == record.train_metrics["train_runtime"] > 0
    assert record.hardware["processes"] == 1
    assert record.versions["transformers"] == transformers.__version__


def test_a_record_is_read_as_it_was_written(run, tmp_path):
    record = RunRecord.read(run[1])
    path = record.write(tmp_path)
    assert path == record_path(tmp_path)
    assert RunRecord.read(tmp_path) == record
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]  # and nothing half written


def test_only_the_student_in_the_output_folder_gets_a_record(run, tmp_path):
    trainer = run[0]
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere/distillation").exists()
    plain = make_trainer(tmp_path / "plain", teacher_model=None, kd_weight=0.0, task_weight=1.0)
    plain.save_model()
    assert not (tmp_path / "plain/distillation").exists()
    checkpoints = make_trainer(tmp_path / "steps", save_strategy="steps", save_steps=1)
    checkpoints.train()
    assert {path.name for path in (tmp_path / "steps").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert "distillation" not in {path.name for path in (tmp_path / "steps/checkpoint-2").iterdir()}


def test_the_file_is_strict_json_whatever_was_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.log({"eval_odd": float("nan"), "eval_great": float("inf"), "eval_note": "text"})
    trainer.save_model()

    def refuse(word):
        raise AssertionError(word)

    content = json.loads(record_path(tmp_path).read_text(encoding="utf-8"), parse_constant=refuse)
    last = content["log_history"][-1]
    assert (last["eval_odd"], last["eval_great"]) == (None, None)
    assert "eval_note" not in last


def test_what_is_no_record_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no record.*save_model"):
        RunRecord.read(tmp_path)
    path = record_path(tmp_path)
    path.parent.mkdir()
    path.write_text('{"format": 9, "versions": {"hf-distill": "7.0"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"format 9; this version reads 1.*7\.0"):
        RunRecord.read(tmp_path)
    for text in ("{", "[]", '{"format": 1}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json is no record"):
            RunRecord.read(tmp_path)


def test_nothing_private_reaches_record_or_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    home = tmp_path / "home-of-planteduser"
    monkeypatch.setenv("HOME", str(home))
    student, teacher = tiny.pair("bert")
    student.save_pretrained(home / "models/my-student")
    teacher.save_pretrained(home / "models/my-teacher")
    phrases = home / "private-folder/phrases.txt"
    phrases.parent.mkdir()
    phrases.write_text("w1 w2\n", encoding="utf-8")
    rows = [{**row, "text": "w1 w2"} for row in values(tiny.rows("sequence"))]
    trainer = make_trainer(
        home / "runs/my-output",
        models=(str(home / "models/my-student"), str(home / "models/my-teacher")),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        hub_token=TOKEN,
        run_name=f"run of planteduser at {home}",
        item_weights=[{"by": "phrases", "file": str(phrases)}],
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    folder = home / "runs/my-output"
    written = {path: path.read_text(encoding="utf-8") for path in (folder / "README.md", record_path(folder))}
    for path, text in written.items():
        for secret in (
            TOKEN,
            "planteduser",
            "private-folder",
            str(tmp_path),
            socket.gethostname(),
            "/models",
            "/runs",
        ):
            assert secret not in text, (path.name, secret)
        if len(user := getpass.getuser()) > 4:  # "root" is in other words
            assert user not in text
    record = RunRecord.read(folder)
    assert (record.student["name"], record.teacher["name"]) == ("my-student", "my-teacher")
    assert not record.student["on_hub"]
    assert record.terms["logits"]["item_weights"][0]["file"] == "phrases.txt"
    assert record.name == "my-output"


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/model", None, ("org/model", True)),
        ("bert-base-uncased", "abc", ("bert-base-uncased", True)),
        ("bert-base-uncased", None, ("bert-base-uncased", False)),
        ("/home/ann/models/teacher/", "abc", ("teacher", False)),
        ("C:\\Users\\ann\\teacher", None, ("teacher", False)),
        ("../../ann/teacher", None, ("teacher", False)),
        ("runs/ann/teacher", None, ("teacher", False)),
        ("https://ann:secret@host/teacher", None, ("teacher", False)),
        ("", None, (None, False)),
        (None, None, (None, False)),
        ("..", None, (None, False)),
        ("~", None, (None, False)),
    ],
)
def test_of_a_path_there_stays_the_last_part(name, revision, expected):
    assert public_name(name, revision) == expected


def test_a_folder_that_looks_like_a_name_on_the_hub_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
    assert public_name("org/model") == ("model", False)


def test_paths_are_shortened_at_any_depth():
    value = {
        "file": "a/b.txt",
        "map": [[1, 2]],
        "deep": [{"at": "/x/y"}, "~/z", "hidden[*]", None, True, float("nan")],
    }
    expected = {"file": "b.txt", "map": [[1, 2]], "deep": [{"at": "y"}, "z", "hidden[*]", None, True, None]}
    assert without_paths(value) == expected


def test_a_data_set_of_the_hub_is_known_by_where_it_came_from():
    url = "hf://datasets/org/texts@0123abc/plain/train-00000-of-00001.parquet"
    info = DatasetInfo(builder_name="parquet", dataset_name="texts", config_name="plain", download_checksums={url: {}})
    found = describe_data(Dataset.from_dict({"a": [1, 2]}, info=info, split="train"))
    assert (found["name"], found["on_hub"], found["revision"]) == ("org/texts", True, "0123abc")
    assert (found["config"], found["split"], found["rows"]) == ("plain", "train", 2)


def test_what_load_dataset_fetched_from_the_hub_is_known_by_the_folders_of_the_two_caches(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    rows = Dataset.from_dict({"a": [1, 2]})
    rows.save_to_disk(tmp_path / "rows")
    cached = tmp_path / "datasets/some_org___my_texts/default/0.0.0" / commit / "my_texts-train.arrow"
    cached.parent.mkdir(parents=True)
    (tmp_path / "rows/data-00000-of-00001.arrow").rename(cached)
    loaded = Dataset.from_file(str(cached), info=DatasetInfo(builder_name="parquet", dataset_name="my_texts"))
    monkeypatch.setattr(provenance, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert describe_data(loaded)["on_hub"] is False  # another machine's cache, or a folder that looks alike
    (tmp_path / "hub/datasets--some_org--MyTexts/snapshots" / commit).mkdir(parents=True)
    for rows in (loaded, loaded.select([1]), loaded.map(lambda row: {"b": 1})):
        found = describe_data(rows)
        assert (found["name"], found["on_hub"], found["revision"]) == ("some_org/MyTexts", True, commit)


def test_a_local_file_is_no_data_set_of_the_hub():
    local = DatasetInfo(builder_name="csv", dataset_name="csv", download_checksums={"/home/ann/a.csv": {}})
    found = describe_data({"dev": Dataset.from_dict({"a": [1]}, info=local)})["dev"]
    assert (found["name"], found["on_hub"]) == (None, False)


def test_a_file_of_rows_to_test_on_is_not_called_a_split_to_train_on(tmp_path):
    (tmp_path / "test.csv").write_text("text\na\nb\n", encoding="utf-8")
    options = {"data_files": str(tmp_path / "test.csv"), "cache_dir": str(tmp_path)}
    rows = load_dataset("csv", split="train", **options)
    assert describe_data(rows)["split"] is None
    assert describe_data(rows.train_test_split(test_size=1)["test"])["split"] is None
    both = {name: str(tmp_path / "test.csv") for name in ("train", "test")}
    rows = load_dataset("csv", split="test", data_files=both, cache_dir=str(tmp_path))
    assert describe_data(rows)["split"] == "test"


@pytest.mark.parametrize("builder", ["csv", "json", "parquet", "text"])
def test_rows_of_a_local_file_are_called_by_their_builder_and_never_by_a_folder(builder, tmp_path):
    folder = tmp_path / "private-folder"
    folder.mkdir()
    path = folder / f"train.{builder}"
    if builder == "text":
        path.write_text("a\nb\n", encoding="utf-8")
    else:
        getattr(Dataset.from_dict({"text": ["a", "b"]}), f"to_{builder}")(path)
    cache = str(tmp_path / "cache")
    loaded = load_dataset(builder, data_files=str(path), split="train", cache_dir=cache)
    loaded.save_to_disk(folder / "saved")
    read = getattr(Dataset, f"from_{builder}")(str(path), cache_dir=cache)
    for rows in (loaded, read, loaded.map(lambda row: {"size": 1}), load_from_disk(folder / "saved")):
        found = describe_data(rows)
        assert (found["name"], found["on_hub"], found["builder"], found["rows"]) == (None, False, builder, 2)
        assert "private" not in str(found)
        assert str(tmp_path) not in str(found)


def test_of_the_files_of_a_data_set_there_stay_the_names():
    local = ["/home/ann/a.csv", "C:\\Users\\ann\\b.csv", "data/a.csv"]
    elsewhere = ["https://host/c.csv?token=secret", "zip://d.csv::/home/ann/e.zip"]

    def described(urls):
        info = DatasetInfo(builder_name="csv", dataset_name="csv", download_checksums={url: {} for url in urls})
        return describe_data(Dataset.from_dict({"a": [1]}, info=info))

    assert described(local + elsewhere)["files"] == ["a.csv", "b.csv"]
    assert "files" not in described(elsewhere)
    assert described([f"/ann/{number}.csv" for number in range(30)])["files"] == [
        *(f"{number}.csv" for number in range(10)),
        "...",
    ]
    assert "builder" not in describe_data(Dataset.from_dict({"a": [1]}))


def test_a_file_whose_writing_fails_is_what_it_was(run, tmp_path, monkeypatch):
    record = RunRecord.read(run[1])
    lineage, answers = Lineage(tmp_path, writes=True), AnswerFolder(tmp_path / "answers", {"seed": 1})
    writers = [
        lambda: record.write(tmp_path),
        lambda: lineage.begin(1, {"name": "one", "asked": {}}, resumed_at=None),
        lambda: answers.save_part(0, [{"completion": "a"}], {"answers": 1}),
    ]
    for write in writers:
        write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == len(writers)
    fill_the_disk(monkeypatch)
    for write in writers:
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_name_of_the_hub_keeps_its_revision(tmp_path):
    student, teacher = tiny.pair("bert")
    for model, name in ((student, "org/student"), (teacher, "org/teacher")):
        model.name_or_path = model.config._name_or_path = name
        model.config._commit_hash = "0123456789abcdef"
    record = RunRecord.of(make_trainer(tmp_path, models=(student, teacher), hub_model_id="me/distilled"))
    assert (record.student["name"], record.student["revision"]) == ("org/student", "0123456789abcdef")
    assert (record.teacher["name"], record.teacher["on_hub"]) == ("org/teacher", True)
    assert (record.repo_id, record.name) == ("me/distilled", "distilled")


def test_an_adapter_is_recorded_with_its_base_as_teacher(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(
        tmp_path, "llama", models=(tiny.pair("llama")[0], None), teacher_model=None, peft_config=config
    )
    record = RunRecord.of(trainer)
    assert record.student["peft"] == "LORA"
    assert record.student["class"] == record.teacher["class"] == "LlamaForCausalLM"
    assert record.teacher["kind"] == STUDENT_ADAPTERS_OFF
    assert 0 < record.student["trained_parameters"] < record.student["parameters"]


def test_another_process_keeps_the_record_of_the_same_student_alone(run, tmp_path):
    trainer, folder, _ = run
    trainer.save_model(str(tmp_path))
    record = RunRecord.read(folder)
    record.write(tmp_path)
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    data = tiny.rows("sequence")
    args = arguments(tmp_path)
    later = DistillationTrainer(saved, args, teacher_model=tiny.pair("bert")[1], train_dataset=data, eval_dataset=data)
    later.evaluate()
    later.create_model_card()
    kept = RunRecord.read(tmp_path)
    assert kept.terms == record.terms != later.args.distillation.to_dict()
    assert list(kept.log_history) == [*record.log_history, *later.state.log_history]
    with torch.no_grad():
        next(later.model.parameters()).add_(1.0)
    later.create_model_card()
    assert RunRecord.read(tmp_path).terms == later.args.distillation.to_dict()


def test_the_stages_of_a_run_are_recorded_until_another_student_takes_its_place(tmp_path):
    student, teacher = tiny.pair("bert")
    teacher.save_pretrained(tmp_path / "secret/teacher")
    stages = [
        Stage("layers", distillation={"matches": [{"name": "hidden", "student": "hidden[*]", "loss": "hidden_mse"}]}),
        Stage("logits", distillation={"logits": {"temperature": 4}}),
    ]
    args = arguments(tmp_path / "run", max_steps=1)
    rows = tiny.rows("sequence")
    folder = str(tmp_path / "secret/teacher")
    done = run_stages(stages, model=student, teacher_model=folder, args=args, train_dataset=rows)
    record = RunRecord.read(tmp_path / "run")
    assert [stage["name"] for stage in record.stages] == ["layers", "logits"]
    assert [stage["teacher"]["name"] for stage in record.stages] == ["teacher", "teacher"]
    assert "secret" not in record_path(tmp_path / "run").read_text(encoding="utf-8")
    assert record.stages[1]["terms"]["logits"]["temperature"] == 4
    assert record.wall_time_s == pytest.approx(sum(stage["metrics"]["train_runtime"] for stage in record.stages))
    with torch.no_grad():
        next(done.trainer.model.parameters()).add_(1.0)
    done.trainer.save_model()
    assert RunRecord.read(tmp_path / "run").stages == []
