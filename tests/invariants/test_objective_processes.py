"""Two processes take the step that one takes, with weights, temperatures and balances that follow the data."""

import pytest
import torch

from tests.invariants.objectives_two_processes import CASES, ON_WHOLE_BATCHES, save_results, splits_of, train
from tests.invariants.steps import Run, assert_same_steps
from tests.processes import run_twice

METRICS = ("eval_loss", "eval_kd", "eval_agreement")
LOGGED = ("temperature", "temperature_min", "temperature_max", "weight_task", "weight_kd", "weight_hidden")


def test_two_processes_do_what_one_does(tmp_path, output_dir, subtests):
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for case in CASES:
        one = train(case, 8, 1, output_dir)
        assert len(one["gradients"]) >= 2
        for batch, accumulation in splits_of(case):
            with subtests.test(f"{case}, {batch}x{accumulation}"):
                two = results[f"{case}, {batch}x{accumulation}"]
                runs = [Run(gradients=each["gradients"], logs=each["logs"]) for each in (two, one)]
                assert_same_steps(*runs)
                for log, expected in zip(two["logs"], one["logs"], strict=True):
                    known = {name: expected[name] for name in LOGGED if name in expected}
                    assert {name: log.get(name) for name in known} == pytest.approx(known, rel=1e-5)
                # The batches of an evaluation hold other rows, and what compares these has other values.
                metrics = {name: one["metrics"][name] for name in METRICS if case not in ON_WHOLE_BATCHES}
                assert {name: two["metrics"][name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=5e-7)
