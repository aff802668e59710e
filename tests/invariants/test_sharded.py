"""A student of which every process holds a shard (FSDP2) is trained as a whole one, and without its logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.invariants.sharded import CASES, LENGTH, train_and_evaluate
from tests.invariants.steps import Run, assert_same_steps, relative_difference

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("eval_loss", "eval_kd", "eval_agreement")
DENSE = {"a dense loss", "a teacher in shards"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One launch for all cases."""
    path = tmp_path_factory.mktemp("sharded") / "results.pt"
    command = [sys.executable, "-m", "tests.invariants.sharded", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(path, weights_only=True)
    assert found["processes"] == 2
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_shards_do_what_one_whole_student_does(name, results, output_dir):
    two, one = results[name], train_and_evaluate(CASES[name], output_dir, batch=8)
    # An adapter's teacher is the student's own base.
    assert two["sharded"] == [True, CASES[name].student == "adapters" or CASES[name].teacher is not None]
    assert one["sharded"] == [False, False]
    runs = [Run(gradients=result["gradients"], logs=result["logs"]) for result in (two, one)]
    if name == "bfloat16":  # gradients of shards are summed in it
        pairs = zip(*(run.gradients for run in runs), strict=True)
        assert all(relative_difference(*pair) < 2e-2 for pair in pairs)
        return
    assert_same_steps(*runs)
    assert two["weights"].keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        assert torch.allclose(two["weights"][key], value, rtol=1e-5, atol=1e-6), key
    for metrics, expected in zip(two["metrics"], one["metrics"], strict=True):
        known = {key: expected[key] for key in METRICS}
        assert {key: metrics.get(key) for key in known} == pytest.approx(known, rel=1e-5, abs=5e-7)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DENSE])
def test_no_logits_of_tokens_by_vocabulary_are_made(name, results):
    assert results[name]["reason"] is None
    assert 0 < results[name]["rows"] < CASES[name].batch * LENGTH


def test_what_is_saved_is_the_whole_student_and_resumes_as_it_was(results):
    found = results["saved"]
    assert found["lost"] == []
    for key, value in found["whole"].items():
        assert torch.equal(found["resumed"][key], value), key
        assert torch.equal(found["saved"][key], value), key
