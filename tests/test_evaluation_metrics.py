"""What `evaluate` and `predict` hand on: the user's own metrics, and labels as they were given."""

import numpy as np
import pytest
import torch

from tests.tiny import pair, rows
from tests.training import logged, make_trainer


def test_a_metric_of_the_users_own_survives_under_our_names_where_we_have_none(tmp_path):
    own = {"agreement": 0.25, "kd": 3.0}
    trainer = make_trainer(
        tmp_path, teacher_model=None, kd_weight=0.0, task_weight=1.0, compute_metrics=lambda prediction: own
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_agreement"], metrics["eval_kd"]) == (0.25, 3.0)


def test_missing_answers_reach_compute_metrics_as_missing(tmp_path):
    """Batches of other lengths than the longest: a position beyond them would be one in the padded logits."""
    data = rows("spans")
    for row in data[:4]:  # a batch of its own
        row |= {key: row[key][:9] for key in ("input_ids", "attention_mask")}
        row["start_positions"] = row["end_positions"] = torch.tensor(-100)
    seen = []
    trainer = make_trainer(
        tmp_path, "bert-spans", eval_dataset=data, compute_metrics=lambda p: seen.append(p.label_ids) or {}
    )
    trainer.evaluate()
    for positions in seen[0]:
        assert np.flatnonzero(positions == -100).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("metrics", [{}, {"eval_first_loss": 1.0}])
def test_a_search_without_eval_loss_says_what_to_pass(tmp_path, monkeypatch, metrics):
    trainer = make_trainer(tmp_path, model=None, model_init=lambda: pair("bert")[0])
    objectives = []
    monkeypatch.setattr(
        "transformers.Trainer.hyperparameter_search", lambda self, space, goal: objectives.append(goal)
    )
    trainer.hyperparameter_search()
    assert objectives[0]({"eval_loss": 0.5}) == 0.5
    with pytest.raises(ValueError, match="compute_objective"):
        objectives[0](metrics)


def test_repeated_rows_leave_the_labelled_fraction_at_one(tmp_path):
    """As on the last batch of an epoch whose ranks do not come out even; here one process marks them itself."""
    repeated = torch.tensor([True, True, True, False])
    data = [{**row, "row_mask": keep} for row, keep in zip(rows("sequence", 4), repeated, strict=True)]
    trainer = make_trainer(tmp_path, train_dataset=data, remove_unused_columns=False, max_steps=1)
    trainer.train()
    assert logged(trainer, "labelled_fraction") == [1.0]
