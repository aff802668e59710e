"""What a student or a teacher in shards (FSDP, DeepSpeed) does not allow is said before the first step."""

import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers.distributed import DistributedConfig

from hf_distill import chunked_terms, on_policy
from tests import tiny
from tests.invariants.steps import assert_same_steps, recorded
from tests.invariants.test_without_logits import run, trainer_of
from tests.on_policy_cases import on_policy_trainer
from tests.test_stages import run as run_stages
from tests.training import make_trainer

SHARDED = ("is_fsdp_enabled", "is_deepspeed_enabled")
LEARNED = {
    "a match": {"hidden_weight": 1.0},
    "a learned temperature": {"temperature": "learned"},
    "a balance that is learned": {"loss_balance": "uncertainty"},
    "a balance by magnitude": {"loss_balance": "magnitude"},
}


@pytest.fixture(params=SHARDED)
def sharded(request, monkeypatch):
    """A trainer then believes that its student is taken apart."""
    make = Trainer.create_accelerator_and_postprocess

    def pretend(self):
        make(self)
        setattr(self, request.param, True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", pretend)
    return request.param


@pytest.mark.parametrize("name", LEARNED)
def test_what_trains_or_reads_inside_the_student_is_refused(name, sharded, tmp_path):
    with pytest.raises(ValueError, match=r"FSDP and DeepSpeed \(ZeRO\) take apart.* Train with DDP, or drop"):
        make_trainer(tmp_path, "llama", **LEARNED[name])


def test_stages_are_refused(sharded, tmp_path):
    with pytest.raises(ValueError, match="Train each stage as a run of its own"):
        run_stages(tmp_path)


def test_a_student_that_writes_is_refused(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "is_deepspeed_zero3_enabled", lambda: sharded == "is_deepspeed_enabled")
    with pytest.raises(ValueError, match=r"lmbda=.* Use DDP or ZeRO-2, or lmbda=0"):
        on_policy_trainer(tmp_path)


@pytest.mark.parametrize("sharding", ["ZeRO-3", "FSDP 1"])
def test_sharding_that_is_untried_forms_the_logits_and_says_why_once(sharding, tmp_path, monkeypatch):
    reference = run(trainer_of("llama", tmp_path), monkeypatch, chunked=True)
    if sharding == "ZeRO-3":
        monkeypatch.setattr(chunked_terms, "is_deepspeed_zero3_enabled", lambda: True)
    else:
        monkeypatch.setattr(chunked_terms, "FullyShardedDataParallel", nn.Module)
    said = []
    monkeypatch.setattr("hf_distill.chunked_terms.logger.warning", said.append)
    trainer = trainer_of("llama", tmp_path)
    monkeypatch.setattr(trainer, "_chunked_shares", None)
    monkeypatch.setattr(trainer._chunked, "forming", None)
    assert_same_steps(recorded(trainer), reference)
    trainer.evaluate(trainer.train_dataset)
    assert len(said) == 1
    assert sharding in said[0]


def test_a_teacher_without_weights_is_refused(tmp_path):
    teacher = tiny.pair("llama")[1]
    with torch.device("meta"):
        teacher.lm_head.weight = nn.Parameter(torch.empty(teacher.lm_head.weight.shape))
    with pytest.raises(ValueError, match=r"Load the teacher before .* cpu_ram_efficient_loading to false"):
        make_trainer(tmp_path, "llama", models=(tiny.llama(), teacher))
    teacher.hf_device_map = {"": "disk"}  # whence accelerate fetches them in the forward
    make_trainer(tmp_path, "llama", models=(tiny.llama(), teacher))


def test_a_teacher_that_zero3_took_apart_is_refused(tmp_path):
    student, teacher = tiny.pair("llama")
    teacher.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"The teacher's weights are not on this process.*ZeRO-3"):
        make_trainer(tmp_path, "llama", models=(student, teacher))


@pytest.mark.parametrize("apart", [{"fsdp_size": 2}, {"dp_replicate_size": 3, "tp_size": 2}], ids=str)
def test_a_teacher_that_takes_other_batches_at_once_than_there_are_is_refused(apart, tmp_path):
    student, teacher = tiny.pair("llama")
    teacher._is_distributed_loading_by_transformers = True
    teacher.config.distributed_config = DistributedConfig(**apart)
    with pytest.raises(ValueError, match=r"takes [23] batches at once.* each of the 1 processes.*fsdp_size=1\)"):
        make_trainer(tmp_path, "llama", models=(student, teacher))


def test_a_student_that_was_loaded_in_shards_is_refused(tmp_path):
    student, teacher = tiny.pair("llama")
    student._is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="shard it with fsdp=True"):
        make_trainer(tmp_path, "llama", models=(student, teacher))
