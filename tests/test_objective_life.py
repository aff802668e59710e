"""What changes over a training survives what users do around it: evaluations, second trainings, searches, streams."""

import json
import math

import pytest
import torch

from hf_distill.schedules import Schedule
from hf_distill.temperature import AdaptiveTemperature
from hf_distill.weighting import ColumnWeights
from tests import tiny
from tests.invariants.objective_cases import weighted_rows
from tests.training import arguments, logged, make_trainer

LEARNED = {"policy": "learned"}
BY_COLUMN = [{"by": "column", "column": "distill_weight"}]
STEP = {"kind": "step", "points": [[0, 0], [0.5, 1]]}


def test_a_match_is_logged_as_a_mean_over_all_steps_also_while_its_scheduled_weight_is_0(tmp_path):
    options = {"hidden_weight": 1.0, "max_steps": 4, "learning_rate": 0.0}
    each = make_trainer(tmp_path, **options)
    each.train()
    scheduled = make_trainer(tmp_path, weight_schedules={"hidden": STEP}, logging_steps=4, **options)
    scheduled.train()
    expected = sum(logged(each, "loss_hidden")) / 4
    assert logged(scheduled, "loss_hidden") == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(("weight", "schedule"), [(1.0, None), (10.0, None), (1.0, 0.1)])
def test_uncertainties_leave_the_weight_of_a_term_what_it_is(weight, schedule, tmp_path):
    settings = {} if schedule is None else {"weight_schedules": {"kd": {"kind": "constant", "value": schedule}}}
    trainer = make_trainer(
        tmp_path,
        kd_weight=weight,
        task_weight=1.0,
        loss_balance={"kind": "uncertainty", "learning_rate_factor": 1e5},
        learning_rate=1e-6,
        max_steps=120,
        logging_steps=120,
        **settings,
    )
    trainer.train()
    (factor,), (kd,) = logged(trainer, "weight_kd"), logged(trainer, "loss_kd")
    # Where exp(-s) / 2 * L + s / 2 is least, exp(-s) is 1 / L.
    assert factor == pytest.approx(weight * (schedule or 1.0) / (2 * kd), rel=0.1)


def test_a_term_that_is_off_leaves_its_uncertainty_alone(tmp_path):
    config = {
        "task": {},
        "logits": {"active": [0, 0.1]},
        "balance": {"kind": "uncertainty", "learning_rate_factor": 1e4},
    }
    trainer = make_trainer(tmp_path, distillation_config=config, max_steps=20, logging_steps=1, learning_rate=1e-6)
    trainer.train()
    assert trainer._balancer.factors()["kd"] < 1.0


@pytest.mark.parametrize(
    "settings", [{"preset": "ctkd", "kd_weight": 0.0, "task_weight": 1.0}, {"temperature": LEARNED}]
)
def test_a_learned_temperature_may_go_untrained(settings, tmp_path):
    trainer = make_trainer(tmp_path, hidden_weight=1.0, **settings)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_kd"])
    alone = make_trainer(tmp_path, train_dataset=None, **settings)
    assert math.isfinite(alone.evaluate()["eval_kd"])


def test_the_second_training_of_a_trainer_can_be_resumed_by_another(tmp_path):
    options = {"temperature": LEARNED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    groups = len(trainer.optimizer.param_groups)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == groups
    other = make_trainer(tmp_path, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.state.global_step == 4


def test_item_weights_are_planned_when_their_term_is_turned_on(tmp_path):
    rows = weighted_rows("bert")
    config = {"task": {"weight": 1}, "logits": {"weight": 0, "item_weights": BY_COLUMN}}
    trainer = make_trainer(
        tmp_path, distillation_config=config, train_dataset=rows, eval_dataset=rows, learning_rate=0.0
    )
    trainer.train()
    assert logged(trainer, "item_weight") == []
    trainer.args.kd_weight = 1.0
    trainer.train()
    fresh = make_trainer(tmp_path, item_weights=BY_COLUMN, train_dataset=rows, learning_rate=0.0)
    fresh.train()
    assert logged(trainer, "item_weight") == logged(fresh, "item_weight")
    assert logged(trainer, "loss_kd") == pytest.approx(logged(fresh, "loss_kd"))


def test_item_weights_without_a_train_dataset_are_refused_by_the_training(tmp_path):
    trainer = make_trainer(tmp_path, item_weights=BY_COLUMN, train_dataset=None)
    assert math.isfinite(trainer.evaluate()["eval_kd"])
    other = make_trainer(tmp_path)
    trainer.get_train_dataloader = other.get_train_dataloader
    with pytest.raises(ValueError, match="The item weights are planned on train_dataset, which is None"):
        trainer.train()


def test_columns_of_weights_that_nobody_reads_do_not_reach_the_collator(tmp_path):
    tokenizer = tiny.tokenizer()
    rows = [{**tokenizer("a b c"), "labels": 1, "text": "a b c"} for _ in range(8)]
    config = {"task": {"weight": 1}, "logits": {"weight": 0, "item_weights": [{"by": "phrases", "phrases": ["b c"]}]}}
    trainer = make_trainer(
        tmp_path, distillation_config=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


def test_rows_without_a_group_can_be_predicted(tmp_path):
    rows = weighted_rows("bert")
    follow = [{"by": "group", "column": "language", "follow": "loss"}]
    trainer = make_trainer(
        tmp_path, item_weights=follow, train_dataset=rows, eval_dataset=rows, eval_strategy="steps", eval_steps=1
    )
    assert "eval_loss_en" in trainer.evaluate()
    plain = [{name: value for name, value in row.items() if name != "language"} for row in rows]
    assert trainer.predict(plain).predictions.shape[0] == len(rows)


@pytest.mark.parametrize(
    ("name", "loss"), [("bert-multi-label", "dkd"), ("bert-tokens", "dist"), ("bert-regression", "reverse_kl")]
)
def test_a_loss_that_an_evaluation_could_not_measure_is_refused_without_a_weight_too(name, loss, tmp_path):
    with pytest.raises(ValueError, match=f"kd_loss='{loss}'"):
        make_trainer(tmp_path, name, kd_loss=loss, kd_weight=0.0, task_weight=1.0)


def test_a_column_called_teacher_output_is_no_output_of_the_teacher(tmp_path):
    rows = [{**row, "teacher_output": torch.tensor(1)} for row in tiny.rows("sequence")]
    trainer = make_trainer(tmp_path, train_dataset=rows, eval_dataset=rows, remove_unused_columns=False)
    trainer.train()
    assert len(logged(trainer, "loss_kd")) == 2


def test_objects_in_the_arguments_become_plain_values(tmp_path):
    args = arguments(
        tmp_path,
        temperature=AdaptiveTemperature(min=1),
        item_weights=[ColumnWeights()],
        teacher_scale=Schedule.of(0.5),
    )
    written = json.loads(args.to_json_string())
    assert written["temperature"] == {"policy": "adaptive", "min": 1}
    assert written["item_weights"] == [{"by": "column"}]
    assert written["teacher_scale"] == 0.5


def test_a_search_may_try_without_a_term_that_has_a_schedule(tmp_path):
    trainer = make_trainer(tmp_path, weight_schedules={"kd": "warmup"}, task_weight=1.0)
    trainer.args.kd_weight = 0.0
    trainer.train()
    assert logged(trainer, "loss_kd") == []
    with pytest.raises(ValueError, match="the weight of kd is 0"):
        arguments(tmp_path, weight_schedules={"kd": "warmup"}, kd_weight=0.0)
