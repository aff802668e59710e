"""A teacher whose tokenizer is another: it needs inputs of its own, and a made-up tokenizer is not one."""

import pytest

from hf_distill.alignment import is_extension
from tests.tiny import pair, rows, tokenizer
from tests.training import logged, make_trainer

WORDS = [f"w{i}" for i in range(92)]


def own_columns(data):
    return [
        {**row, **{f"teacher_{name}": row[name].clone() for name in ("input_ids", "attention_mask")}} for row in data
    ]


@pytest.mark.parametrize("name", ["bert", "bert-multi-label"])
@pytest.mark.parametrize("given", ["with the teacher's files", "as an argument"])
def test_ids_that_mean_other_tokens_never_reach_the_teacher(tmp_path, name, given):
    student, teacher = pair(name)
    other = tokenizer(WORDS[::-1])
    options = {"processing_class": tokenizer(WORDS), "model": student}
    if given == "as an argument":
        options |= {"teacher_processing_class": other}
    else:
        teacher.save_pretrained(tmp_path / "teacher")
        other.save_pretrained(tmp_path / "teacher")
        options |= {"teacher_model": str(tmp_path / "teacher")}
    trainer = make_trainer(tmp_path, name, **options)
    with pytest.raises(ValueError, match="teacher_input_ids"):
        trainer.train()
    with pytest.raises(ValueError, match="teacher_input_ids"):
        trainer.evaluate()


def test_columns_of_its_own_are_all_it_takes(tmp_path):
    options = {"processing_class": tokenizer(WORDS), "teacher_processing_class": tokenizer(WORDS[::-1])}
    trainer = make_trainer(tmp_path, train_dataset=own_columns(rows("sequence")), **options)
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0


def test_a_tokenizer_with_further_tokens_is_no_other(tmp_path):
    options = {"processing_class": tokenizer(WORDS), "teacher_processing_class": tokenizer(WORDS[:-2])}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, True),
        ({"a": 0, "b": 1}, {"a": 0}, True),
        ({"a": 0}, {"a": 0, "b": 1}, True),
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, False),
        ({"a": 0}, {"b": 0}, False),
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, False),
    ],
)
def test_one_vocabulary_extends_the_other_or_they_differ(student, teacher, expected):
    assert is_extension(student, teacher) is expected


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_teacher_saved_without_a_tokenizer_has_none(tmp_path, name):
    """Transformers makes up a tokenizer of 1 token for GPT-2, of 5 for BART."""
    student, teacher = pair(name)
    teacher.save_pretrained(tmp_path / "teacher")
    options = {"model": student, "teacher_model": str(tmp_path / "teacher"), "processing_class": tokenizer()}
    trainer = make_trainer(
        tmp_path, name, data_collator=make_trainer(tmp_path, name).data_collator.collator, **options
    )
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0
