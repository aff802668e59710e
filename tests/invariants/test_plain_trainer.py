"""With the task alone, one process and no accumulation, `DistillationTrainer` is `Trainer`, bit for bit."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import with_dropout
from tests.training import SILENT

# What a plan of training has: shuffling, five steps over one epoch and a quarter, decay, clipping, a schedule.
PLAN = {
    **SILENT,
    "train_sampling_strategy": "random",
    "max_steps": 5,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}
HEADS = [
    "bert",
    "bert-tokens",
    "bert-masked",
    "bert-spans",
    "llama",
    "vit",
    "t5",
    "distilbert",
    "bart",
    "wav2vec2-ctc",
]
TASK_ALONE = {"task_weight": 1.0, "kd_weight": 0.0}


def student_of(name):
    return with_dropout(tiny.pair(name)[0])


def rows_of(name, count=16):
    return tiny.rows(tiny.ZOO[name][1], count=count)


def train_plainly(student, rows, output_dir, **changes):
    trainer = Trainer(student, TrainingArguments(output_dir=output_dir, **PLAN | changes), train_dataset=rows)
    trainer.train()
    return trainer


def train_the_task(student, teacher, rows, output_dir, **changes):
    args = DistillationTrainingArguments(output_dir=output_dir, **PLAN | TASK_ALONE | changes)
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=rows)
    trainer.train()
    return trainer


def assert_same_training(trainer, plain):
    """The weights are the same bits, and so are the logged losses and gradient norms."""
    weights, expected = trainer.model.state_dict(), plain.model.state_dict()
    assert [*weights] == [*expected]
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key
    for key in ("loss", "grad_norm", "learning_rate"):
        logged, plainly = ([log[key] for log in t.state.log_history if key in log] for t in (trainer, plain))
        assert logged == plainly
        assert len(logged) == PLAN["max_steps"]


def test_dropout_makes_the_comparison_random():
    """Else a difference in the use of random numbers would pass unseen."""
    for name in HEADS:
        student = student_of(name).train()
        row = {key: value[None] for key, value in rows_of(name)[0].items()}
        assert student(**row).loss != student(**row).loss, name


@pytest.mark.parametrize("name", HEADS)
def test_the_task_alone_trains_to_the_weights_of_the_plain_trainer(name, output_dir):
    plain = train_plainly(student_of(name), rows_of(name), output_dir)
    start = student_of(name).state_dict()
    assert any(not torch.equal(start[key], value) for key, value in plain.model.state_dict().items())
    _, teacher = tiny.pair(name)
    for some_teacher in (None, teacher):
        assert_same_training(train_the_task(student_of(name), some_teacher, rows_of(name), output_dir), plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # its new name is not in 5.20 yet
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"bf16": True}, {"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_trainers_options_change_nothing_in_that(name, options, output_dir):
    plain = train_plainly(student_of(name), rows_of(name), output_dir, **options)
    _, teacher = tiny.pair(name)
    assert_same_training(train_the_task(student_of(name), teacher, rows_of(name), output_dir, **options), plain)


def test_gpt2_equals_the_plain_trainer_where_that_counts_its_targets_right(output_dir):
    """`Trainer` 5.23 counts a label at position 0 for GPT-2, which no position predicts; so its loss is too small."""
    rows = rows_of("gpt2")
    unpredicted = sum(int(row["labels"][0] != -100) for row in rows[:8])
    assert unpredicted > 0
    for row in rows:
        row["labels"][0] = -100
    plain = train_plainly(student_of("gpt2"), rows, output_dir)
    assert_same_training(train_the_task(student_of("gpt2"), None, rows, output_dir), plain)

    in_order = {"train_sampling_strategy": "sequential", "max_steps": 1, "per_device_train_batch_size": 8}
    student = tiny.pair("gpt2")[0]
    rows = rows_of("gpt2", count=8)
    targets = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    plain = train_plainly(tiny.pair("gpt2")[0], rows, output_dir, **in_order)
    trainer = train_the_task(student, None, rows, output_dir, **in_order)
    losses = [t.state.log_history[0]["loss"] for t in (trainer, plain)]
    assert losses[0] / losses[1] == pytest.approx((targets + unpredicted) / targets, rel=1e-5)


def evaluators(name, output_dir):
    """A `DistillationTrainer` with all its terms, and a `Trainer`, on the same untrained student."""
    student, teacher = tiny.pair(name)
    rows = rows_of(name, count=7)
    options = {**SILENT, "output_dir": output_dir}
    ours = DistillationTrainer(
        student, DistillationTrainingArguments(**options), teacher_model=teacher, eval_dataset=rows
    )
    return ours, Trainer(tiny.pair(name)[0], TrainingArguments(**options), eval_dataset=rows)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "wav2vec2-sound"])
def test_eval_loss_is_that_of_the_plain_trainer(name, output_dir):
    ours, plain = evaluators(name, output_dir)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("name", tiny.ZOO)
def test_predict_returns_the_arrays_of_the_plain_trainer(name, output_dir):
    ours, plain = (trainer.predict(trainer.eval_dataset) for trainer in evaluators(name, output_dir))
    for arrays, expected in ((ours.predictions, plain.predictions), (ours.label_ids, plain.label_ids)):
        arrays, expected = (value if isinstance(value, tuple) else (value,) for value in (arrays, expected))
        assert len(arrays) == len(expected)
        for array, plain_array in zip(arrays, expected, strict=True):
            assert array.dtype == plain_array.dtype
            np.testing.assert_array_equal(array, plain_array)
