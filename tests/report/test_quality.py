"""What a report says a model is worth, against the same numbers in other words."""

import copy
import gc
import json

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from hf_distill.metrics import compute_metrics_for
from hf_distill.metrics.scores import expected_calibration_error
from hf_distill.report.calibration import Calibration
from tests.report import quality_reference as reference
from tests.report.quick import quality, quick
from tests.test_aligned_training import BYTES, PIECES, aligned
from tests.tiny import CLASSES, VOCABULARY, ZOO, bert, embedding_pair, llama, pair, rows, texts, tokenizer
from tests.training import make_trainer, values

CLOSE = {"rel": 2e-4, "abs": 2e-5}
# A family for each head.
HEADS = {kind: name for name, (_, kind) in reversed(ZOO.items())}.values()


@pytest.mark.parametrize("name", [*ZOO])
def test_every_number_is_that_of_an_independent_computation(name):
    student, teacher = pair(name)
    data = rows(ZOO[name][1], count=7)
    report = quick(teacher, student, data, batch_size=3)
    for kind, models in (("student", (student, teacher)), ("teacher", (teacher, teacher))):
        found, sides = report.model(kind).quality, reference.all_items(name, models, data)
        assert found.items == len(sides[0][0])
        expected = {"agreement": None, "kl_to_teacher": None, "calibration_error": None}
        if ZOO[name][1] == "multi_label":
            expected = reference.of_labels(*sides[0])
        elif ZOO[name][1] != "number":
            expected = reference.of_classes(sides)
        for number, value in expected.items():
            assert getattr(found, number) == (None if value is None else pytest.approx(value, **CLOSE)), number
        for metric, value in reference.metrics(name, sides).items():
            assert found.metrics[metric] == pytest.approx(value, **CLOSE), metric
        f1, confusion = reference.by_class(name, sides)
        assert found.confusion_with_teacher == confusion
        if f1 is None:
            assert found.f1_by_class is None
        else:
            assert found.f1_by_class == pytest.approx({f"LABEL_{i}": v for i, v in enumerate(f1)})
    if report.metric is not None:
        own, other = (report.model(kind).quality.metrics[report.metric] for kind in ("student", "teacher"))
        share = own / other if report.higher_is_better else other / own
        assert report.retention(report.model("student")) == (pytest.approx(share) if other > 0 else None)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "bert-regression"])
def test_agreement_and_kl_are_those_of_an_evaluation_at_temperature_1(name, tmp_path):
    trainer = make_trainer(tmp_path, name, temperature=1.0)
    found = quality(trainer.teacher.model, trainer.model, trainer.eval_dataset)
    metrics = trainer.evaluate()
    assert found.agreement == pytest.approx(metrics["eval_agreement"], rel=1e-6)
    assert found.kl_to_teacher == pytest.approx(metrics["eval_kd"], rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "bert-multi-label", "bert-tokens", "bert-spans", "bert-choices", "vit"])
def test_rows_without_a_label_count_for_agreement_and_not_for_the_task(name):
    student, teacher = pair(name)
    data = rows(ZOO[name][1], count=6)
    targets = [label for label in reference.LABELS if label in data[0]]
    mixed = [{k: None if i % 2 and k in targets else v for k, v in row.items()} for i, row in enumerate(data)]
    found, labelled = quality(teacher, student, mixed), quality(teacher, student, data[::2])
    assert found.metrics == pytest.approx(labelled.metrics)
    assert found.f1_by_class == pytest.approx(labelled.f1_by_class)
    assert found.calibration_error == pytest.approx(labelled.calibration_error, abs=1e-6)
    if name == "bert-tokens":
        assert found.items > labelled.items
    else:
        whole = quality(teacher, student, data)
        assert (found.items, found.agreement) == (6, pytest.approx(whole.agreement))
        assert (found.labelled, whole.labelled) == (3, 6)
        assert found.kl_to_teacher == pytest.approx(whole.kl_to_teacher, rel=1e-5)
    none = quality(teacher, student, [{k: v for k, v in row.items() if k not in targets} for row in data])
    assert (none.metrics, none.calibration_error, none.f1_by_class) == ({}, None, None)
    assert none.calibration_error_to_teacher is not None


