"""What changes from item to item, by two processes."""

import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.objective_cases import EXACT_TEMPERATURES, WEIGHTS, weighted_rows
from tests.invariants.steps import recorded, step_options

SPLITS = ((2, 2),)
WHOLE_BATCH = ((4, 1),)  # what compares the rows of a batch is the same for any number of processes, not of batches
TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
SEVERAL_STEPS = {"num_train_epochs": 2}
CASES = {
    "weights and entropy": ("bert", {"item_weights": WEIGHTS["all"], "temperature": EXACT_TEMPERATURES["entropy"]}),
    "weights, fused": ("llama", {"item_weights": WEIGHTS["all"], "temperature": EXACT_TEMPERATURES["loss"]}),
    "weights, jsd": ("t5", {"item_weights": WEIGHTS["groups"], "kd_loss": "jsd", "kd_options": {"beta": 0.1}}),
    "correctness, dkd": ("bert-tokens", {"item_weights": WEIGHTS["correctness"], "kd_loss": "dkd"}),
    "spans": (
        "bert-spans",
        {"item_weights": WEIGHTS["confidence"], "temperature": EXACT_TEMPERATURES["disagreement"]},
    ),
    "learned": ("bert", {"temperature": EXACT_TEMPERATURES["learned"], **SEVERAL_STEPS}),
    "learned per item": ("llama", {"temperature": EXACT_TEMPERATURES["instance"], **SEVERAL_STEPS}),
    "learned, off at first": (
        "bert",
        {
            "distillation_config": {
                "task": {"weight": 0.5},
                "logits": {"active": [0.5, 1], "temperature": EXACT_TEMPERATURES["learned"]},
            },
            **SEVERAL_STEPS,
        },
    ),
    "uncertainty": ("bert", {"loss_balance": "uncertainty", "hidden_weight": 0.5, **SEVERAL_STEPS}),
    "magnitude": ("llama", {"loss_balance": "magnitude", "hidden_weight": 0.5, **SEVERAL_STEPS}),
    "dist": ("bert", {"kd_loss": "dist"}),
    "flsw": ("bert", {"temperature": "flsw"}),
    "cwsm": ("llama", {"temperature": "cwsm"}),
}
ON_WHOLE_BATCHES = ("dist", "flsw", "cwsm")


def splits_of(case):
    if case in ON_WHOLE_BATCHES:
        return WHOLE_BATCH
    return WHOLE_BATCH + SPLITS if case == "weights, fused" else SPLITS


def train(case, batch, accumulation, output_dir, **changes):
    """The gradients and logs of a run."""
    name, settings = CASES[case]
    student, teacher = tiny.pair(name)
    args = DistillationTrainingArguments(**step_options(output_dir, batch, accumulation, **settings, **changes))
    rows = weighted_rows(name, TRAINING_ROWS)
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=rows, eval_dataset=rows[:7]
    )
    run = recorded(trainer)
    return {"gradients": run.gradients, "logs": run.logs, "metrics": trainer.evaluate()}


def save_results(path):
    results = {
        f"{case}, {batch}x{accumulation}": train(case, batch, accumulation, f"{path}.output", ddp_backend="gloo")
        for case in CASES
        for batch, accumulation in splits_of(case)
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
