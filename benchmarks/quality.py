"""Trains one student by several presets on one data set, and compares their accuracy over seeds.

How to run it and what it shows: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import copy
import json
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
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from hf_distill import DistillationTrainer, DistillationTrainingArguments, build_student
from hf_distill.demo.corpus import Corpus, keep_labels, labelled_rows, load_corpus
from hf_distill.demo.measurement import predict_logits
from hf_distill.demo.training import encode

MAX_LENGTH = 64
HEADS = 12
# The fields of the distillation; None for labels alone.
ARMS: dict[str, Mapping[str, Any] | None] = {
    "labels": None,
    "logits": {"kd_weight": 1.0, "task_weight": 0.0},
    "tinybert": {"preset": "tinybert"},
    "minilmv2": {"preset": "minilmv2"},
}


def common_arguments(options: argparse.Namespace, *, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """What the arguments of every training have in common."""
    return {
        "output_dir": options.folder,
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 0.05,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
        "bf16": options.bf16,
    }


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
) -> None:
    """Trains the model in place; without a teacher on labels alone."""
    common = {"model": model, "train_dataset": rows, "data_collator": DataCollatorWithPadding(tokenizer)}
    if teacher is None:
        trainer = Trainer(args=TrainingArguments(**arguments), **common)
    else:
        trainer = DistillationTrainer(
            args=DistillationTrainingArguments(**arguments),
            teacher_model=teacher,
            processing_class=tokenizer,
            **common,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def accuracy(model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """The percentage of rows that the model gets right."""
    predicted = predict_logits(model, rows, tokenizer).argmax(-1)
    return 100 * float((predicted == rows["label"]).mean())


def make_student(teacher: PreTrainedModel, options: argparse.Namespace) -> PreTrainedModel:
    """A student with the teacher's architecture: layers of its own, or random weights of the asked depth and width."""
    if options.copy_layers:
        return build_student(teacher, layers=options.copy_layers).model
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.hidden_size = options.student_layers, options.student_width
    config.intermediate_size, config.num_attention_heads = 4 * options.student_width, HEADS
    return AutoModelForSequenceClassification.from_config(config)


def make_teacher(
    options: argparse.Namespace, corpus: Corpus, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The named classifier, fine-tuned on all labels where steps are asked for."""
    labels = {
        "id2label": dict(enumerate(corpus.label_names)),
        "label2id": {n: i for i, n in enumerate(corpus.label_names)},
    }
    teacher = AutoModelForSequenceClassification.from_pretrained(
        options.teacher, **(labels if options.teacher_steps else {})
    )
    if teacher.config.num_labels != len(corpus.label_names):
        raise ValueError(
            f"The teacher has {teacher.config.num_labels} labels, the data {len(corpus.label_names)}. "
            "Give --teacher-steps > 0 to fine-tune it."
        )
    if options.teacher_steps:
        arguments = common_arguments(options, steps=options.teacher_steps, learning_rate=1e-4, seed=0)
        train(teacher, None, rows, tokenizer, arguments)
        if options.keep_teacher:
            teacher.save_pretrained(options.keep_teacher)
            tokenizer.save_pretrained(options.keep_teacher)
    return teacher


def measure(
    arm: str,
    seed: int,
    options: argparse.Namespace,
    teacher: PreTrainedModel,
    rows: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """One student: its accuracy, and the processor seconds of its training with the teacher's part."""
    set_seed(seed)
    student = make_student(teacher, options)
    began = time.process_time()
    arguments = common_arguments(options, steps=options.steps, learning_rate=options.learning_rate, seed=seed)
    terms = ARMS[arm]
    if terms is None:
        train(student, None, labelled_rows(rows["train"]), tokenizer, arguments)
    else:
        mapping = {"layer_mapping": "copied"} if options.copy_layers and arm == "tinybert" else {}
        train(student, teacher, rows["train"], tokenizer, {**arguments, **terms, **mapping})
    seconds = time.process_time() - began
    return {"seed": seed, "accuracy": accuracy(student, rows["test"], tokenizer), "processor_seconds": seconds}


def markdown(results: Mapping[str, Any]) -> str:
    """One row an arm."""
    lines = ["| arm | accuracy | seeds | processor seconds |", "|---|---|---|---|"]
    for arm, runs in results["arms"].items():
        found = [run["accuracy"] for run in runs]
        spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
        seconds = mean(run["processor_seconds"] for run in runs)
        lines.append(f"| {arm} | {mean(found):.1f}{spread} | {len(found)} | {seconds:.0f} |")
    return "\n".join([*lines, "", f"Teacher: {results['teacher_accuracy']:.1f}"]) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="snips", help="snips, or what the demo takes: a data set's name or folder")
    parser.add_argument("--teacher", required=True, help="name or path of a classifier, or of an encoder to fine-tune")
    parser.add_argument("--teacher-steps", type=int, default=0, help="fine-tune it first, on all labels; 0: as it is")
    parser.add_argument("--keep-teacher", type=Path, help="save the fine-tuned teacher here")
    parser.add_argument("--labels-per-class", type=int, help="keep so many labels, and the text of all rows")
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--student-width", type=int, default=192, help=f"a multiple of {HEADS}, its heads, and of 48")
    parser.add_argument(
        "--copy-layers", nargs="+", type=int, help="layers of the teacher, from 0, in place of random ones"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of every arm, over all its stages")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as TrainingArguments(bf16=True)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    return parser.parse_args()


def main() -> None:
    """Measures, and writes the results after every run."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    corpus, tokenizer = load_corpus(options.data), AutoTokenizer.from_pretrained(options.teacher)
    train_rows, test = (encode(part, tokenizer, max_length=MAX_LENGTH) for part in (corpus.train, corpus.test))
    # Not where they lie on this machine.
    asked = vars(options) | {name: Path(getattr(options, name)).name for name in ("data", "teacher", "out")}
    asked["keep_teacher"] = options.keep_teacher and options.keep_teacher.name
    with tempfile.TemporaryDirectory() as options.folder:
        teacher = make_teacher(options, corpus, train_rows, tokenizer)
        results: dict[str, Any] = {
            "environment": environment(device=options.device),
            "options": asked,
            "teacher_accuracy": accuracy(teacher, test, tokenizer),
            "arms": {arm: [] for arm in options.arms},
        }
        for seed in options.seeds:
            kept = train_rows
            if options.labels_per_class is not None:
                few = keep_labels(corpus, per_class=options.labels_per_class, seed=seed)
                kept = encode(few, tokenizer, max_length=MAX_LENGTH)
            for arm in options.arms:
                run = measure(arm, seed, options, teacher, {"train": kept, "test": test}, tokenizer)
                results["arms"][arm].append(run)
                print(f"seed {seed}, {arm}: {run['accuracy']:.1f}, {run['processor_seconds']:.0f} s", flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), end="")


if __name__ == "__main__":
    main()
