"""Two processes take the step that one takes, with terms between layers; those over a batch see all rows."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.invariants.layers_two_processes import CASES, train
from tests.invariants.steps import Run, assert_same_steps

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_do_what_one_does(tmp_path, output_dir, subtests):
    path = tmp_path / "results.pt"
    command = [sys.executable, "-m", "tests.invariants.layers_two_processes", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for case, (name, settings, splits) in CASES.items():
        one = Run(**train(name, settings, 8, 1, output_dir))
        assert len(one.gradients) == 2
        for batch, accumulation in splits:
            with subtests.test(f"{case}, {batch}x{accumulation}"):
                assert_same_steps(Run(**results[f"{case}, {batch}x{accumulation}"]), one)
