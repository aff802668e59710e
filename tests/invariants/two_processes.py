"""Every head trained and evaluated by each of two processes over gloo."""

import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import recorded, step_options, without_labels

TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
EVALUATION_ROWS = 7
LABELLED = (2, 3, 5, 9)
# Batch per process and accumulation: with two processes 8 rows a step, in one or in two micro-batches each.
WHOLE, HALVES = (4, 1), (2, 2)
# A head for each way to count labels has all combinations; the others the one where processes differ the most.
ALL_WAYS = ("bert", "bert-tokens", "llama", "t5", "wav2vec2-ctc-sum")
CASES = {
    (name, labels): (WHOLE, HALVES) if name in ALL_WAYS else (HALVES,)
    for name in tiny.ZOO
    for labels in ("all labelled", "some labelled")
    if name in ALL_WAYS or labels == "some labelled"
}


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
    for (name, labels), splits in CASES.items():
        for batch, accumulation in splits:
            results[f"{name}, {labels}, {batch}x{accumulation}"] = train_and_evaluate(
                name, labels, batch, accumulation, f"{path}.output", ddp_backend="gloo"
            )
    resumed = resumed_losses(f"{path}.resumed")
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"resumed": resumed, "processes": torch.distributed.get_world_size()}, path)
