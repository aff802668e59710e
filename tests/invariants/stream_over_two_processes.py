"""A stream that the main process deals out in batches."""

import torch
from torch.utils.data import IterableDataset

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import step_options
from tests.training import logged

NAMES = ("bert", "bert-multi-label", "bert-regression", "wav2vec2-ctc", "bert-spans")
# Rows of the first and of the second rank's part of a step.
WITHOUT_LABELS = {"first": (0, 1), "second": (4, 6)}


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def rows_of(name, part):
    rows = tiny.rows(tiny.ZOO[name][1])
    for i in WITHOUT_LABELS[part]:
        rows[i] |= {key: None for key in ("labels", "start_positions", "end_positions") if key in rows[i]}
    return rows


def train_and_evaluate(name, part, batch, output_dir, **changes):
    """The logged terms of a step on 8 rows, and the metrics on 7, of which the last batch repeats one."""
    student, teacher = tiny.pair(name)
    rows = rows_of(name, part)
    args = DistillationTrainingArguments(**step_options(output_dir, batch, 1, max_steps=1, **changes))
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=Stream(rows), eval_dataset=Stream(rows[:7])
    )
    trainer.train()
    terms = {key: logged(trainer, key) for key in ("loss", "loss_task", "loss_kd", "labelled_fraction", "grad_norm")}
    return terms | {key: value for key, value in trainer.evaluate().items() if key in ("eval_loss", "eval_kd")}


def save_results(path):
    results = {
        f"{name}, {part}": train_and_evaluate(name, part, 4, f"{path}.output", ddp_backend="gloo")
        for name in NAMES
        for part in WITHOUT_LABELS
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
