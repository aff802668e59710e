"""`compute_metrics_for` where it is used: in the evaluation of a Trainer."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_distill.metrics import compute_metrics_for, preprocess_logits_for
from hf_distill.metrics.tasks import TASKS
from tests.tiny import ZOO, pair, rows
from tests.training import SILENT, make_trainer

MODELS = {
    "single_label_classification": ("bert", "vit"),
    "multi_label_classification": ("bert-multi-label",),
    "regression": ("bert-regression",),
    "token_classification": ("bert-tokens",),
    "question_answering": ("bert-spans",),
    "multiple_choice": ("bert-choices",),
    "masked_lm": ("bert-masked",),
    "causal_lm": ("llama", "gpt2"),
    "seq2seq_lm": ("t5", "bart", "whisper"),
}
CASES = [(task, name) for task, names in MODELS.items() for name in names]
LANGUAGE_MODELS = [(task, name) for task, name in CASES if task.endswith("_lm")]


def evaluate(folder, task, name, **options):
    _, model = pair(name)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**SILENT, "per_device_eval_batch_size": 3, **options}),
        eval_dataset=rows(ZOO[name][1]),
        compute_metrics=compute_metrics_for(task),
        preprocess_logits_for_metrics=preprocess_logits_for(task),
    )
    return trainer.evaluate()


def test_every_task_is_tried():
    assert set(MODELS) == set(TASKS)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_scores_do_not_depend_on_the_evaluation_batches(task, name, tmp_path):
    in_threes = evaluate(tmp_path, task, name)
    at_once = evaluate(tmp_path, task, name, per_device_eval_batch_size=8)
    scores = {key: value for key, value in in_threes.items() if not key.endswith(("loss", "time", "second"))}
    assert {f"eval_{key}" for key in ("accuracy", "mse", "exact_match")} & set(scores)
    assert scores == {key: pytest.approx(at_once[key], rel=1e-5) for key in scores}


@pytest.mark.parametrize(("task", "name"), LANGUAGE_MODELS)
def test_perplexity_is_the_exponential_of_the_models_own_loss(task, name, tmp_path):
    _, model = pair(name)
    with torch.no_grad():  # not `eval_loss`: for GPT-2 Trainer divides by a count that includes the first tokens
        loss = model.eval()(**default_data_collator(rows(ZOO[name][1]))).loss.item()
    assert evaluate(tmp_path, task, name)["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_accuracy_is_that_of_the_models_answers(tmp_path):
    _, model = pair("bert")
    batch = default_data_collator(rows("sequence"))
    labels = batch.pop("labels")
    with torch.no_grad():
        right = (model.eval()(**batch).logits.argmax(-1) == labels).float().mean().item()
    assert evaluate(tmp_path, "single_label_classification", "bert")["eval_accuracy"] == pytest.approx(right)


def test_rows_without_a_label_do_not_enter_the_scores_of_a_distillation(tmp_path):
    data = rows("sequence")
    compute = compute_metrics_for("single_label_classification")
    labelled = make_trainer(tmp_path, eval_dataset=data[:5], compute_metrics=compute).evaluate()
    partly = [*data[:5], *({**row, "labels": None} for row in data[5:])]
    mixed = make_trainer(tmp_path, eval_dataset=partly, compute_metrics=compute).evaluate()
    for score in ("eval_accuracy", "eval_f1_macro", "eval_recall_weighted"):
        assert mixed[score] == pytest.approx(labelled[score])
