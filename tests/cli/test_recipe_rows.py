"""The rows of a recipe: where they are read from, how columns and labels are found, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence
from PIL import Image

from hf_distill import DistillationTrainingArguments
from hf_distill.recipes.data import _MAKERS, COLUMNS, metrics_of, named_columns, prepare, split_rows
from hf_distill.recipes.labels import Labels
from hf_distill.recipes.measure import data_name
from hf_distill.recipes.models import Models
from hf_distill.recipes.recipe import TASKS, DataPart
from hf_distill.recipes.rows import Spans, Words
from hf_distill.sources import load_rows, load_splits
from tests import tiny
from tests.cli.recipe_cases import IDS, TEXTS, words

ROWS = {"text": ["a b", "c", "d"], "label": [0, 1, 2]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(kind, folder):
    rows = Dataset.from_dict(ROWS)
    if kind == "saved":
        rows.save_to_disk(folder / "rows")
        return folder / "rows"
    if kind == "folder":
        (folder / "rows").mkdir()
        rows.to_csv(folder / "rows" / "train.csv")
        return folder / "rows"
    path = folder / f"rows.{kind}"
    getattr(rows, {"csv": "to_csv", "parquet": "to_parquet"}.get(kind, "to_json"))(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "saved", "folder"])
def test_every_place_gives_the_same_rows(kind, tmp_path):
    path = write(kind, tmp_path)
    assert load_rows(path)[:] == ROWS
    assert load_splits(path)["train"][:] == ROWS
    assert load_rows(path, "train[1:]")["label"][:] == [1, 2]


def test_what_cannot_be_read_is_named_with_what_there_is(tmp_path):
    rows = Dataset.from_dict(ROWS)
    DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "saved")
    rows.to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.xlsx").write_text("?", encoding="utf-8")
    for source, split, complaint in (
        ("saved", "test", "no split 'test'; it has train, dev"),
        ("rows.csv", "test", "no split 'test'; it has train"),
        ("none.csv", "train", "none.csv is no file. Relative paths begin at"),
        ("rows.xlsx", "train", "rows.xlsx cannot be read: expected a .txt, .csv"),
    ):
        with pytest.raises(ValueError, match=complaint.replace(".", r"\.")):
            load_rows(tmp_path / source, split)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("ragged.csv", "text,label\na,1\nb,c,d,2\n", "cannot be read: .*Expected 2 fields in line 3, saw 4"),
        ("torn.jsonl", '{"text": "a"}\n{"text": "b\n', "cannot be read: JSON parse error"),
        ("empty.csv", "text,label\n", "has no rows"),
    ],
)
def test_a_file_that_is_broken_or_empty_is_named_with_the_reason(name, content, complaint, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} {complaint}"):
        load_splits(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "suffix", "torn"),
    [("parquet", "parquet", b"PAR1"), ("csv", "csv", b'a\n"b'), ("json", "jsonl", b'{"a": ')],
)
def test_a_file_that_was_cut_off_is_named_alone_and_in_a_folder(kind, suffix, torn, tmp_path):
    for name in ("one", "three", "two"):
        getattr(Dataset.from_dict({"a": ["a, b", "c"]}), f"to_{kind}")(tmp_path / "rows" / f"{name}.{suffix}")
    path = tmp_path / "rows" / f"two.{suffix}"
    path.write_bytes(torn)
    for read in (load_splits, load_rows):
        for source in (path, path.parent):
            with pytest.raises(ValueError, match="cannot be read: ") as error:
                read(source)
            assert str(error.value).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl", "txt"])
def test_an_empty_file_is_named(suffix, tmp_path):
    (tmp_path / f"none.{suffix}").touch()
    with pytest.raises(ValueError, match=f"none.{suffix} cannot be read: it is empty"):
        load_rows(tmp_path / f"none.{suffix}")


@pytest.mark.parametrize(
    "name", ["dataset_dict.json", "dev/state.json", "dev/dataset_info.json", "dev/data-00000-of-00001.arrow"]
)
def test_a_torn_file_of_a_saved_data_set_is_named(name, tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"] * 500})
    DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "saved")
    torn = tmp_path / "saved" / name
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    for read in (load_splits, load_rows):
        with pytest.raises(ValueError, match="cannot be read: ") as error:
            read(tmp_path / "saved")
        assert str(error.value).startswith(f"{torn} cannot be read: ")


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_saved_data_set_with_a_state_of_something_else_is_named(content, tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="saved cannot be read as a data set that save_to_disk wrote: "):
        load_rows(tmp_path / "saved")


def splits_of(folder, **parts):
    DatasetDict({name: Dataset.from_dict({"n": [*range(size)]}) for name, size in parts.items()}).save_to_disk(folder)
    return DataPart(train=str(folder))


def sizes(data):
    rows = split_rows(data)
    return len(rows.train), None if rows.eval is None else len(rows.eval)


def test_rows_to_evaluate_on_are_those_that_are_named_or_a_split_or_held_out(tmp_path):
    whole = splits_of(tmp_path / "a", train=20, test=3, dev=4)
    assert sizes(whole) == (20, 3)
    assert sizes(splits_of(tmp_path / "b", train=20, test=3, validation=5)) == (20, 5)
    assert sizes(replace(whole, eval_split="dev")) == (20, 4)
    assert sizes(replace(whole, train_split="dev", eval_split="train")) == (4, 20)
    alone = splits_of(tmp_path / "c", train=20)
    assert sizes(alone) == (18, 2)
    assert sizes(replace(alone, test_fraction=0.25)) == (15, 5)
    assert sizes(replace(alone, test_fraction=0.0)) == (20, None)
    assert sizes(replace(alone, eval=whole.train)) == (20, 3)
    assert sizes(replace(alone, eval=whole.train, eval_split="dev")) == (20, 4)
    first, second = split_rows(alone), split_rows(alone)
    assert [first.train["n"], first.eval["n"]] == [second.train["n"], second.eval["n"]]
    assert sizes(replace(whole, train_split="train[:10]")) == (10, 3)
    with pytest.raises(ValueError, match="has 1 row, of which none can be held out"):
        split_rows(splits_of(tmp_path / "d", train=1))


def test_a_report_names_the_rows_it_is_of(tmp_path):
    whole, alone = splits_of(tmp_path / "a", train=20, test=3), splits_of(tmp_path / "b", train=20)
    for data, name in (
        (replace(alone, eval=whole.train), "a"),
        (whole, "a"),
        (replace(whole, eval_split="test"), "a"),
        (alone, "b, held out"),
    ):
        assert data_name(data, is_held_out=split_rows(data).is_held_out) == name
    assert data_name(DataPart(train="org/texts", eval_split="dev")) == "org/texts"


def test_columns_get_the_names_of_the_task_and_what_stands_there_gives_way():
    rows = Dataset.from_dict({"text": ["x"], "sentence": ["y"], "trust": [1]})
    named = named_columns(rows, "text-classification", {"text": "sentence"})
    assert named[:] == {"text": ["y"], "trust": [1]}


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"txt": "sentence"}, r"data\.columns\.txt: text-classification has no such column\. Did you mean 'text'\?"),
        ({"text": "sentense"}, r"no column 'sentense' \(data\.columns\.text\)\. Did you mean 'sentence'\?.*trust"),
        ({}, r"text-classification needs the column 'text', and the data has sentence, trust\. .*\{text: \.\.\.\}"),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        named_columns(Dataset.from_dict({"sentence": ["y"], "trust": [1]}), "text-classification", columns)


NAMES = {0: "weather", 1: "Music", 2: "furniture"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["music", "WEATHER", None, ""], [1, 0, None, None]),
        ([2, 0, None], [2, 0, None]),
        ([2.0, float("nan"), 1.0], [2, None, 1]),
        (["1", "", "2"], [1, None, 2]),
        ([-100, 1], [None, 1]),
    ],
)
def test_labels_are_numbers_or_the_teacher_s_names_or_missing(values, expected):
    assert Labels(NAMES).of_column(Dataset.from_dict({"label": values}), "label") == expected


def test_classes_of_a_data_set_go_by_their_names_where_the_teacher_has_them():
    other = Features(label=ClassLabel(names=["furniture", "weather", "music"]))
    assert Labels(NAMES).of_column(Dataset.from_dict({"label": [0, 1, 2]}, features=other), "label") == [2, 0, 1]
    unnamed = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert Labels(unnamed).of_column(Dataset.from_dict({"label": [0, 1, 2]}, features=other), "label") == [0, 1, 2]


@pytest.mark.parametrize("name", ["labels", "label_ids"])
def test_a_column_that_trainer_takes_for_labels_is_one_here(name):
    data = {"text": ["a"], "question": ["b"], "choices": [["c", "d"]], name: [1]}
    for task in ("text-classification", "multiple-choice"):
        assert named_columns(Dataset.from_dict(data), task, {})["label"][0] == 1
    both = named_columns(Dataset.from_dict({**data, "label": [0]}), "text-classification", {})
    assert both["label"][0] == 0


def test_labels_that_differ_by_their_case_alone_are_told_apart():
    rows = Dataset.from_dict({"label": ["a", "A", "B"]})
    assert Labels({0: "A", 1: "a", 2: "b"}).of_column(rows, "label") == [1, 0, 2]


def test_several_labels_are_names_numbers_or_flags():
    many = Labels(NAMES, "multi_label_classification")
    for values, expected in (
        ([["music", "weather"], []], [[1, 1, 0], [0, 0, 0]]),
        ([[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]),
        ([[2], [0, 1]], [[0, 0, 1], [1, 1, 0]]),
    ):
        assert many.of_column(Dataset.from_dict({"label": values}), "label") == expected
    assert Labels(NAMES, "regression").of_column(Dataset.from_dict({"label": ["0.5", None]}), "label") == [0.5, None]
    with pytest.raises(ValueError, match="the model tells many"):
        many.of_column(Dataset.from_dict({"label": ["music"]}), "label")


@pytest.mark.parametrize(("label", "complaint"), [("film", "'film'.* knows weather, Music"), (3, "label 3")])
def test_a_label_the_teacher_does_not_know_is_refused(label, complaint):
    with pytest.raises(ValueError, match=complaint):
        Labels(NAMES).of_column(Dataset.from_dict({"label": [label]}), "label")


def test_every_task_has_its_columns_and_its_rows():
    assert [*COLUMNS] == [*TASKS] == [*_MAKERS]


def test_a_tag_stands_on_the_first_token_of_its_word():
    made = words()
    rows = {"tokens": [["rain", "songband"], "sun table"], "tags": [[1, 2], [0, 1]]}
    columns = Words(made, 8)(rows)
    for ids, labels, count in zip(columns["input_ids"], columns["labels"], (2, 2), strict=True):
        assert len(ids) == len(labels)
        assert sum(label != -100 for label in labels) == count
        assert labels[0] == labels[-1] == -100
    assert [label for label in columns["labels"][0] if label != -100] == [1, 2]
    with pytest.raises(ValueError, match="are 2 words, with 1 tags"):
        Words(made, 8)({"tokens": [["rain", "sun"]], "tags": [[1]]})


def test_tags_may_be_names_numbers_or_a_text_and_some_may_be_missing():
    tags = {0: "O", 1: "B-X"}
    assert Labels(tags).of_words(Dataset.from_dict({"t": ["O B-X", None]}), "t") == [[0, 1], None]
    assert Labels(tags).of_words(Dataset.from_dict({"t": [[1, 0]]}), "t") == [[1, 0]]
    named = Features(t=Sequence(ClassLabel(names=["B-X", "O"])))
    assert Labels(tags).of_words(Dataset.from_dict({"t": [[0, 1, 1]]}, features=named), "t") == [[1, 0, 0]]


def test_an_answer_is_found_in_each_window_that_holds_it_whole():
    made = words()
    context = " ".join(TEXTS[:4])
    answer = context.split()[7]
    start = len(" ".join(context.split()[:7])) + 1
    rows = {"question": ["rain"], "context": [context], "answers": [{"text": [answer], "answer_start": [start]}]}
    columns = Spans(made, 10)(rows)
    assert len(columns["input_ids"]) > 1
    found = 0
    for ids, first, last in zip(*(columns[n] for n in ("input_ids", "start_positions", "end_positions")), strict=True):
        assert len(ids) <= 10
        if (first, last) != (0, 0):
            found += 1
            assert made.decode(ids[first : last + 1]) == answer
    assert found >= 1
    flat = Spans(made, 10)({"question": ["rain"], "context": [context], "answer": [answer], "answer_start": [start]})
    assert flat == columns
    nothing = {"question": ["rain"], "context": [context], "answers": [{"text": [], "answer_start": []}]}
    assert {*Spans(made, None)(nothing)["start_positions"]} == {0}


def models(task, head, *, other=None, **config):
    torch.manual_seed(0)
    teacher, student = tiny.bert(head, layers=2, **config), tiny.bert(head, layers=1, **config)
    return Models(task, student, teacher, words(), other)


def ready(rows, task_models, tmp_path, **data):
    args = DistillationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    return prepare(Dataset.from_dict(rows), None, DataPart(train="x", **data), task_models, args)


def test_a_teacher_with_another_tokenizer_gets_columns_of_its_own_and_other_columns_stay(tmp_path):
    other = words(40)
    made = models("text-classification", "SequenceClassification", other=other, **IDS)
    row = ready({"text": ["rain sun"], "label": ["music"], "trust": [2.0]}, made, tmp_path).train[0]
    assert row["teacher_input_ids"] == other("rain sun")["input_ids"]
    assert row["input_ids"] == made.processor("rain sun")["input_ids"]
    assert (row["label"], row["trust"]) == (1, 2.0)


def test_texts_are_cut_at_what_both_models_read_unless_said_otherwise(tmp_path):
    made = models("text-classification", "SequenceClassification", max_position_embeddings=12)
    long = {"text": [" ".join(TEXTS)]}
    assert len(ready(long, made, tmp_path).train[0]["input_ids"]) == 12
    assert len(ready(long, made, tmp_path, max_length=7).train[0]["input_ids"]) == 7


def test_choices_are_tokenised_beside_their_question(tmp_path):
    made = models("multiple-choice", "MultipleChoice")
    rows = {"question": ["rain", "sun"], "choices": [["song", "band sun"], ["table", "chair"]], "label": [0, 1]}
    prepared = ready(rows, made, tmp_path)
    batch = prepared.collator([dict(row) for row in prepared.train])
    assert batch["input_ids"].shape[:2] == (2, 2)
    assert batch["labels"].tolist() == [0, 1]
    assert made.processor.decode(batch["input_ids"][0, 1], skip_special_tokens=True) == "rain band sun"


@pytest.mark.parametrize(
    ("task", "head", "data", "complaint"),
    [
        ("text-classification", "SequenceClassification", {"mask_probability": 0.2}, "of fill-mask alone"),
        ("text-generation", "MaskedLM", {"max_length": 8}, r"arguments\.max_length: 8"),
        ("image-classification", "SequenceClassification", {"max_length": 8}, "counts tokens"),
    ],
)
def test_a_setting_that_nobody_reads_is_refused(task, head, data, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        ready({"text": ["a"], "image": ["b"]}, models(task, head), tmp_path, **data)


def test_a_cell_that_holds_no_text_is_named(tmp_path):
    made = models("text-classification", "SequenceClassification")
    with pytest.raises(ValueError, match=r"'text' has None, expected a text"):
        ready({"text": ["a", None]}, made, tmp_path)


def test_metrics_are_the_task_s_with_their_options():
    made = models("text-classification", "SequenceClassification", problem_type="multi_label_classification")
    evaluation = SimpleNamespace(
        predictions=torch.tensor([[1.0, -1, 0.2]]).numpy(), label_ids=torch.tensor([[1.0, 0, 0]]).numpy()
    )
    assert metrics_of(made, True)(evaluation)["accuracy"] == 0
    assert metrics_of(made, {"threshold": 0.6})(evaluation)["accuracy"] == 1
    assert metrics_of(made, False) is None
    with pytest.raises(TypeError, match="treshold"):
        metrics_of(made, {"treshold": 0.6})
    masked = models("fill-mask", "MaskedLM")
    assert metrics_of(masked, True) is None
    with pytest.raises(ValueError, match="have no options"):
        metrics_of(masked, {"threshold": 1})


def test_entity_scores_come_with_names_that_are_of_entities():
    tags = {0: "O", 1: "B-X", 2: "I-X"}
    made = models(
        "token-classification", "TokenClassification", id2label=tags, label2id={v: k for k, v in tags.items()}
    )
    evaluation = SimpleNamespace(
        predictions=torch.eye(3)[None].numpy(), label_ids=torch.tensor([[0, 1, -100]]).numpy()
    )
    assert metrics_of(made, True)(evaluation)["entity_f1"] == 1


def test_images_are_read_from_their_paths_with_other_pixels_for_a_teacher_that_sees_others(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 12), (number * 80, 9, 9)).save(tmp_path / f"{number}.png")
    small, large = (hf.ViTImageProcessorPil(size={"height": size, "width": size}) for size in (8, 16))
    pair = Models("image-classification", tiny.vit(), tiny.vit(), small, large)
    rows = {"image": [str(tmp_path / f"{number}.png") for number in range(3)], "label": [0, 2, 1]}
    prepared = ready(rows, pair, tmp_path)
    assert prepared.is_lazy
    assert prepared.train[1]["pixel_values"].shape == (3, 8, 8)
    assert prepared.train[1]["teacher_pixel_values"].shape == (3, 16, 16)
    assert prepared.train[1]["label"] == 2


def test_sounds_are_padded_for_either_model(tmp_path):
    readers = [hf.Wav2Vec2FeatureExtractor(do_normalize=flag, return_attention_mask=True) for flag in (True, False)]
    sound = tiny.wav2vec2("SequenceClassification")
    pair = Models("audio-classification", sound, sound, *readers)
    prepared = ready({"audio": [[0.5] * 90, [0.1, 0.2] * 60], "label": [1, 0]}, pair, tmp_path)
    assert [len(row["input_values"]) for row in prepared.train] == [90, 120]
    assert prepared.train[1]["teacher_input_values"][:2] == pytest.approx([0.1, 0.2])
    batch = prepared.collator([{k: v for k, v in row.items() if "teacher" not in k} for row in prepared.train])
    assert batch["input_values"].shape == (2, 120)
    assert batch["labels"].tolist() == [1, 0]