def test_labels_in_another_order_change_no_number():
    student, teacher = pair("bert")
    undistilled = copy.deepcopy(student)
    for model in (student, teacher, undistilled):
        model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    data = rows("sequence")
    before = quick(teacher, student, data, undistilled=undistilled, baselines=("pruned",))
    for model in (teacher, undistilled):
        head = model.classifier
        with torch.no_grad():
            head.weight.copy_(head.weight[[2, 0, 1]]), head.bias.copy_(head.bias[[2, 0, 1]])
        model.config.id2label = {0: "yes", 1: "no", 2: "maybe"}
    after = quick(teacher, student, data, undistilled=undistilled, baselines=("pruned",))
    assert [*before.model("student").quality.f1_by_class] == ["no", "maybe", "yes"]
    for one, other in zip(before.models, after.models, strict=True):
        assert one.quality == other.quality


def test_a_teacher_with_columns_of_its_own_reads_them():
    words = [f"w{i}" for i in range(92)]
    student, teacher = pair("bert")
    data = rows("sequence")
    own = [{**row, **{f"teacher_{k}": row[k].roll(1) for k in ("input_ids", "attention_mask")}} for row in data]
    options = {"processing_class": tokenizer(words), "teacher_processing_class": tokenizer(words[::-1])}
    report = quick(teacher, student, own, baselines=("low_rank",), **options)
    rolled = [{k: v.roll(1) if v.dim() else v for k, v in row.items()} for row in data]
    alone = quick(teacher, student, rolled, baselines=("low_rank",))
    for kind in ("teacher", "baseline"):
        assert report.model(kind).quality.metrics == pytest.approx(alone.model(kind).quality.metrics)
        assert report.model(kind).quality.kl_to_teacher == pytest.approx(alone.model(kind).quality.kl_to_teacher)
    assert report.model("student").quality.metrics == quality(teacher, student, data).metrics
    with pytest.raises(ValueError, match="teacher_input_ids"):
        quick(teacher, student, data, **options)


def test_rows_of_padding_in_one_vocabulary_are_left_out_and_said(tmp_path):
    student, teacher = pair("llama")
    teacher.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    options = {"processing_class": tokenizer(), "teacher_processing_class": tokenizer()}
    report = quick(teacher, student, rows("causal"), **options)
    assert "100: 97 leading classes are compared" in report.model("student").note
    trainer = make_trainer(tmp_path, "llama", models=(student, teacher), temperature=1.0, **options)
    assert report.model("student").quality.kl_to_teacher == pytest.approx(trainer.evaluate()["eval_kd"], rel=1e-5)
    assert report.model("teacher").quality.agreement == 1
    with pytest.raises(ValueError, match="processing_class"):
        quick(teacher, student, rows("causal"))


def test_other_tokens_are_compared_where_both_have_read_the_same_text(tmp_path):
    trainer = aligned(tmp_path, temperature=1.0)
    options = {
        "processing_class": PIECES,
        "teacher_processing_class": BYTES,
        "data_collator": trainer.data_collator,
        "baselines": ("pruned",),
    }
    report = quick(trainer.teacher.model, trainer.model, trainer.eval_dataset, **options)
    metrics = trainer.evaluate()
    teacher, student, pruned = report.models
    assert student.quality.kl_to_teacher == pytest.approx(metrics["eval_kd"], rel=1e-5)
    assert student.quality.agreement == pytest.approx(metrics["eval_agreement"])
    assert "tokens that spell the same" in student.note
    assert "perplexity" in student.quality.metrics
    assert (teacher.quality.metrics, teacher.quality.agreement) == ({}, 1)
    assert teacher.quality.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert "tokens of its own" in teacher.note
    assert 0 < pruned.quality.kl_to_teacher
    assert pruned.quality.metrics == {}


