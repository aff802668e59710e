"""The scripts as a user runs them: on local files, alone and with two processes."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_distill.demo.models import train_wordpiece
from tests.processes import run_twice

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def _run_alone(script: str, *options: str) -> None:
    """As `python scripts/...` does, in this process: what the script needs is imported already."""
    path = str(ROOT / "scripts" / script)
    with mock.patch.object(sys, "argv", [path, *options]):
        runpy.run_path(path, run_name="__main__")


def _options(folder: Path, output: str, batch_size: int) -> list[str]:
    return [
        f"--teacher={folder / 'teacher'}",
        f"--student={folder / 'student'}",
        f"--output_dir={folder / output}",
        f"--per_device_train_batch_size={batch_size}",
        "--max_steps=4",
        "--logging_steps=1",
        "--use_cpu",
        "--report_to=none",
        "--disable_tqdm=true",
    ]


def _save_pair(folder: Path, make, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, width in (("teacher", 48), ("student", 32)):
        torch.manual_seed(width)
        make(width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _assert_same_run(alone: Path, together: Path) -> None:
    logs = [
        json.loads((folder / "checkpoint-4/trainer_state.json").read_text())["log_history"]
        for folder in (alone, together)
    ]
    for name in ("loss", "loss_task", "loss_kd"):
        values = [[row[name] for row in log if name in row] for log in logs]
        assert len(values[0]) == 4
        assert values[1] == pytest.approx(values[0], rel=1e-4)
    metrics = [json.loads((folder / "eval_results.json").read_text()) for folder in (alone, together)]
    for name in ("eval_loss", "eval_kd", "eval_agreement"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (alone, together)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


def test_text_classification_on_a_partly_labelled_file_gives_one_result_on_one_and_two_processes(tmp_path, capsys):
    words = ["rain", "sun", "song", "band", "table", "chair"]
    lines = [
        (f"{words[i % 6]} {words[(i + i // 6) % 6]} {i % 5}", f"class {i % 3}" if i % 4 else "") for i in range(64)
    ]
    dataset = tmp_path / "texts.csv"
    rows = [f"{text},{label},{'en' if i % 3 else 'de'},{1 + i % 2}" for i, (text, label) in enumerate(lines)]
    dataset.write_text("text,label,language,trust\n" + "\n".join(rows))
    weights = [
        {"by": "group", "column": "language", "weights": {"en": 1, "de": 3}},
        {"by": "column", "column": "trust"},
    ]
    labels = {i: f"class {i}" for i in range(3)}
    tokenizer = train_wordpiece([text for text, _ in lines], vocabulary_size=90)
    _save_pair(tmp_path, lambda width: tiny.bert(hidden=width, id2label=labels), tokenizer)
    more = (f"--dataset={dataset}", f"--item_weights={json.dumps(weights)}")
    script = "distill_text_classification.py"
    _run_alone(script, *_options(tmp_path, "alone", 16), *more)
    assert "eval_accuracy " in capsys.readouterr().out
    run_twice(_run_alone, script, *_options(tmp_path, "together", 8), *more, "--ddp_backend=gloo")
    _assert_same_run(tmp_path / "alone", tmp_path / "together")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "alone")
    assert student.config.id2label == labels


def test_language_model_on_a_text_file_gives_one_result_on_one_and_two_processes(tmp_path):
    dataset = tmp_path / "corpus.txt"
    dataset.write_text("\n".join(f"the {i} cats sat on the {i * 7 % 13} mats and ran" for i in range(300)))
    tokenizer = train_wordpiece(dataset.read_text().splitlines(), vocabulary_size=90)
    _save_pair(tmp_path, lambda width: tiny.llama(hidden=width, vocab_size=len(tokenizer)), tokenizer)
    more = (f"--dataset={dataset}", "--packing", "--packing_strategy=wrapped", "--max_length=16")
    script = "distill_language_model.py"
    _run_alone(script, *_options(tmp_path, "alone", 8), *more)
    run_twice(_run_alone, script, *_options(tmp_path, "together", 4), *more, "--ddp_backend=gloo")
    _assert_same_run(tmp_path / "alone", tmp_path / "together")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "alone").config.vocab_size == len(tokenizer)


def test_a_language_model_goes_on_from_its_last_checkpoint_and_prints_its_evaluation(tmp_path, capsys):
    dataset = tmp_path / "corpus.txt"
    dataset.write_text("\n".join(f"the {i} cats sat on the {i * 7 % 13} mats" for i in range(80)))
    tokenizer = train_wordpiece(dataset.read_text().splitlines(), vocabulary_size=90)
    _save_pair(tmp_path, lambda width: tiny.llama(hidden=width, vocab_size=len(tokenizer)), tokenizer)
    options = [*_options(tmp_path, "out", 4), f"--dataset={dataset}"]
    _run_alone("distill_language_model.py", *options)
    _run_alone("distill_language_model.py", *options, "--max_steps=6", "--resume_from_checkpoint=true")
    log = json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert "eval_perplexity " in capsys.readouterr().out
