"""With several processes one measures and writes, and the others wait, get the same, and fail with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_distill.run_record import RunRecord

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_processes_get_the_report_that_one_made(tmp_path):
    command = [sys.executable, "-m", "tests.card.evidence_two_processes", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first == second
    assert first["processes"] == 2
    assert "batch_size is 0" in first["refused"]
    written = json.loads((tmp_path / "student/distillation/report.json").read_text(encoding="utf-8"))
    assert written == first["report"]
    assert RunRecord.read(tmp_path / "student").hardware["processes"] == 2
    assert (tmp_path / "student/README.md").is_file()
