"""Evaluation and prediction: `Trainer`'s own, with the teacher's view beside them."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_distill import Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from tests.tiny import ZOO, pair, rows, tokenizer
from tests.training import arguments, logged, make_trainer, plain_trainer


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", [*ZOO])
def test_predictions_are_plain_trainers(name, labelled, tmp_path):
    data = rows(ZOO[name][1], count=6)
    if not labelled:
        if ZOO[name][1] in ("translation", "features"):
            data = [{**row, "decoder_input_ids": torch.arange(1, 6)} for row in data]
        data = [
            {k: v for k, v in row.items() if k not in ("labels", "start_positions", "end_positions")} for row in data
        ]
    ours = make_trainer(tmp_path, name).predict(data)
    plain = plain_trainer(tmp_path, name).predict(data)
    for actual, expected in ((ours.predictions, plain.predictions), (ours.label_ids, plain.label_ids)):
        as_tuples = [value if isinstance(value, tuple) else (value,) for value in (actual, expected)]
        for one, other in zip(*as_tuples, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6) if other is not None else None
            assert (one is None) == (other is None)
    assert ("test_loss" in ours.metrics) == ("test_loss" in plain.metrics) == labelled
    assert ours.metrics["test_kd"] > 0


def test_eval_on_start_reports_the_untrained_student(tmp_path):
    trainer = make_trainer(tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=2)
    untrained = make_trainer(tmp_path).evaluate()
    trainer.train()
    for name in ("eval_loss", "eval_kd", "eval_agreement"):
        assert logged(trainer, name)[0] == pytest.approx(untrained[name], rel=1e-6)
        assert len(logged(trainer, name)) == 2


def test_compute_metrics_and_preprocess_logits_see_what_plain_trainers_do(tmp_path):
    seen = {}

    def options(who):
        def classes(logits, labels):
            assert logits.shape == (4, 3)
            return logits.argmax(-1)

        def metrics(prediction):
            seen[who] = prediction
            return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

        return {"compute_metrics": metrics, "preprocess_logits_for_metrics": classes}

    ours = make_trainer(tmp_path, **options("ours"), include_for_metrics=["inputs", "loss"]).evaluate()
    plain = plain_trainer(tmp_path, **options("plain"), include_for_metrics=["inputs", "loss"]).evaluate()
    assert ours["eval_accuracy"] == plain["eval_accuracy"]
    for name in ("predictions", "label_ids", "inputs"):
        np.testing.assert_array_equal(getattr(seen["ours"], name), getattr(seen["plain"], name))
    np.testing.assert_allclose(seen["ours"].losses, seen["plain"].losses, rtol=1e-6)


def test_metrics_can_be_formed_batch_by_batch(tmp_path):
    calls = []

    def metrics(prediction, compute_result):
        calls.append((len(prediction.label_ids), compute_result))
        return {"rows": sum(count for count, _ in calls)} if compute_result else {}

    result = make_trainer(tmp_path, compute_metrics=metrics, batch_eval_metrics=True).evaluate()
    assert calls == [(4, False), (4, True)]
    assert result["eval_rows"] == 8
    assert result["eval_kd"] == pytest.approx(make_trainer(tmp_path).evaluate()["eval_kd"], rel=1e-6)


def test_the_best_model_by_agreement_with_the_teacher_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_agreement",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=4,
        learning_rate=0.05,
        kd_weight=1.0,
        task_weight=0.0,
    )
    trainer.train()
    agreements = logged(trainer, "eval_agreement")
    assert trainer.state.best_metric == max(agreements) > min(agreements)
    assert trainer.evaluate()["eval_agreement"] == max(agreements)
    best = logged(trainer, "eval_kd")[agreements.index(max(agreements))]
    assert logged(trainer, "eval_kd")[-1] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_generated_predictions_are_plain_trainers(smoothing, tmp_path):
    def collator(features):
        return DataCollatorForSeq2Seq(tokenizer(), model=pair("t5")[0])(
            [{k: v.tolist() for k, v in row.items()} for row in features]
        )

    options = {
        "predict_with_generate": True,
        "generation_max_length": 6,
        "label_smoothing_factor": smoothing,
        "per_device_eval_batch_size": 8,
    }

    def metrics(prediction):
        return {"length": float(prediction.predictions.shape[1])}

    args = arguments(tmp_path, Seq2SeqDistillationTrainingArguments, **options)
    trainer = make_trainer(
        tmp_path, "t5", cls=Seq2SeqDistillationTrainer, args=args, data_collator=collator, compute_metrics=metrics
    )
    plain = plain_trainer(
        tmp_path,
        "t5",
        cls=Seq2SeqTrainer,
        args_cls=Seq2SeqTrainingArguments,
        data_collator=collator,
        compute_metrics=metrics,
        **options,
    )
    data = rows("translation")
    ours, expected = trainer.predict(data), plain.predict(data)
    np.testing.assert_array_equal(ours.predictions, expected.predictions)
    np.testing.assert_array_equal(ours.label_ids, expected.label_ids)
    assert ours.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    assert (ours.predictions[:, 1:6] > 0).any()
    assert not ours.predictions[:, 6:].any()
    assert ours.metrics["test_length"] == expected.metrics["test_length"]
    assert ours.metrics["test_kd"] > 0
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0
