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
    "scheduled": {
        "temperature": 8.0,
        "temperature_schedule": "exponential",
        "temperature_final": 1.0,
        "weight_schedules": {"kd": LINEAR, "task": "warmup"},
        "teacher_scale": {"kind": "linear", "from": 0.2, "to": 1},
    },
    "learned": {"temperature": {"policy": "learned", "curriculum": 0.5}},
    "learned per item": {"temperature": {"policy": "learned", "scope": "instance", "curriculum": 0.5}},
    "uncertainty": {"loss_balance": "uncertainty", "hidden_weight": 0.5},
    "magnitude": {"loss_balance": "magnitude", "hidden_weight": 0.5},
    "following groups": {
        "item_weights": [{"by": "group", "column": "language", "follow": "loss", "power": 2}],
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
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


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_with_the_same_bits(case, name, output_dir):
    whole = trainer_of(name, CASES[case], output_dir)
    whole.train()
    resumed = trainer_of(name, CASES[case], output_dir)
    resumed.train(resume_from_checkpoint=str(Path(output_dir, f"checkpoint-{STOP}")))
    assert resumed.state.global_step == STEPS
    assert logged(resumed)[STOP:] == logged(whole)[STOP:]
    weights = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(weights[key], value), key


def test_what_follows_the_data_moves_between_the_steps(output_dir):
    """Else the test above would compare constants."""
    for case in ("learned", "uncertainty", "magnitude", "scheduled"):
        trainer = trainer_of("bert", CASES[case], output_dir)
        trainer.train()
        for key in ("temperature",) if case == "learned" else ("weight_kd",):
            values = [log[key] for log in logged(trainer)]
            assert len({*values}) > 3 or case == "magnitude", (case, key, values)
    trainer = trainer_of("bert", CASES["following groups"], output_dir)
    trainer.train()
    assert len({*trainer._item_weights.factors().values()}) > 1