@pytest.mark.parametrize("seed", [None, 3])
def test_random_masks_are_the_same_for_every_model(seed):
    student, teacher = pair("bert-masked")
    data = values([{k: v for k, v in row.items() if k != "labels"} for row in rows("masked", count=12)])
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=seed)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    report = quick(teacher, student, data, data_collator=collator, undistilled=copy.deepcopy(student))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert report.model("student").quality == report.model("undistilled").quality
    assert report.model("teacher").quality.kl_to_teacher == pytest.approx(0, abs=1e-7)
    assert report.model("teacher").quality.items == report.model("student").quality.items > 0
    again = quick(teacher, student, data, data_collator=collator)
    assert again.model("student").quality == report.model("student").quality


def test_the_users_metrics_see_the_labelled_rows_padded_as_trainer_pads():
    student, teacher = pair("bert-tokens")
    data = [{k: v[: 6 + i] for k, v in row.items()} for i, row in enumerate(rows("tokens", count=5))]
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"eval_rows": len(prediction.label_ids), "name": "text", "none": float("nan"), "list": [1, 2]}

    options = {"compute_metrics": metrics, "processing_class": tokenizer(), "batch_size": 2}
    report = quick(teacher, student, values(data), **options)
    assert report.model("student").quality.metrics == {"rows": 5}
    assert (report.metric, report.higher_is_better) == ("rows", True)
    assert seen[1].predictions.shape == (5, 10, CLASSES)
    assert (seen[1].label_ids[0, 6:] == -100).all()
    assert (seen[1].predictions[0, 7:] == -100).all(), "beyond its batch, as the second row is of 7 tokens"


def test_a_language_models_metrics_get_what_is_kept_of_its_logits():
    student, teacher = pair("llama")

    def length(prediction):
        return {"tokens": int((prediction.predictions[:, 1:] >= 0).sum())}

    def likeliest(logits, labels):
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    both = {"compute_metrics": length, "preprocess_logits_for_metrics": likeliest}
    found = quality(teacher, student, rows("causal", count=4), batch_size=2, **both)
    assert found.metrics["tokens"] == 4 * 11
    assert {*found.metrics} == {"accuracy", "perplexity", "tokens"}

    def with_losses(prediction):
        tokens, losses = prediction.predictions
        return {"nll": float(losses.sum()), "rows": len(tokens)}

    found = quality(teacher, student, rows("causal", count=4), batch_size=2, compute_metrics=with_losses)
    kept = sum(int((row["labels"][1:] != -100).sum()) for row in rows("causal", count=4))
    assert found.metrics["perplexity"] == pytest.approx(np.exp(found.metrics["nll"] / kept), rel=1e-5)


def test_the_score_that_retention_refers_to_can_be_chosen():
    student, teacher = pair("bert")
    report = quick(teacher, student, rows("sequence"), metric="f1_macro", higher_is_better=False)
    assert (report.metric, report.higher_is_better) == ("f1_macro", False)
    with pytest.raises(ValueError, match="metric='f1' is none of the scores; there is accuracy"):
        quick(teacher, student, rows("sequence"), metric="f1")
    with pytest.raises(ValueError, match="none, as no row has a label"):
        quick(teacher, student, [{"input_ids": row["input_ids"]} for row in rows("sequence")], metric="accuracy")


def test_tags_are_scored_as_entities():
    student, teacher = pair("bert-tokens")
    for model in (student, teacher):
        model.config.id2label = {0: "O", 1: "B-PER", 2: "I-PER"}
    report = quick(teacher, student, rows("tokens"))
    assert report.metric == "entity_f1"
    assert [*report.model("student").quality.f1_by_class] == ["O", "B-PER", "I-PER"]


def test_a_score_that_is_no_number_is_left_out():
    student, teacher = pair("bert-regression")
    with torch.no_grad():
        student.classifier.weight.zero_()
    with pytest.warns(Warning, match="constant"):
        found = quality(teacher, student, rows("number"))
    assert {*found.metrics} == {"mse"}


def test_of_many_classes_there_is_no_table():
    found = quality(bert(num_labels=51, hidden=48), bert(num_labels=51), rows("sequence"))
    assert found.f1_by_class is found.confusion_with_teacher is None
    assert found.agreement is not None


