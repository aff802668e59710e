"""With several processes one measures and writes, and the others wait, get the same, and fail with it."""

import json

import pytest

from hf_distill.run_record import RunRecord
from tests.card.evidence_two_processes import run
from tests.processes import run_twice


@pytest.mark.slow
def test_both_processes_get_the_report_that_one_made(tmp_path):
    run_twice(run, tmp_path)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first == second
    assert first["processes"] == 2
    assert "batch_size is 0" in first["refused"]
    written = json.loads((tmp_path / "student/distillation/report.json").read_text(encoding="utf-8"))
    assert written == first["report"]
    assert RunRecord.read(tmp_path / "student").hardware["processes"] == 2
    assert (tmp_path / "student/README.md").is_file()
