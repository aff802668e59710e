"""A student of which every process holds a shard (FSDP2) is trained as a whole one, and without its logits."""

import pytest
import torch

from tests.invariants.sharded import CASES, LENGTH, models_of, save_results, train_and_evaluate
from tests.invariants.steps import Run, assert_same_steps, relative_difference
from tests.processes import run_twice

METRICS = ("eval_loss", "eval_kd", "eval_agreement")
DENSE = {"a dense loss", "a teacher in shards"}
pytestmark = pytest.mark.slow


def test_two_shards_do_what_one_whole_student_does_without_its_logits(tmp_path, output_dir, subtests):
    """One launch for all cases."""
    path = tmp_path / "results.pt"
    models_of("llama")[1].save_pretrained(f"{path}.output.teacher")
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for name, case in CASES.items():
        with subtests.test(name):
            assert_same_training(name, results[name], train_and_evaluate(case, output_dir, batch=8))
        if name not in DENSE:
            with subtests.test(f"{name}: no logits of tokens by vocabulary are made"):
                assert results[name]["reason"] is None
                assert 0 < results[name]["rows"] < case.batch * LENGTH
    with subtests.test("what is saved is the whole student and resumes as it was"):
        found = results["saved"]
        assert found["lost"] == []
        for key, value in found["whole"].items():
            assert torch.equal(found["resumed"][key], value), key
            assert torch.equal(found["saved"][key], value), key


def assert_same_training(name, two, one):
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
