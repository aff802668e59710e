"""On-policy settings, models and rows that cannot work, refused before the first step."""

from dataclasses import replace

import pytest
import torch

from hf_distill import on_policy
from hf_distill.on_policy import OnPolicy
from tests import tiny
from tests.on_policy_cases import GREEDY, on_policy_trainer, prompt_rows, window
from tests.training import arguments

REFUSED_ARGUMENTS = [
    ({"lmbda": 1.5}, r"lmbda=1\.5.*\[0, 1\]"),
    ({"max_new_tokens": 8}, r"max_new_tokens=8, but lmbda is 0"),
    ({"generation_temperature": 0.5}, r"generation_temperature=0\.5, but lmbda is 0"),
    ({"generation_kwargs": {"top_k": 3}}, r"generation_kwargs=.*but lmbda is 0"),
    ({"lmbda": 0.5, "max_new_tokens": 0}, r"max_new_tokens=0"),
    ({"lmbda": 0.5, "generation_temperature": 0}, r"generation_temperature=0.*do_sample"),
    ({"lmbda": 0.5, "kd_weight": 0}, r"no term asks the teacher"),
    ({"lmbda": 1, "task_weight": 0.5}, r"task_weight=0\.5.*Set task_weight=0"),
    ({"lmbda": 0.5, "generation_kwargs": "top_k"}, r"not a JSON object"),
    ({"lmbda": 0.5, "generation_kwargs": {"temperature": 2}}, r"Set generation_temperature"),
    ({"lmbda": 0.5, "generation_kwargs": {"topk": 2}}, r"'topk' is not among"),
    ({"lmbda": 0.5, "generation_kwargs": {"num_return_sequences": 2}}, r"num_return_sequences"),
    ({"lmbda": 0.5, "generation_kwargs": {"do_sample": False, "top_p": 0.9}}, r"top_p beside do_sample=False"),
    (
        {"lmbda": 0.5, "generation_temperature": 2, "generation_kwargs": GREEDY},
        r"generation_temperature beside do_sample",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_ARGUMENTS)
def test_arguments_that_cannot_work_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("name", ["bert", "bert-masked", "whisper"])
def test_a_student_that_writes_no_text_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="cannot answer a prompt of text"):
        on_policy_trainer(tmp_path, name, data=tiny.rows(tiny.ZOO[name][1]))


def changed(**columns):
    return [{**row, **{name: make(row) for name, make in columns.items()}} for row in prompt_rows()]


REFUSED_ROWS = [
    (changed(labels=lambda row: row["input_ids"]), r"first token.*prompt and completion columns"),
    (changed(position_ids=lambda row: torch.arange(10) % 5), r"packs several texts.*packing"),
    (changed(token_type_ids=lambda row: row["input_ids"] * 0), r"token_type_ids \(4, 10\) belongs to the text"),
    (changed(teacher_input_ids=lambda row: row["input_ids"]), r"teacher_input_ids \(4, 10\) belongs to the text"),
]


@pytest.mark.parametrize(("rows", "message"), REFUSED_ROWS)
def test_rows_that_no_answer_fits_are_refused_before_the_first_step(rows, message, tmp_path, monkeypatch):
    monkeypatch.setattr(OnPolicy, "is_drawn", lambda self, step, number: False)
    trainer = on_policy_trainer(tmp_path, data=rows, lmbda=0.5, remove_unused_columns=False)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_weights_of_tokens_are_refused(tmp_path):
    rows = changed(quality=lambda row: row["input_ids"] * 0.5)
    with pytest.raises(ValueError, match=r"item_weight \(4, 10\).*Weigh whole rows"):
        window(on_policy_trainer(tmp_path, data=rows, item_weights=[{"by": "column", "column": "quality"}]))


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    trainer = on_policy_trainer(tmp_path)
    trainer._pair = replace(trainer._pair, needs_teacher_inputs=True)
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer.train()


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_zero3_enabled"])
def test_a_student_of_which_each_process_has_a_part_is_refused(sharded, tmp_path, monkeypatch):
    trainer = on_policy_trainer(tmp_path)
    if sharded == "is_fsdp_enabled":
        trainer.is_fsdp_enabled = True
    else:
        monkeypatch.setattr(on_policy, sharded, lambda: True)
    with pytest.raises(ValueError, match="ZeRO-2"):
        trainer.train()


def test_learned_uncertainties_are_refused_beside_a_task_loss(tmp_path):
    with pytest.raises(ValueError, match="loss_balance='uncertainty'"):
        on_policy_trainer(tmp_path, lmbda=0.5, task_weight=1.0, loss_balance="uncertainty")
