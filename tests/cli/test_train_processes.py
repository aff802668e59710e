"""`accelerate launch -m hf_distill train` on two processes, which end as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from hf_distill.cli.main import main
from tests.cli.recipe_cases import CASES, command

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'examples/accelerate/cpu_2_processes.yaml'}"]


def words_of(folder: Path, changes: dict[str, str], processes: int) -> list[str]:
    out = str(folder / f"{processes}")
    recipe = str(ROOT / "examples" / "recipes" / "text_classification.yaml")
    more = {"output_dir": out, "per_device_train_batch_size": f"{8 // processes}"}
    return ["train", recipe, *command(folder, changes, **more)]


def launch(folder: Path, words: list[str]) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, *LAUNCH, "--main_process_port=0", "-m", "hf_distill", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_and_print_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    changes = CASES["text_classification"](tmp_path) | {"report": "{baselines: [], batch_sizes: [1], repeats: 1}"}
    alone, together = tmp_path / "1", tmp_path / "2"
    capsys.readouterr()
    assert main(words_of(tmp_path, changes, 1)) == 0
    for out, err in (capsys.readouterr(), launch(tmp_path, words_of(tmp_path, changes, 2))):
        assert out.count("eval_loss: ") == 1
        assert err.count("rows: ") == 1
        assert err.count("step 2/2  epoch") == 1
    metrics = [json.loads((folder / "eval_results.json").read_text(encoding="utf-8")) for folder in (alone, together)]
    for name in ("eval_loss", "eval_accuracy", "eval_agreement"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (alone, together)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    assert (together / "distillation" / "report.json").is_file()
    assert (together / "README.md").is_file()
