"""Trains one small language model in several ways on one text, and compares their perplexity over seeds.

How to run it and what it shows: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from hf_distill import DistillationTrainer, DistillationTrainingArguments

LENGTH, PROMPT = 128, 16  # tokens in a row, and how many of them are no targets: what a student goes on from
KD = {"kd_weight": 0.9, "task_weight": 0.1, "temperature": 1.0}
# The fields of the distillation; None for labels alone.
ARMS: dict[str, Mapping[str, Any] | None] = {
    "labels": None,
    "kd": KD,
    "kd and hidden": {**KD, "hidden_weight": 0.1},
    "kd, a quarter on policy": {**KD, "lmbda": 0.25, "max_new_tokens": LENGTH - PROMPT},
}


def learn_tokenizer(text: str, classes: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(text.splitlines(), vocab_size=classes, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token="<eos>", pad_token="<eos>")


def rows_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    """The text in rows of equal length; the first tokens of each are context alone."""
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    labels = [[-100] * PROMPT + row[PROMPT:] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})


def make_model(layers: int, width: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A GPT-2 of random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=layers,
        n_embd=width,
        n_head=width // 32,
        n_positions=LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
    *,
    steps: int,
    seed: int,
    terms: Mapping[str, Any],
) -> Trainer:
    """Trains the model in place; without a teacher on labels alone."""
    arguments: dict[str, Any] = {
        "output_dir": options.folder,
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    common = {"model": model, "train_dataset": rows, "data_collator": default_data_collator}
    if teacher is None:
        trainer = Trainer(args=TrainingArguments(**arguments), **common)
    else:
        trainer = DistillationTrainer(
            args=DistillationTrainingArguments(**arguments, **terms),
            teacher_model=teacher,
            processing_class=tokenizer,
            **common,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def perplexity(trainer: Trainer, rows: datasets.Dataset) -> float:
    """Of the tokens that are targets; every row has as many."""
    trainer.args.prediction_loss_only = True
    return math.exp(trainer.evaluate(rows)["eval_loss"])


def measure(
    arm: str,
    seed: int,
    options: argparse.Namespace,
    teacher: PreTrainedModel,
    rows: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, float]:
    """One student: its perplexity, and the processor seconds of its training with the teacher's part."""
    set_seed(seed)
    student = make_model(options.student_layers, options.student_width, tokenizer)
    terms = ARMS[arm]
    began = time.process_time()
    trainer = train(
        student,
        None if terms is None else teacher,
        rows["train"],
        tokenizer,
        options,
        steps=options.steps,
        seed=seed,
        terms=terms or {},
    )
    seconds = time.process_time() - began
    return {"seed": seed, "perplexity": perplexity(trainer, rows["test"]), "processor_seconds": seconds}


def markdown(results: Mapping[str, Any]) -> str:
    """One row an arm."""
    lines = ["| arm | perplexity | seeds | processor seconds |", "|---|---|---|---|"]
    for arm, runs in results["arms"].items():
        found = [run["perplexity"] for run in runs]
        spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
        seconds = mean(run["processor_seconds"] for run in runs)
        lines.append(f"| {arm} | {mean(found):.2f}{spread} | {len(found)} | {seconds:.0f} |")
    return "\n".join([*lines, "", f"Teacher: {results['teacher_perplexity']:.2f}"]) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_lm", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder with train.txt and test.txt")
    parser.add_argument("--classes", type=int, default=2000, help="size of the vocabulary, learned from train.txt")
    parser.add_argument("--teacher-layers", type=int, default=4)
    parser.add_argument("--teacher-width", type=int, default=192, help="a multiple of 32, the width of a head")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--student-layers", type=int, default=2)
    parser.add_argument("--student-width", type=int, default=128)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--teacher", type=Path, help="where the trained teacher is kept, or is to be")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality-lm.json"))
    return parser.parse_args()


def make_teacher(
    options: argparse.Namespace, rows: Mapping[str, datasets.Dataset], tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """The teacher, trained on labels, or as an earlier run has kept it."""
    if options.teacher is not None and (options.teacher / "config.json").exists():
        return GPT2LMHeadModel.from_pretrained(options.teacher)
    set_seed(0)
    teacher = make_model(options.teacher_layers, options.teacher_width, tokenizer)
    train(teacher, None, rows["train"], tokenizer, options, steps=options.teacher_steps, seed=0, terms={})
    if options.teacher is not None:
        teacher.save_pretrained(options.teacher)
    return teacher


def main() -> None:
    """Measures, and writes the results after every run."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = learn_tokenizer((options.data / "train.txt").read_text(encoding="utf-8"), options.classes)
    rows = {part: rows_of(options.data / f"{part}.txt", tokenizer) for part in ("train", "test")}
    # Not where they lie on this machine.
    asked = vars(options) | {"data": options.data.name, "out": options.out.name, "teacher": None}
    with tempfile.TemporaryDirectory() as options.folder:
        teacher = make_teacher(options, rows, tokenizer)
        judge = Trainer(
            teacher,
            TrainingArguments(options.folder, report_to="none", disable_tqdm=True, use_cpu=True),
            data_collator=default_data_collator,
        )
        results: dict[str, Any] = {
            "environment": environment(),
            "options": asked,
            "teacher_perplexity": perplexity(judge, rows["test"]),
            "arms": {arm: [] for arm in options.arms},
        }
        for seed in options.seeds:
            for arm in options.arms:
                run = measure(arm, seed, options, teacher, rows, tokenizer)
                results["arms"][arm].append(run)
                print(f"seed {seed}, {arm}: {run['perplexity']:.2f}, {run['processor_seconds']:.0f} s", flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), end="")


if __name__ == "__main__":
    main()
