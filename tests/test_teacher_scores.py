"""The teacher put through Trainer's evaluation: its scores, what the student retains, and stopping by that."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import BertModel, DataCollatorForLanguageModeling, TrainerCallback

from hf_distill import (
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
)
from hf_distill.metrics import compute_metrics_for, preprocess_logits_for
from hf_distill.metrics.direction import retention
from hf_distill.report.results import STUDENT, TEACHER, ModelResult
from hf_distill.teacher_scores import teacher_metrics
from hf_distill.teachers import LocalTeacher, TopKTeacher
from tests.report.report_cases import quality, report
from tests.tiny import ZOO, bert, pair, rows, tokenizer
from tests.training import arguments, make_trainer, plain_trainer

TASKS = {
    "sequence": "single_label_classification",
    "multi_label": "multi_label_classification",
    "number": "regression",
    "tokens": "token_classification",
    "spans": "question_answering",
    "choices": "multiple_choice",
    "masked": "masked_lm",
    "causal": "causal_lm",
    "translation": "seq2seq_lm",
    "features": "seq2seq_lm",
    "image": "single_label_classification",
    "sound": "single_label_classification",
}
SCORED = [name for name, (_, kind) in ZOO.items() if kind in TASKS]


def scoring(name):
    task = TASKS[ZOO[name][1]]
    return {"compute_metrics": compute_metrics_for(task), "preprocess_logits_for_metrics": preprocess_logits_for(task)}


def of_teacher(metrics, prefix="eval"):
    start = f"{prefix}_teacher_"
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}


@pytest.mark.parametrize("name", SCORED)
def test_the_teachers_scores_are_those_of_plain_trainer(name, tmp_path):
    student, teacher = pair(name)
    ours = make_trainer(tmp_path, name, models=(student, teacher), evaluate_teacher=True, **scoring(name)).evaluate()
    plain = plain_trainer(tmp_path, name, model=teacher, **scoring(name)).evaluate()
    scores = of_teacher(ours)
    assert scores
    for metric, score in scores.items():
        assert score == pytest.approx(plain[f"eval_{metric}"], rel=1e-5, nan_ok=True)
        own = ours[f"eval_{metric}"]
        whole, part = (own, score) if metric in ("mse", "perplexity") else (score, own)
        assert ours.get(f"eval_retention_{metric}") == (part / whole if whole > 0 else None)
    assert "eval_teacher_loss" not in ours
    ours_alone = {key for key in {*ours} - {*plain} if "_teacher_" not in key and "_retention_" not in key}
    assert ours_alone == {"eval_kd"} | ({"eval_agreement"} if name != "bert-regression" else set())


class Counting(LocalTeacher):
    calls = 0

    def __call__(self, inputs, **asked):
        self.calls += 1
        return super().__call__(inputs, **asked)


def counted(tmp_path, data=None, **options):
    student, teacher = pair("bert")
    teacher = Counting(teacher)
    data = rows("sequence") if data is None else data
    trainer = make_trainer(
        tmp_path, models=(student, teacher), eval_dataset=data, evaluate_teacher=True, **scoring("bert"), **options
    )
    return trainer, teacher


def calls_of(trainer, teacher, *args, **kwargs):
    before = teacher.calls
    return trainer.evaluate(*args, **kwargs), teacher.calls - before


def test_a_set_is_scored_once_and_another_or_a_changed_one_anew(tmp_path):
    data = rows("sequence")
    trainer, teacher = counted(tmp_path, data)
    first, calls = calls_of(trainer, teacher)
    assert calls == 4  # 2 batches beside the student's, and 2 of the teacher's own pass
    again, calls = calls_of(trainer, teacher)
    assert calls == 2
    assert of_teacher(again) == of_teacher(first)
    _, calls = calls_of(trainer, teacher, [*data])
    assert calls == 2
    other, calls = calls_of(trainer, teacher, rows("sequence", seed=5))
    assert calls == 4
    assert calls_of(trainer, teacher)[1] == 2
    data[3] = {**data[3], "labels": (data[3]["labels"] + 1) % 3}
    changed, calls = calls_of(trainer, teacher)
    assert calls == 4
    assert len({scores["eval_teacher_accuracy"] for scores in (first, other, changed)}) > 1
    both, calls = calls_of(trainer, teacher, {"a": data, "b": rows("sequence", seed=5)})
    assert calls == 4
    assert of_teacher(both, "eval_a") == of_teacher(changed)
    assert of_teacher(both, "eval_b") == of_teacher(other)


def test_another_teacher_or_metric_is_scored_anew(tmp_path):
    trainer, teacher = counted(tmp_path)
    trainer.evaluate()
    trainer.compute_metrics = lambda prediction: {"rows": len(prediction.label_ids)}
    assert of_teacher(trainer.evaluate()) == {"rows": 8}
    trainer.compute_metrics = scoring("bert")["compute_metrics"]
    assert calls_of(trainer, teacher)[1] == 4
    trainer.teacher = another = Counting(teacher.model)
    assert calls_of(trainer, another)[1] == 4
    with torch.no_grad():
        other = bert(hidden=48, layers=3)
        other.classifier.bias[0] += 100
    trainer.teacher = LocalTeacher(other)
    labels = [int(row["labels"]) for row in rows("sequence")]
    assert of_teacher(trainer.evaluate())["accuracy"] == labels.count(0) / 8


def test_labels_in_another_order_are_the_students_in_both_scores(tmp_path):
    names = ("red", "green", "blue")

    def named(model, order):
        model.config.id2label = {index: names[place] for index, place in enumerate(order)}
        model.config.label2id = {name: index for index, name in model.config.id2label.items()}
        return model

    student, teacher = pair("bert")
    plain = plain_trainer(tmp_path, model=teacher, **scoring("bert")).predict(rows("sequence")).predictions
    trainer = make_trainer(
        tmp_path, models=(named(student, (2, 0, 1)), named(teacher, (0, 1, 2))), evaluate_teacher=True,
        **scoring("bert"),
    )  # fmt: skip
    labels = np.array([int(row["labels"]) for row in rows("sequence")])
    meant = np.array([2, 0, 1])[labels]
    assert trainer.evaluate()["eval_teacher_accuracy"] == (plain.argmax(-1) == meant).mean()


def test_the_teacher_reads_columns_of_its_own(tmp_path):
    own = rows("sequence", seed=9)
    data = [
        {**row, **{f"teacher_{name}": other[name] for name in ("input_ids", "attention_mask")}}
        for row, other in zip(rows("sequence"), own, strict=True)
    ]
    as_teacher_reads = [{**other, "labels": row["labels"]} for row, other in zip(data, own, strict=True)]
    student, teacher = pair("bert")
    trainer = make_trainer(
        tmp_path, models=(student, teacher), train_dataset=data, eval_dataset=data, evaluate_teacher=True,
        compute_metrics=scores_of_logits,
    )  # fmt: skip
    expected = plain_trainer(tmp_path, model=teacher, compute_metrics=scores_of_logits).evaluate(as_teacher_reads)
    assert trainer.evaluate()["eval_teacher_mean"] == pytest.approx(expected["eval_mean"], rel=1e-5)


def scores_of_logits(prediction):
    return {"mean": float(np.abs(prediction.predictions).mean()), "kind": "text", "list": [1], "flag": True}


def test_a_students_own_base_is_scored_with_the_adapters_off(tmp_path):
    student, _ = pair("bert")
    expected = plain_trainer(tmp_path, model=student, compute_metrics=scores_of_logits).evaluate()["eval_mean"]
    trainer = make_trainer(
        tmp_path, model=student, teacher_model=None, peft_config=LoraConfig(r=2, init_lora_weights=False),
        evaluate_teacher=True, compute_metrics=scores_of_logits,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_teacher_mean"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_mean"] != pytest.approx(expected, rel=1e-3)
    assert of_teacher(metrics).keys() == {"mean"}, "a text, a list and a truth value are no scores"


def test_metrics_formed_batch_by_batch_see_one_model_at_a_time(tmp_path):
    kept = []

    def metrics(prediction, compute_result):
        kept.append(np.asarray(prediction.predictions.argmax(-1) == prediction.label_ids))
        if not compute_result:
            return {}
        right = np.concatenate(kept)
        kept.clear()
        return {"accuracy": right.mean(), "rows": len(right)}

    whole = make_trainer(tmp_path, evaluate_teacher=True, **scoring("bert")).evaluate()
    parts = make_trainer(tmp_path, evaluate_teacher=True, batch_eval_metrics=True, compute_metrics=metrics).evaluate()
    for name in ("accuracy", "teacher_accuracy", "retention_accuracy"):
        assert parts.get(f"eval_{name}") == whole.get(f"eval_{name}")
    assert (parts["eval_rows"], parts["eval_teacher_rows"]) == (8, 8)


def test_metrics_of_batches_kept_apart_get_the_teachers_apart_too(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append([part.shape for part in prediction.predictions])
        return {"batches": len(prediction.predictions)}

    make_trainer(
        tmp_path, evaluate_teacher=True, eval_do_concat_batches=False, eval_accumulation_steps=1,
        compute_metrics=metrics,
    ).evaluate()  # fmt: skip
    assert shapes == [[(4, 3), (4, 3)]] * 2


def test_predictions_of_the_teacher_have_the_form_of_the_students(tmp_path):
    forms = []

    def metrics(prediction):
        forms.append(len(prediction.predictions))
        assert isinstance(prediction.predictions, tuple)
        return {"mean": float(prediction.predictions[0].mean())}

    make_trainer(tmp_path, "t5", evaluate_teacher=True, compute_metrics=metrics).evaluate()
    assert forms == [2, 2]


def test_masks_drawn_anew_are_the_same_for_both_and_the_training_draws_as_without(tmp_path):
    labels, weights = [], []

    def metrics(prediction):
        labels.append(prediction.label_ids)
        return {"accuracy": 0.5}

    def texts(features):
        features = [{k: v.tolist() for k, v in row.items() if k != "labels"} for row in features]
        return DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)(features)

    for asked in (True, False):
        models = pair("bert-masked")
        models[0].bert.embeddings.dropout.p = 0.1
        trainer = make_trainer(
            tmp_path, "bert-masked", models=models, data_collator=texts, compute_metrics=metrics,
            evaluate_teacher=asked, eval_strategy="steps", eval_steps=1, max_steps=3,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
    with_teacher, without = labels[:6], labels[6:]
    for student, teacher, alone in zip(with_teacher[::2], with_teacher[1::2], without, strict=True):
        np.testing.assert_array_equal(student, teacher)
        np.testing.assert_array_equal(student, alone)
    assert not np.array_equal(with_teacher[0], with_teacher[2])
    assert torch.equal(*weights)


def test_predict_compares_with_the_teacher_too(tmp_path):
    trainer = make_trainer(tmp_path, evaluate_teacher=True, **scoring("bert"))
    assert of_teacher(trainer.predict(rows("sequence")).metrics, "test") == of_teacher(trainer.evaluate())


def test_rows_without_labels_have_no_scores(tmp_path):
    data = [{name: value for name, value in row.items() if name != "labels"} for row in rows("sequence")]
    trainer, teacher = counted(tmp_path)
    metrics, calls = calls_of(trainer, teacher, data)
    assert calls == 2
    assert of_teacher(metrics) == {}


def test_a_progress_bar_sees_the_students_batches_alone(tmp_path):
    class Bar(TrainerCallback):
        steps = 0

        def on_prediction_step(self, *args, **kwargs):
            self.steps += 1

    trainer, _ = counted(tmp_path, callbacks=[bar := Bar()])
    trainer.evaluate()
    assert bar.steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_metrics": None}, "without compute_metrics.*compute_metrics_for"),
        ({"teacher_model": None, "kd_weight": 0.0, "task_weight": 1.0}, "there is no teacher. Pass teacher_model"),
        ({"prediction_loss_only": True}, "Drop prediction_loss_only"),
        ({"include_for_metrics": ["loss"]}, "'loss' in include_for_metrics"),
    ],
)
def test_where_nothing_would_be_compared_it_is_refused(options, message, tmp_path):
    options = {**scoring("bert"), **options}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, evaluate_teacher=True, **options)


def test_generated_text_is_refused(tmp_path):
    args = arguments(tmp_path, Seq2SeqDistillationTrainingArguments, evaluate_teacher=True, predict_with_generate=True)
    with pytest.raises(ValueError, match="predict_with_generate=True scores generated text"):
        make_trainer(tmp_path, "t5", cls=Seq2SeqDistillationTrainer, args=args, **scoring("t5"))


def test_a_teacher_without_some_of_the_labels_tokens_is_refused(tmp_path):
    words = [f"w{index}" for index in range(92)]
    tokenizers = {"processing_class": tokenizer(words), "teacher_processing_class": tokenizer(words[:90])}
    with pytest.raises(ValueError, match="the teacher does not have all of them"):
        make_trainer(tmp_path, "bert-masked", evaluate_teacher=True, **tokenizers, **scoring("bert-masked"))


def test_students_without_a_head_are_refused(tmp_path):
    student, teacher = (BertModel(model.config) for model in pair("bert"))
    data = [{name: value for name, value in row.items() if name != "labels"} for row in rows("sequence")]
    with pytest.raises(ValueError, match="without a head has no scores"):
        make_trainer(
            tmp_path, models=(student, teacher), train_dataset=data, eval_dataset=data, evaluate_teacher=True,
            task_weight=0.0, compute_metrics=scores_of_logits, kd_weight=0.0, hidden_weight=1.0,
        )  # fmt: skip


def test_a_teacher_of_few_logits_is_refused(tmp_path):
    student, teacher = pair("llama")
    with pytest.raises(ValueError, match="most likely classes alone"):
        make_trainer(
            tmp_path, "llama", models=(student, TopKTeacher(LocalTeacher(teacher), k=3)), evaluate_teacher=True,
            temperature=1.0, **scoring("llama"),
        )  # fmt: skip


SHARES = [
    (0.45, 0.9, False, 0.5),
    (0.99, 0.9, False, 1.1),
    (0.0, 0.5, False, 0.0),
    (-0.1, 0.5, False, -0.2),
    (0.5, 0.0, False, None),
    (0.5, -0.5, False, None),
    (-0.5, -0.5, False, None),
    (8.0, 4.0, True, 0.5),
    (2.0, 4.0, True, 2.0),
    (0.0, 4.0, True, None),
    (-1.0, 4.0, True, None),
    (0.5, 0.0, True, None),
    (-1.0, -4.0, True, None),
    (math.nan, 0.5, False, None),
    (0.5, math.nan, False, None),
    (0.5, math.inf, True, None),
]


@pytest.mark.parametrize(("student", "teacher", "smaller", "expected"), SHARES)
def test_retention_is_a_share_of_the_teachers_score(student, teacher, smaller, expected):
    assert retention(student, teacher, smaller_is_better=smaller) == (expected and pytest.approx(expected))


@pytest.mark.parametrize(("student", "teacher", "smaller", "expected"), SHARES)
def test_a_report_and_an_evaluation_give_the_same_share(student, teacher, smaller, expected):
    name = "perplexity" if smaller else "pearson"
    metrics = teacher_metrics({f"eval_{name}": student}, {name: teacher}, "eval")
    found = report(
        ModelResult("teacher", TEACHER, quality=quality(teacher, metric=name)),
        ModelResult("student", STUDENT, quality=quality(student, metric=name)),
        metric=name, higher=not smaller,
    )  # fmt: skip
    wanted = expected and pytest.approx(expected)
    assert metrics.get(f"eval_retention_{name}") == wanted
    assert found.retention(found.model(STUDENT)) == wanted
    assert found.to_dict()["models"][1]["retention"] == wanted
    assert None not in metrics.values()


def test_what_is_undefined_is_left_out():
    student = {"eval_f1": 0.5, "eval_pearson": 0.5, "eval_perplexity": 20.0, "eval_kd": 1.0}
    teacher = {"f1": 0.0, "pearson": math.nan, "perplexity": 10.0}
    metrics = teacher_metrics(student, teacher, "eval")
    assert metrics == pytest.approx(
        {"eval_teacher_f1": 0, "eval_teacher_pearson": math.nan, "eval_teacher_perplexity": 10}
        | {"eval_retention_perplexity": 0.5},
        nan_ok=True,
    )
