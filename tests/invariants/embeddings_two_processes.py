"""Models without a head, trained by two processes."""

import torch

from tests import tiny
from tests.invariants.steps import distil

MEAN = {"student": "pooled(mean)@hidden[-1]"}
EACH_TEXT = {"matches": [{"name": "embedding", **MEAN, "loss": "hidden_mse"}]}
ALL_TEXTS = {"matches": [{"name": "relations", **MEAN, "loss": "rkd_distance"}]}
TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
# name -> (the student, the recipe, further arguments, the splits that take the same steps)
CASES = {
    "distilbert": ("distilbert", EACH_TEXT, {}, ((4, 1), (2, 2))),
    "bert, whose pooler nothing reads": ("bert", EACH_TEXT, {}, ((2, 2),)),
    "bert, checkpointed": (
        "bert",
        EACH_TEXT,
        {"activation_checkpointing": True, "ddp_find_unused_parameters": True},
        ((4, 1),),
    ),
    "bert, all texts of the batch": ("bert", ALL_TEXTS, {}, ((4, 1),)),
    "t5-encoder": ("t5-encoder", EACH_TEXT, {}, ((4, 1),)),
}


def train(case, output_dir, batch, accumulation, **changes):
    """The gradients and logs of a run."""
    student, recipe, options, _ = CASES[case]
    rows = [*tiny.texts(), *tiny.texts()][:TRAINING_ROWS]
    models = tiny.embedding_pair(student)
    run = distil(models, rows, output_dir, batch, accumulation, distillation_config=recipe, **options, **changes)
    return {"gradients": run.gradients, "logs": run.logs}


def save_results(path):
    results = {
        f"{case}, {batch}x{accumulation}": train(case, f"{path}.output", batch, accumulation, ddp_backend="gloo")
        for case, (*_, splits) in CASES.items()
        for batch, accumulation in splits
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
