"""Two processes take the step that one takes, log its terms and evaluate to its metrics."""

import pytest
import torch

from tests.invariants.steps import Run, assert_same_steps
from tests.invariants.two_processes import CASES, save_results, train_and_evaluate
from tests.processes import run_twice

METRICS = ("eval_loss", "eval_kd", "eval_agreement")


def run_of(result):
    return Run(gradients=result["gradients"], logs=result["logs"])


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, output_dir, subtests):
    """One launch for all heads; the rows divide neither into the last step's batches nor into the evaluation's."""
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    uninterrupted, resumed = results["resumed"]
    assert len(uninterrupted) == 3  # 4 rows each, the last of 3 and a repeated one
    assert resumed == uninterrupted
    for (name, labels), splits in CASES.items():
        one = train_and_evaluate(name, labels, 8, 1, output_dir)
        assert len(one["gradients"]) == 2
        for batch, accumulation in splits:
            case = f"{name}, {labels}, {batch}x{accumulation}"
            with subtests.test(case):
                two = results[case]
                assert_same_steps(run_of(two), run_of(one))
                for metrics, expected in zip(two["metrics"], one["metrics"], strict=True):
                    known = {key: expected[key] for key in METRICS if key in expected}
                    assert {key: metrics.get(key) for key in known} == pytest.approx(known, rel=1e-5, abs=5e-7)
