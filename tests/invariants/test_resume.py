"""A training that stops in the middle of an epoch and resumes ends with the bits of one that did not stop."""

from pathlib import Path

import peft
import pytest
import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import with_dropout
from tests.training import SILENT

STEPS, STOP = 8, 3
PLAN = {
    **SILENT,
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,  # of 16 rows: 4 steps an epoch, so that step 3 is in the middle of the first
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "save_strategy": "steps",
    "save_steps": STOP,
}


def adapted_llama():
    """A Llama with an untrained LoRA adapter, with dropout; its base, with the adapter off, teaches."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(with_dropout(tiny.llama()), config), None


def models_of(name):
    if name == "llama with LoRA":
        return adapted_llama()
    student, teacher = tiny.pair(name)
    return with_dropout(student), teacher


def trainer_of(name, output_dir, **changes):
    student, teacher = models_of(name)
    return DistillationTrainer(
        student,
        DistillationTrainingArguments(output_dir=output_dir, **PLAN | changes),
        teacher_model=teacher,
        train_dataset=tiny.rows("sequence" if name == "bert" else "causal", count=16),
    )


def logged(trainer):
    """The log of every step."""
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("name", ["bert", "llama", "llama with LoRA"])
def test_a_resumed_training_ends_with_the_same_bits(name, output_dir):
    whole = trainer_of(name, output_dir)
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.train()
    checkpoint = Path(output_dir, f"checkpoint-{STOP}")
    assert checkpoint.is_dir()
    resumed = trainer_of(name, output_dir)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS
    assert logged(resumed)[STOP:] == logged(whole)[STOP:]
    assert len(logged(whole)) == STEPS
    assert all(log["loss_kd"] > 0 for log in logged(whole)[1:])
    weights, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert [*weights] == [*expected]
    assert any(not torch.equal(start[key], value) for key, value in expected.items())
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
