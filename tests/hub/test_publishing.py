"""Arguments are saved without their token and copied with it; a push that fails in the background is told of."""

import copy
import dataclasses
import logging
import pickle
from concurrent.futures import Future

import pytest
import torch
from transformers.utils.hub import PushInProgress

from hf_distill import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
from tests.training import arguments, make_trainer

TOKEN = "hf_PlantedInTheArguments"


@pytest.mark.parametrize("cls", [DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments])
def test_pickled_arguments_hold_no_token_and_all_else(output_dir, cls):
    args = arguments(output_dir, cls, hub_token=TOKEN, hub_model_id="me/it", kd_weight=0.25)
    data = pickle.dumps(args)
    assert TOKEN.encode() not in data
    loaded = pickle.loads(data)
    assert (type(loaded), loaded.hub_token, args.hub_token) == (cls, None, TOKEN)
    assert dataclasses.replace(loaded, hub_token=TOKEN).to_dict() == args.to_dict()
    assert loaded.distillation == args.distillation


def test_a_saved_student_has_arguments_without_a_token(output_dir):
    trainer = make_trainer(output_dir, hub_token=TOKEN)
    trainer.save_model()
    with open(f"{output_dir}/training_args.bin", "rb") as file:
        assert TOKEN.encode() not in file.read()
    assert torch.load(f"{output_dir}/training_args.bin", weights_only=False).learning_rate == 5e-5
    assert trainer.args.hub_token == TOKEN


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copied_arguments_keep_the_token(output_dir, copied):
    args = arguments(output_dir, hub_token=TOKEN, lr_scheduler_kwargs={"a": 1})
    again = copied(args)
    assert again is not args
    assert (again.hub_token, again.to_dict()) == (TOKEN, args.to_dict())
    shares_values = again.lr_scheduler_kwargs is args.lr_scheduler_kwargs
    assert shares_values == (copied is not copy.deepcopy)


def ended(error=None):
    job = Future()
    job.set_exception(error) if error else job.set_result("pushed")
    return job


@pytest.mark.parametrize("limit", [None, 1])
def test_a_push_that_failed_during_training_is_told_of_once(output_dir, caplog, limit):
    trainer = make_trainer(output_dir, save_total_limit=limit)
    trainer.hub_model_id = "me/it"
    trainer.push_in_progress = PushInProgress([ended(), ended(OSError("no space left")), ended()])
    with caplog.at_level(logging.WARNING):
        trainer._finish_current_push()
        trainer._finish_current_push()
    (said,) = [record.getMessage() for record in caplog.records if "push" in record.getMessage()]
    assert "me/it" in said
    assert "no space left" in said
    assert "trainer.push_to_hub()" in said
    assert ("save_total_limit=1 may remove" in said) == (limit == 1)
