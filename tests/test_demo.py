import hashlib
import io
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_distill.demo.corpus import keep_labels, labelled_rows, load_corpus
from hf_distill.demo.experiment import ALL_LABELS, ALONE, DISTILLED, run_demo
from hf_distill.demo.models import Shape, build_classifier, load_classifier, train_wordpiece
from hf_distill.demo.settings import DemoSettings

ROOT = Path(__file__).resolve().parents[1]
SNIPS = ROOT / "hf_distill" / "demo" / "data" / "snips"
COLOURS, ANIMALS = ("red", "green", "blue", "white"), ("dog", "cat", "horse", "cow")


@pytest.fixture(scope="module")
def words_csv(tmp_path_factory):
    """40 rows of two classes with columns of their own names."""
    path = tmp_path_factory.mktemp("words") / "words.csv"
    rows = [
        f"i like {word} number {i},{kind}"
        for i in range(5)
        for kind, group in (("colour", COLOURS), ("animal", ANIMALS))
        for word in group
    ]
    path.write_text("sentence,kind\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def settings(words_csv, tmp_path):
    return DemoSettings(
        dataset=str(words_csv),
        text_column="sentence",
        label_column="kind",
        labels_per_class=2,
        seeds=2,
        teacher_steps=2,
        student_steps=2,
        batch_size=8,
        output_dir=str(tmp_path / "out"),
    )


def quietly(settings):
    return run_demo(settings, Console(quiet=True))


def save_classifier(folder, texts, label_names, *, vocabulary_size=60):
    tokenizer = train_wordpiece(texts, vocabulary_size=vocabulary_size)
    model = build_classifier(None, shape=Shape(layers=1, width=32), tokenizer=tokenizer, label_names=label_names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_bundled_data_is_what_its_readme_says():
    readme = (SNIPS / "README.md").read_text()
    files = sorted(SNIPS.glob("*.csv.gz"))
    assert [path.name for path in files] == ["test.csv.gz", "train.csv.gz", "validation.csv.gz"]
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme
    assert sum(path.stat().st_size for path in files) < 1_000_000
    corpus = load_corpus("snips")
    assert (len(corpus.train), len(corpus.test), len(corpus.label_names)) == (12124, 698, 7)
    assert not set(corpus.train["text"]) & set(corpus.test["text"])


def test_labels_are_kept_for_a_few_rows_of_each_class_and_no_text_is_lost():
    corpus = load_corpus("snips")
    rows = keep_labels(corpus, per_class=10, seed=1)
    few = labelled_rows(rows)
    assert sorted(few["label"]) == sorted(list(range(7)) * 10)
    assert sorted(rows["text"]) == sorted(corpus.train["text"])
    truth = dict(zip(corpus.train["text"], corpus.train["label"], strict=True))
    assert all(truth[row["text"]] == row["label"] for row in few)
    other = labelled_rows(keep_labels(corpus, per_class=10, seed=2))
    assert set(other["text"]) != set(few["text"])


def test_a_file_is_split_and_its_labels_are_numbered_by_name(words_csv):
    corpus = load_corpus(str(words_csv), text_column="sentence", label_column="kind")
    assert corpus.label_names == ("animal", "colour")
    assert (len(corpus.train), len(corpus.test)) == (36, 4)
    for row in corpus.train:
        assert corpus.label_names[row["label"]] == ("animal" if row["text"].split()[2] in ANIMALS else "colour")


def test_rows_that_come_without_a_label_stay_text_and_are_never_counted_as_labelled(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'' if i % 2 else 'ab'[i % 4 // 2]}\n" for i in range(40)))
    corpus = load_corpus(str(path))
    assert corpus.label_names == ("a", "b")
    assert corpus.train["label"].count(None) > 10
    rows = keep_labels(corpus, per_class=100, seed=0)
    assert len(labelled_rows(rows)) == len(labelled_rows(corpus.train)) < len(rows) == len(corpus.train)


def test_a_missing_column_is_refused_with_the_ones_there_are(words_csv):
    with pytest.raises(ValueError, match=r"no column 'text'.*sentence"):
        load_corpus(str(words_csv))


def test_the_demo_reports_a_row_for_every_model_and_saves_what_from_pretrained_loads(settings):
    results = quietly(settings)
    report = json.loads((Path(settings.output_dir) / "results.json").read_text())
    assert [model["model"] for model in report["models"]] == ["teacher", ALONE, DISTILLED, ALL_LABELS]
    assert [model["labels"] for model in report["models"]] == [36, 4, 4, 36]
    assert [model["unlabelled"] for model in report["models"]] == [0, 0, 32, 0]
    teacher, *students = report["models"]
    for student in students:
        assert len(student["accuracy"]["runs"]) == 2
        assert student["retention"] == pytest.approx(student["accuracy"]["mean"] / teacher["accuracy"]["mean"])
        assert student["speed_up"] == pytest.approx(teacher["latency_ms"] / student["latency_ms"])
        assert student["parameters"] < teacher["parameters"]
        assert student["size_bytes"] < teacher["size_bytes"]
    assert teacher["agreement"]["mean"] == 1.0
    assert report["settings"]["seeds"] == 2
    student = AutoModelForSequenceClassification.from_pretrained(Path(settings.output_dir) / "student")
    assert student.num_parameters() == students[0]["parameters"]
    assert student.config.id2label == {0: "animal", 1: "colour"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*results.tables())
    printed = console.export_text()
    assert "…" not in printed
    for expected in ("retention", "latency", "speed-up", DISTILLED, "±"):
        assert expected in printed


def test_models_and_data_go_by_name_and_a_teacher_may_read_tokens_of_its_own(settings, tmp_path, words_csv):
    corpus = load_corpus(str(words_csv), text_column="sentence", label_column="kind")
    teacher = save_classifier(tmp_path / "t", corpus.train["text"], corpus.label_names, vocabulary_size=45)
    student = save_classifier(tmp_path / "s", corpus.train["text"], corpus.label_names, vocabulary_size=90)
    settings = replace(settings, teacher=teacher, student=student, teacher_steps=0, seeds=1)
    # The student's token ids would be out of range for the teacher.
    results = quietly(settings)
    assert results.teacher.labels is None
    saved = AutoTokenizer.from_pretrained(Path(settings.output_dir) / "student")
    assert len(saved) == len(AutoTokenizer.from_pretrained(student)) > len(AutoTokenizer.from_pretrained(teacher))


def test_a_fine_tuned_teacher_with_other_labels_is_refused(tmp_path):
    texts = ["one two three four"]
    name = save_classifier(tmp_path / "t", texts, ("positive", "negative"))
    assert load_classifier(name, label_names=("Positive", "Negative")).config.num_labels == 2
    with pytest.raises(ValueError, match="same order"):
        load_classifier(name, label_names=("negative", "positive"))
    with pytest.raises(ValueError, match="same order"):
        load_classifier(name, label_names=("positive", "negative", "neutral"))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        DemoSettings(seeds=0)
    with pytest.raises(ValueError, match="fine-tuned"):
        DemoSettings(teacher_steps=0)


def test_the_script_lists_its_options(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "demo.py"), run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    for option in ("--teacher", "--student", "--dataset", "--text_column", "--labels_per_class", "--seeds"):
        assert option in shown


@pytest.mark.slow
def test_the_demo_shows_what_distillation_gains(tmp_path):
    # Two thirds of the demo's steps are enough for it.
    results = quietly(DemoSettings(seeds=1, teacher_steps=250, student_steps=200, output_dir=str(tmp_path)))
    accuracy = {student.model: student.values("accuracy")[0] for student in results.students}
    assert results.teacher.values("accuracy")[0] > 0.96
    assert accuracy[ALONE] < 0.80
    assert accuracy[DISTILLED] > 0.94


def test_numeric_labels_are_the_classes_own_numbers_whatever_a_file_makes_of_them(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'' if i % 4 == 0 else 1 + i % 3}\n" for i in range(40)))
    corpus = load_corpus(str(path))
    assert corpus.label_names == ("0", "1", "2", "3")  # no row has class 0
    expected = {f"text {i}": None if i % 4 == 0 else 1 + i % 3 for i in range(40)}
    for rows in (corpus.train, corpus.test):
        assert {row["text"]: row["label"] for row in rows}.items() <= expected.items()
