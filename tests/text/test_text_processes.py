"""Packed and padding-free batches over two processes, whose last ones repeat rows."""

import pytest
import torch

from tests.processes import run_twice
from tests.text.two_processes import STREAM, WAYS, save_results, train


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path, subtests):
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    one = train("padded", 8, tmp_path)
    assert len(one["loss"]) == 2
    for way in (*WAYS, "one rank"):
        with subtests.test(way):
            for name, expected in one.items():
                assert results[way][name] == pytest.approx(expected, rel=1e-5), name
    with subtests.test("stream"):
        assert "dispatch_batches" in results[STREAM]
        assert results["free stream"] == ""
