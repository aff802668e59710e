"""What is said of arguments that no trainer takes, and of processes that train alone."""

import random

import numpy as np
import pytest
import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests.tiny import pair, rows
from tests.training import SILENT


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tokenizer", "Did you mean processing_class?"),
        ("teacher", "Did you mean teacher_model?"),
        ("train_datasets", "Did you mean train_dataset?"),
        ("temperature", "belongs into args"),
        ("zzz", "Known: .*teacher_model"),
    ],
)
def test_an_unknown_argument_is_refused_with_what_was_meant(name, remedy, output_dir):
    student, teacher = pair("bert")
    args = DistillationTrainingArguments(output_dir, **SILENT)
    with pytest.raises(TypeError, match=f"no argument '{name}'.*{remedy}"):
        DistillationTrainer(student, args, teacher_model=teacher, **{name: None})


def test_launched_processes_that_would_each_train_alone_are_refused(output_dir, monkeypatch):
    student, teacher = pair("bert")
    args = DistillationTrainingArguments(output_dir, **SILENT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 launched processes.*--use_cpu"):
        DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows("sequence"))


@pytest.mark.parametrize("field", ["teacher_model_init_kwargs", "model_init_kwargs"])
def test_an_access_token_among_the_arguments_is_refused(field, output_dir):
    with pytest.raises(ValueError, match="HF_TOKEN"):
        DistillationTrainingArguments(output_dir, **{field: {"token": "hf_x"}})


@pytest.mark.parametrize(("field", "value"), [("temperature", True), ("kd_weight", "0.5"), ("task_weight", True)])
def test_a_number_that_is_none_is_refused_by_name(field, value, output_dir):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        DistillationTrainingArguments(output_dir, **{field: value})


def test_a_teacher_by_name_without_a_head_of_its_own_is_refused(tmp_path):
    student, teacher = pair("bert")
    teacher.bert.save_pretrained(tmp_path / "backbone")
    teacher.save_pretrained(tmp_path / "teacher")
    args = DistillationTrainingArguments(tmp_path, **SILENT)
    with pytest.raises(ValueError, match=r"no weights for classifier.bias.*Fine-tune"):
        DistillationTrainer(student, args, teacher_model=str(tmp_path / "backbone"))
    DistillationTrainer(student, args, teacher_model=str(tmp_path / "teacher"))


def test_a_column_that_only_begins_like_the_teachers_is_no_input_of_its(output_dir):
    student, teacher = pair("bert")
    data = [{**row, "teacher_id": i} for i, row in enumerate(rows("sequence"))]
    losses = []
    for dataset in (data, rows("sequence")):
        args = DistillationTrainingArguments(output_dir, **SILENT, remove_unused_columns=False)
        trainer = DistillationTrainer(
            student, args, teacher_model=teacher, train_dataset=dataset, eval_dataset=dataset
        )
        losses.append(trainer.evaluate()["eval_kd"])
    assert losses[0] == losses[1]


def test_looking_for_labels_leaves_the_random_numbers_of_the_training_alone(output_dir):
    class Augmented(list):
        def __getitem__(self, index):
            noise = random.random() + np.random.rand() + torch.rand(()).item()
            return {**super().__getitem__(index), "noise": noise}

    student, teacher = pair("bert")
    drawn = []
    for data in (rows("sequence"), Augmented(rows("sequence"))):
        DistillationTrainer(
            student, DistillationTrainingArguments(output_dir, **SILENT), teacher_model=teacher, train_dataset=data
        )
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]
