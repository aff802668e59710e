"""The rows of a report as batches: padded for the task, without the columns that nobody reads."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, default_data_collator

from hf_distill.report import make_report
from hf_distill.report.live import report_of
from hf_distill.report.rows import Rows
from tests.report.quick import quality, quick
from tests.tiny import ZOO, pair, rows, tokenizer
from tests.training import make_trainer, values

PADDED = ("bert", "bert-multi-label", "bert-tokens", "bert-masked", "llama", "bart")
QUICK = {"baselines": (), "batch_sizes": (1,), "repeats": 1, "warm_up": 0}


def ragged(name, count=6):
    """Rows of plain lists without padding, with a column of text and its number."""
    found = []
    for number, row in enumerate(rows(ZOO[name][1], count=count)):
        real = int(row["attention_mask"].sum())
        cut = {k: v[:real] if v.shape == row["input_ids"].shape else v for k, v in row.items()}
        if name == "bart":
            cut["labels"] = row["labels"][row["labels"] != -100]
        found.append({**values([cut])[0], "text": f"row {number}", "idx": number})
    return found


@pytest.mark.parametrize("as_dataset", [True, False])
@pytest.mark.parametrize("name", PADDED)
def test_rows_of_any_length_are_padded_for_the_task(name, as_dataset):
    student, teacher = pair(name)
    data = ragged(name)
    found = quality(
        teacher, student, Dataset.from_list(data) if as_dataset else data, processing_class=tokenizer(), batch_size=3
    )
    expected = quality(teacher, student, rows(ZOO[name][1], count=6))
    assert found.items == expected.items
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.kl_to_teacher == pytest.approx(expected.kl_to_teacher, rel=1e-4)


def test_a_collator_of_ones_own_gets_every_column():
    student, teacher = pair("bert")
    seen = set()

    def collate(chunk):
        seen.update(*chunk)
        return default_data_collator([{k: v for k, v in row.items() if k not in ("text", "idx")} for row in chunk])

    data = [{**row, "text": "some", "idx": i} for i, row in enumerate(values(rows("sequence")))]
    found = quality(teacher, student, Dataset.from_list(data), data_collator=collate)
    assert {"text", "idx"} <= seen
    assert found == quality(teacher, student, rows("sequence"))


@pytest.mark.parametrize("as_dataset", [True, False])
def test_a_live_trainers_columns_are_those_of_its_evaluation(as_dataset, tmp_path):
    data = ragged("bert")
    data = Dataset.from_list(data) if as_dataset else data
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer(), "temperature": 1.0}
    trainer = make_trainer(tmp_path, **options)
    found = report_of(trainer, **QUICK).model("student").quality
    metrics = trainer.evaluate()
    assert found.kl_to_teacher == pytest.approx(metrics["eval_kd"], rel=1e-5)


@pytest.mark.parametrize("as_dataset", [True, False])
def test_a_trainers_seeded_collator_masks_alike_for_every_model(as_dataset, tmp_path):
    data = values([{"input_ids": row["input_ids"]} for row in rows("masked", count=8)])
    data = Dataset.from_list(data) if as_dataset else data
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=3)
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": collator}
    trainer = make_trainer(tmp_path, "bert-masked", **options)
    trainer.train()
    first, second = (report_of(trainer, **QUICK) for _ in range(2))
    for report in (first, second):
        teacher, student = (model.quality for model in report.models)
        assert teacher.items == student.items > 0
        assert teacher.kl_to_teacher == pytest.approx(0, abs=1e-7)
    assert first.model("student").quality == second.model("student").quality


def test_whoever_draws_next_finds_the_random_states_as_they_were():
    def collate(chunk):
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return {}

    draws: list = []
    data = Rows([1, 2, 3], collate, batch_size=2)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    assert len([*data.batches()]) == 2
    next(data.batches())
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert draws[0] == draws[2] != draws[1]


def test_a_stream_is_read_anew_for_every_model():
    student, teacher = pair("bert")
    plain = values(rows("sequence"))
    stream = Dataset.from_list(plain).to_iterable_dataset()
    report = quick(teacher, student, stream)
    assert [model.quality for model in report.models] == [
        model.quality for model in quick(teacher, student, plain).models
    ]
    assert report.data["rows"] is None


@pytest.mark.parametrize(
    ("given", "reason"), [({"test": []}, "dict of test"), ([], "no row"), (iter([{"labels": 1}]), "but once")]
)
def test_what_is_no_set_of_rows_is_refused_before_a_model_is_loaded(given, reason):
    with pytest.raises(ValueError, match=reason):
        make_report("no/teacher", "no/student", given)


def test_rows_that_no_model_reads_are_refused_with_their_columns():
    student, teacher = pair("bert")
    for raw in ([{"text": "a", "label": 1}], Dataset.from_dict({"text": ["a"], "label": [1]})):
        with pytest.raises(ValueError, match=r"The rows have text, label, and Bert\w+ reads none of them\. Tokenise"):
            quick(teacher, student, raw)


def test_rows_that_a_transform_makes_when_they_are_read_are_read_so():
    student, teacher = pair("bert")
    plain = values(rows("sequence"))
    stored = Dataset.from_dict({"number": [*range(len(plain))], "label": [0] * len(plain)})

    def read(batch):
        made = [plain[number] for number in batch["number"]]
        return {name: [row[name] for row in made] for name in made[0]}

    found = quick(teacher, student, stored.with_transform(read))
    expected = quick(teacher, student, plain)
    assert [model.quality for model in found.models] == [model.quality for model in expected.models]
