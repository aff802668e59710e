"""Whatever changes over a training is a function of its progress or in its checkpoints: resuming changes no bit."""

from pathlib import Path

import pytest
import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.objective_cases import weighted_rows
from tests.invariants.steps import with_dropout
from tests.invariants.test_resume import PLAN, STEPS, STOP, logged

LINEAR = {"kind": "linear", "from": 1, "to": 0.2}
CASES = {
    "scheduled": (
        "llama",
        {
            "temperature": 8.0,
            "temperature_schedule": "exponential",
            "temperature_final": 1.0,
            "weight_schedules": {"kd": LINEAR, "task": "warmup"},
            "teacher_scale": {"kind": "linear", "from": 0.2, "to": 1},
        },
    ),
    "learned": ("bert", {"temperature": {"policy": "learned", "curriculum": 0.5}}),
    "learned per item": ("llama", {"temperature": {"policy": "learned", "scope": "instance", "curriculum": 0.5}}),
    "uncertainty": ("bert", {"loss_balance": "uncertainty", "hidden_weight": 0.5}),
    "magnitude": ("llama", {"loss_balance": "magnitude", "hidden_weight": 0.5}),
    "following groups": (
        "bert",
        {
            "item_weights": [{"by": "group", "column": "language", "follow": "loss", "power": 2}],
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    ),
}
MOVES = {
    "scheduled": ("temperature", "weight_kd"),
    "learned": ("temperature",),
    "learned per item": ("temperature",),
    "uncertainty": ("weight_kd",),
    "magnitude": ("weight_hidden",),
}


def trainer_of(name, settings, output_dir):
    student, teacher = tiny.pair(name)
    rows = weighted_rows(name, 16)
    return DistillationTrainer(
        with_dropout(student),
        DistillationTrainingArguments(output_dir=output_dir, **PLAN | settings),
        teacher_model=teacher,
        train_dataset=rows,
        eval_dataset=rows[:6],
    )


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_with_the_same_bits(case, output_dir):
    name, settings = CASES[case]
    whole = trainer_of(name, settings, output_dir)
    whole.train()
    assert_moving(case, whole)
    resumed = trainer_of(name, settings, output_dir)
    resumed.train(resume_from_checkpoint=str(Path(output_dir, f"checkpoint-{STOP}")))
    assert resumed.state.global_step == STEPS
    assert logged(resumed)[STOP:] == logged(whole)[STOP:]
    weights = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(weights[key], value), key


def assert_moving(case, trainer):
    """What follows the data moves between the steps; else the test would compare constants."""
    if case == "following groups":
        assert len({*trainer._item_weights.factors().values()}) > 1
        return
    for key in MOVES[case]:
        values = [log[key] for log in logged(trainer)]
        assert len({*values}) > 3, (key, values)
