"""Seven rows on two processes against one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import run_twice
from tests.test_teacher_scores import Counting, of_teacher
from tests.tiny import pair, rows
from tests.training import make_trainer

SEED = 3


def metrics(prediction):
    """Of all rows, so that a row which counts twice would show."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "mse": float(np.square(prediction.predictions).mean()), "n": len(right)}


def evaluations(folder, batch_size):
    """What three evaluations find, the second of a set of which one row of the last rank has changed."""
    student, teacher = pair("bert")
    teacher = Counting(teacher)
    data = rows("sequence", count=7, seed=SEED)
    trainer = make_trainer(
        Path(folder), models=(student, teacher), train_dataset=rows("sequence"), eval_dataset=data,
        compute_metrics=metrics, evaluate_teacher=True, per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    found, calls = [], []
    for _ in range(3):
        before = teacher.calls
        found.append(trainer.evaluate())
        calls.append(teacher.calls - before)
        data[3] = {**data[3], "labels": torch.tensor(0), "input_ids": data[4]["input_ids"]}
    return [{**of_teacher(one), "retained": one["eval_retention_mse"]} for one in found], calls


def save_results(folder, path):
    found = evaluations(folder, 2)
    Path(f"{path}.{torch.distributed.get_rank()}").write_text(json.dumps([*found, torch.distributed.get_world_size()]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "results"
    run_twice(save_results, folder, path)
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(2)]


def test_uneven_rows_on_two_processes_give_the_scores_of_one(ranks, tmp_path):
    expected, _ = evaluations(tmp_path, 4)
    for found, calls, processes in ranks:
        assert processes == 2
        assert found == [pytest.approx(one, rel=1e-5) for one in expected]
        assert found[0]["n"] == 7
        assert found[1] != found[0]
        # A row of one rank changed after the first evaluation, and both scored the teacher anew.
        assert calls == [4, 4, 2]
