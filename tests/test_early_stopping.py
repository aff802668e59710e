"""Which model is the best, and when to stop: by what the student retains of its teacher, and by agreement with it."""

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import DistillationTrainingArguments
from hf_distill.metrics.direction import smaller_is_better
from tests.tiny import pair, rows
from tests.training import SILENT, logged, make_trainer, plain_trainer


@pytest.mark.parametrize("name", ["loss", "eval_kd", "perplexity", "eval_a_mse", "wer", "eval_loss_shop"])
def test_losses_and_errors_are_better_where_they_are_smaller(name):
    assert smaller_is_better(name)
    assert DistillationTrainingArguments("x", **SILENT, metric_for_best_model=name).greater_is_better is False
    kept = DistillationTrainingArguments("x", **SILENT, metric_for_best_model=name, greater_is_better=True)
    assert kept.greater_is_better is True


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "eval_agreement", "exact_match", "bleu", "emotion"])
def test_scores_are_better_where_they_are_greater(name):
    assert not smaller_is_better(name)
    assert DistillationTrainingArguments("x", **SILENT, metric_for_best_model=name).greater_is_better is True


@pytest.mark.parametrize("name", ["eval_retention_accuracy", "retention_perplexity", "eval_a_retention_hinge_loss"])
def test_more_retention_is_better_whatever_the_metric(name):
    args = DistillationTrainingArguments("x", **SILENT, metric_for_best_model=name, evaluate_teacher=True)
    assert args.greater_is_better is True


STOPPING = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "max_steps": 9,
    "load_best_model_at_end": True,
}


def test_early_stopping_on_retention_stops_where_a_sequence_says(tmp_path):
    # The second number is the teacher's, which is asked for once.
    accuracies = iter([0.40, 0.80, 0.60, 0.56, 0.58, 0.99])
    trainer = make_trainer(
        tmp_path, compute_metrics=lambda prediction: {"accuracy": next(accuracies)}, evaluate_teacher=True,
        metric_for_best_model="eval_retention_accuracy", callbacks=[EarlyStoppingCallback(2)], **STOPPING,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "eval_retention_accuracy") == pytest.approx([0.5, 0.75, 0.7, 0.725])
    assert logged(trainer, "eval_teacher_accuracy") == [0.8] * 4
    assert trainer.state.global_step == 4
    assert trainer.state.best_metric == pytest.approx(0.75)
    assert trainer.state.best_global_step == 2


def test_of_retained_perplexity_the_greatest_is_the_best(tmp_path):
    perplexities = iter([40.0, 10.0, 20.0, 30.0, 25.0])
    trainer = make_trainer(
        tmp_path, compute_metrics=lambda prediction: {"perplexity": next(perplexities)}, evaluate_teacher=True,
        metric_for_best_model="eval_retention_perplexity", **{**STOPPING, "max_steps": 4},
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "eval_retention_perplexity") == [0.25, 0.5, pytest.approx(1 / 3), 0.4]
    assert trainer.state.best_global_step == 2


class Favours(TrainerCallback):
    """Makes the student choose one class for every row, another after each step."""

    def __init__(self, classes):
        self.classes = iter(classes)

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.classifier.bias.zero_()
            model.classifier.bias[next(self.classes)] = 1000


def test_early_stopping_on_agreement_stops_where_a_sequence_says(tmp_path):
    student, teacher = pair("bert")
    chosen = plain_trainer(tmp_path, model=teacher).predict(rows("sequence")).predictions.argmax(-1)
    counts = np.bincount(chosen, minlength=3)
    least, middle, most = counts.argsort(kind="stable")
    assert counts[most] > counts[middle] or counts[middle] > counts[least]
    sequence = [least, most, middle, least, most]
    trainer = make_trainer(
        tmp_path, models=(student, teacher), metric_for_best_model="eval_agreement", learning_rate=0.0,
        callbacks=[Favours(sequence), EarlyStoppingCallback(2)], **STOPPING,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "eval_agreement") == pytest.approx([counts[index] / 8 for index in sequence[:4]])
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 2
    assert trainer.model.classifier.bias.argmax() == most