def test_a_model_without_a_head_has_a_note_in_place_of_numbers():
    student, teacher = embedding_pair()
    report = quick(teacher, student, texts())
    assert [model.quality for model in report.models] == [None, None]
    assert "no head" in report.model("student").note
    assert report.model("student").cost.parameters > 0


def test_calibration_in_parts_is_that_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (200,), generator=generator)
    sums = Calibration()
    assert sums.error is None
    for part in range(0, 200, 37):
        sure, chosen = logits[part : part + 37].softmax(-1).max(-1)
        sums.add(sure, chosen == labels[part : part + 37])
    assert sums.error == pytest.approx(expected_calibration_error(logits.numpy(), labels.numpy()), rel=1e-12)


def test_nothing_of_a_language_models_logits_outlives_its_batch():
    student, teacher = pair("llama")
    alive = []

    def count(*_):
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() == 3]
        alive.append(sum(each.shape[-1] == VOCABULARY for each in tensors))

    handle = student.register_forward_pre_hook(count)
    quick(teacher, student, rows("causal"), batch_size=1)
    handle.remove()
    assert len(alive) >= 8
    assert max(alive) <= 4, "the teacher's of this batch, and what the last one left of both models'"


def test_models_are_left_as_they_were():
    student, teacher = pair("llama")
    student.train()
    student.model.layers[0].eval()
    teacher.train()
    modes = [[m.training for m in model.modules()] for model in (student, teacher)]
    hooks = [[{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()] for model in (student, teacher)]
    weights = [{k: v.clone() for k, v in model.state_dict().items()} for model in (student, teacher)]
    threads = torch.get_num_threads()
    quick(teacher, student, rows("causal"), baselines=("int8", "pruned", "low_rank"), threads=2)
    assert torch.get_num_threads() == threads
    for i, model in enumerate((student, teacher)):
        assert [m.training for m in model.modules()] == modes[i]
        assert [{**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules()] == hooks[i]
        assert all(torch.equal(v, weights[i][k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_student_of_the_same_weights_as_the_teacher_keeps_all():
    _, teacher = pair("bert")
    report = quick(teacher, copy.deepcopy(teacher), rows("sequence"))
    assert report.model("student").quality == report.model("teacher").quality
    assert report.retention(report.model("student")) == 1


def test_larger_vocabularies_are_summed_in_16_bits_too():
    student, teacher = (llama(hidden=width).to(torch.bfloat16) for width in (32, 48))
    found = quality(teacher, student, rows("causal"))
    exact = quality(copy.deepcopy(teacher).float(), copy.deepcopy(student).float(), rows("causal"))
    assert found.metrics["perplexity"] == pytest.approx(exact.metrics["perplexity"], rel=0.02)


def test_what_users_return_beside_numbers_is_left_out():
    scores = {"accuracy": np.float32(0.5), "tensor": torch.tensor(2.0), "auc": None, "PER": {"f1": 0.3}, "note": "new"}
    student, teacher = pair("bert")
    assert quality(teacher, student, rows("sequence"), compute_metrics=lambda _: scores).metrics == {
        "accuracy": 0.5,
        "tensor": 2.0,
    }


@pytest.mark.filterwarnings("error")
def test_a_student_that_broke_has_no_figure_that_is_no_number(tmp_path):
    student, teacher = pair("bert")
    with torch.no_grad():
        student.classifier.weight.fill_(torch.nan)
    report = quick(teacher, student, rows("sequence"), output_dir=tmp_path)
    found = report.model("student").quality
    assert found.kl_to_teacher is found.calibration_error is found.calibration_error_to_teacher is None
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_tags_are_told_by_their_entities_whoever_gives_the_metrics():
    student, teacher = pair("bert-tokens")
    names = ["O", "B-PER", "I-PER"]
    for model in (student, teacher):
        model.config.id2label = dict(enumerate(names))
    compute = compute_metrics_for("token_classification", label_names=names)
    report = quick(teacher, student, rows("tokens"), compute_metrics=compute)
    assert report.metric == "entity_f1"
