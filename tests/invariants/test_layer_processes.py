"""Two processes take the step that one takes, with terms between layers; those over a batch see all rows."""

import pytest
import torch

from tests.invariants.layers_two_processes import CASES, save_results, train
from tests.invariants.steps import Run, assert_same_steps
from tests.processes import run_twice


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, output_dir, subtests):
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for case, (name, settings, splits) in CASES.items():
        one = Run(**train(name, settings, 8, 1, output_dir))
        assert len(one.gradients) == 2
        for batch, accumulation in splits:
            with subtests.test(f"{case}, {batch}x{accumulation}"):
                assert_same_steps(Run(**results[f"{case}, {batch}x{accumulation}"]), one)
