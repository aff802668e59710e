"""A partly labelled stream over two processes, whose batches one of them makes, joins and deals out."""

import pytest
import torch

from tests.invariants.stream_over_two_processes import NAMES, WITHOUT_LABELS, save_results, train_and_evaluate
from tests.processes import run_twice


def test_it_does_not_matter_on_whose_rows_labels_are_missing(tmp_path, output_dir, subtests):
    """Joined batches have the first one's keys: a mask in one batch alone would be lost, or missed in the other."""
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for name in NAMES:
        for part in WITHOUT_LABELS:
            with subtests.test(f"{name}, {part}"):
                one = train_and_evaluate(name, part, 8, output_dir)
                for key, expected in one.items():
                    assert results[f"{name}, {part}"][key] == pytest.approx(expected, rel=1e-5, abs=5e-7), key
