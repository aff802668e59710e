"""`accelerate launch -m hf_distill train` on two processes, which end as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.recipe_cases import CASES, command

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'examples/accelerate/cpu_2_processes.yaml'}"]


def run(folder: Path, changes: dict[str, str], processes: int) -> Path:
    out = folder / f"{processes}"
    words = command(folder, changes, output_dir=str(out), per_device_train_batch_size=f"{8 // processes}")
    launcher = [*LAUNCH, "--main_process_port=0"] if processes == 2 else []
    recipe = ROOT / "examples" / "recipes" / "text_classification.yaml"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hf_distill", "train", str(recipe), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("eval_loss: ") == 1
    assert done.stderr.count("rows: ") == 1
    assert done.stderr.count("step 2/2  epoch") == 1
    return out


@pytest.mark.slow
def test_two_processes_train_as_one_and_print_once(tmp_path):
    changes = CASES["text_classification"](tmp_path) | {"report": "{baselines: [], batch_sizes: [1], repeats: 1}"}
    alone, together = (run(tmp_path, changes, processes) for processes in (1, 2))
    metrics = [json.loads((folder / "eval_results.json").read_text(encoding="utf-8")) for folder in (alone, together)]
    for name in ("eval_loss", "eval_accuracy", "eval_agreement"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (alone, together)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    assert (together / "distillation" / "report.json").is_file()
    assert (together / "README.md").is_file()
