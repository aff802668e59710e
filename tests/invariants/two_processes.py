"""`python -m tests.invariants.two_processes FILE`: every head trained and evaluated by two processes over gloo.

A fresh interpreter forks them, so that they inherit neither threads nor `accelerate`'s state from a test run.
"""

import gc
import sys

import torch
from accelerate import debug_launcher

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import recorded, step_options, without_labels

# Batch per process and accumulation: with two processes 8 rows a step, in one and in two micro-batches each.
SPLITS = ((4, 1), (2, 2))
TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
EVALUATION_ROWS = 7
LABELLED = (2, 3, 5, 9)
CASES = [(name, labels) for name in tiny.ZOO for labels in ("all labelled", "some labelled")]


def rows_of(name, labels):
    rows = tiny.rows(tiny.ZOO[name][1], count=TRAINING_ROWS)
    return (
        rows if labels == "all labelled" else [r if i in LABELLED else without_labels(r) for i, r in enumerate(rows)]
    )


def train_and_evaluate(name, labels, batch, accumulation, output_dir, **changes):
    """What one case leaves behind: gradients and logs of its steps, and the metrics of the trained student."""
    student, teacher = tiny.pair(name)
    rows = rows_of(name, labels)
    # 2 rows at a time: with one process the last batch has 1 row, with two it repeats one.
    options = step_options(output_dir, batch, accumulation, per_device_eval_batch_size=2, **changes)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationTrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows[:EVALUATION_ROWS],
    )
    before = trainer.evaluate()
    run = recorded(trainer)
    return {"gradients": run.gradients, "logs": run.logs, "metrics": [before, trainer.evaluate()]}


def resumed_losses(output_dir):
    """The losses of steps that repeat rows at the end, uninterrupted and resumed before it."""
    found = []
    for checkpoint in (None, f"{output_dir}/checkpoint-1"):
        student, teacher = tiny.pair("bert")
        options = step_options(output_dir, 2, 1, ddp_backend="gloo", save_strategy="steps", save_steps=1)
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationTrainingArguments(**options),
            train_dataset=rows_of("bert", "all labelled"),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return found


def save_results(path):
    results = {}
    for name, labels in CASES:
        for batch, accumulation in SPLITS:
            results[f"{name}, {labels}, {batch}x{accumulation}"] = train_and_evaluate(
                name, labels, batch, accumulation, f"{path}.output", ddp_backend="gloo"
            )
    resumed = resumed_losses(f"{path}.resumed")
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"resumed": resumed, "processes": torch.distributed.get_world_size()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # else each training collects garbage over all that was imported
    debug_launcher(save_results, args=(sys.argv[1],), num_processes=2)
