"""Rows without a label learn from the teacher alone, at a hand-made gradient; all-unlabelled batches make no NaN."""

import math

import datasets
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from tests import references
from tests.tiny import ZOO, pair, rows, tokenizer
from tests.training import GradientRecorder, assert_same_gradients, logged, make_trainer

# Rows 4 to 7 make the second of two micro-batches: it holds no label at all.
UNLABELLED = (1, 4, 5, 6, 7)
TASK_WEIGHT, KD_WEIGHT, TEMPERATURE = 0.7, 0.4, 3.0
HEADS = ("bert", "bert-multi-label", "bert-regression", "bert-choices", "bert-tokens", "bert-spans", "wav2vec2-ctc")
ONE_CLASS_PER_ITEM = ("bert", "bert-choices", "bert-tokens")
TARGETS = ("labels", "start_positions", "end_positions")


def without_labels(data, gone, form, container):
    """The rows in a container, those in `gone` with a label that is missing in one of the ways it can be."""

    def strip(row):
        plain = {name: value if container == "tensors" else value.tolist() for name, value in row.items()}
        for name in {*TARGETS} & {*row}:
            if form == "no key":
                del plain[name]
            elif form == "None":
                plain[name] = None
            else:
                filled = torch.full(row[name].shape, float(form) if form == "nan" else int(form))
                plain[name] = filled if container == "tensors" else filled.tolist()
        return plain

    stripped = [
        strip(row) if i in gone else {k: v if container == "tensors" else v.tolist() for k, v in row.items()}
        for i, row in enumerate(data)
    ]
    if container in ("tensors", "values"):
        return stripped
    stored = datasets.Dataset.from_list(stripped)
    return stored.with_format("torch") if container == "torch dataset" else stored


def label_forms(name, container):
    """How a label of this head can be missing in this container."""
    forms = ["None"] if "dataset" in container else ["None", "no key"]
    if "regression" in name or "multi-label" in name:
        return [*forms, "nan"]
    # An integer column of a data set with a NaN becomes one of floats, which is another thing: tested apart.
    forms.append("-100")
    return [*forms, "nan"] if container == "values" and name in ("bert", "bert-choices") else forms


CASES = [
    (name, container, form)
    for name in HEADS
    for container in ("tensors", "values", "dataset", "torch dataset")
    for form in label_forms(name, container)
]


def divergence(name, student, teacher, temperature):
    """The distance the head is taught by, from the papers, in float64."""
    if name == "bert-regression":
        return references.logit_mse(student, teacher)
    kl = references.binary_forward_kl if name == "bert-multi-label" else references.forward_kl
    return kl(student, teacher, torch.full((), temperature))


def task_and_kd(name, student, teacher, row, labelled, temperature):
    """Sums over one row: (task loss, its items, divergence, its items), as lists where the task has two targets."""
    targets = {key: row[key] for key in TARGETS if key in row}
    inputs = {key: value[None] for key, value in row.items() if key not in (*targets, "taught")}
    outputs = student(**inputs)
    with torch.no_grad():
        taught = teacher(**inputs)
    if name == "bert-spans":
        real = row["attention_mask"].bool()
        sides = [(outputs.start_logits, taught.start_logits), (outputs.end_logits, taught.end_logits)]
        kd = sum(divergence(name, s[0][real], t[0][real], temperature) for s, t in sides) / 2
        places = (targets["start_positions"], targets["end_positions"])
        task = [F.cross_entropy(s[0], place) for (s, _), place in zip(sides, places, strict=True)]
        return sum(task) / 2, 1, kd, 1
    logits, teacher_logits = outputs.logits[0], taught.logits[0]
    label = targets["labels"]
    if name == "bert-tokens":
        positions = label != -100 if labelled else row.get("taught", row["attention_mask"].bool())
        kd = divergence(name, logits[positions], teacher_logits[positions], temperature).sum()
        task = F.cross_entropy(logits, label, reduction="sum")
        return task, (label != -100).sum(), kd, positions.sum()
    if name == "wav2vec2-ctc":
        frames = student._get_feat_extract_output_lengths(row["attention_mask"].sum())
        spelled = label[label >= 0]
        log_probs = logits.log_softmax(-1)[:, None]
        task = F.ctc_loss(log_probs, spelled[None], frames[None], torch.tensor([len(spelled)]), reduction="sum")
        return (
            task / len(spelled),
            1,
            divergence(name, logits[:frames], teacher_logits[:frames], temperature).sum(),
            frames,
        )
    kd = divergence(name, logits, teacher_logits, temperature)
    if name == "bert-multi-label":
        return F.binary_cross_entropy_with_logits(logits, label), 1, kd, 1
    if name == "bert-regression":
        return (logits[0] - label).square(), 1, kd, 1
    return F.cross_entropy(logits, label), 1, kd, 1


def reference_gradients(name, data, gone, weights=(TASK_WEIGHT, KD_WEIGHT), temperature=TEMPERATURE):
    """The gradient of weighted means over all rows at once, row by row and without any of the package."""
    student, teacher = pair(name)
    student.train()
    teacher.eval()
    sums = [0.0, 0, 0.0, 0]
    for i, row in enumerate(data):
        task, task_items, kd, kd_items = task_and_kd(name, student, teacher, row, i not in gone, temperature)
        sums = [sums[0], sums[1], sums[2] + kd, sums[3] + kd_items]
        if i not in gone:
            sums[:2] = [sums[0] + task, sums[1] + task_items]
    loss = weights[1] * sums[2] / sums[3] + (weights[0] * sums[0] / sums[1] if sums[1] else 0)
    loss.backward()
    gradients = {key: value.grad for key, value in student.named_parameters() if value.grad is not None}
    return gradients, sums[0] / max(sums[1], 1), sums[2] / sums[3]


@pytest.fixture(scope="module")
def expected():
    """name -> the reference, made once for all forms a missing label can take."""
    return {name: reference_gradients(name, rows(ZOO[name][1]), UNLABELLED) for name in HEADS}


@pytest.mark.parametrize(("name", "container", "form"), CASES)
def test_the_step_is_the_labelled_rows_task_and_every_rows_teacher(name, container, form, expected, tmp_path):
    data = without_labels(rows(ZOO[name][1]), UNLABELLED, form, container)
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        name,
        train_dataset=data,
        callbacks=[recorder],
        gradient_accumulation_steps=2,
        max_steps=1,
        task_weight=TASK_WEIGHT,
        kd_weight=KD_WEIGHT,
        temperature=TEMPERATURE,
    )
    trainer.train()
    gradients, task, kd = expected[name]
    assert_same_gradients(recorder.steps[0], gradients)
    assert logged(trainer, "loss_task") == pytest.approx([task.item()], rel=1e-5)
    assert logged(trainer, "loss_kd") == pytest.approx([kd.item()], rel=1e-5)
    assert logged(trainer, "labelled_fraction") == [3 / 8]


@pytest.mark.parametrize("name", HEADS)
def test_a_data_set_without_any_label_teaches_at_task_weight_0(name, tmp_path):
    data = [{key: value for key, value in row.items() if key not in TARGETS} for row in rows(ZOO[name][1])]
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        name,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[recorder],
        per_device_train_batch_size=8,
        max_steps=1,
        task_weight=0.0,
        kd_weight=KD_WEIGHT,
        temperature=TEMPERATURE,
    )
    trainer.train()
    gradients, _, kd = reference_gradients(name, rows(ZOO[name][1]), range(8))
    assert_same_gradients(recorder.steps[0], gradients)
    assert logged(trainer, "labelled_fraction") == [0.0]
    assert logged(trainer, "loss_kd") == pytest.approx([kd.item()], rel=1e-5)
    assert logged(trainer, "loss_task") == []
    metrics = trainer.evaluate()
    assert metrics["eval_kd"] > 0
    assert "eval_loss" not in metrics


@pytest.mark.parametrize("form", ["None", "no key"])
@pytest.mark.parametrize(
    ("name", "smoothing"), [(name, 0.0) for name in HEADS] + [(name, 0.1) for name in ONE_CLASS_PER_ITEM]
)
def test_a_batch_without_a_label_makes_no_nan(name, smoothing, form, tmp_path):
    data = without_labels(rows(ZOO[name][1]), range(4), form, "values")
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path, name, train_dataset=data, callbacks=[recorder], label_smoothing_factor=smoothing, max_steps=2
    )
    trainer.train()
    assert logged(trainer, "loss_task")[0] == 0
    assert logged(trainer, "loss_task")[1] > 0
    assert logged(trainer, "labelled_fraction") == [0.0, 1.0]
    assert all(math.isfinite(value) for value in logged(trainer, "loss") + logged(trainer, "loss_kd"))
    assert all(value.isfinite().all() for step in recorder.steps for value in step.values())
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def first_steps_gradients(tmp_path, name, **options):
    """The gradients of one step over the first eight rows, and the trainer."""
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, name, callbacks=[recorder], max_steps=1, per_device_train_batch_size=8, **options)
    trainer.train()
    return recorder.steps[0], trainer


@pytest.mark.parametrize("name", ["bert", "bert-choices"])
def test_classes_that_pandas_made_floats_because_some_are_missing_are_classes_again(name, tmp_path):
    data = rows(ZOO[name][1])
    table = pd.DataFrame([{key: value.tolist() for key, value in row.items()} for row in data])
    table.loc[[*UNLABELLED], "labels"] = None
    assert table["labels"].dtype == float
    from_pandas = datasets.Dataset.from_pandas(table)
    actual, trainer = first_steps_gradients(tmp_path, name, train_dataset=from_pandas, eval_dataset=from_pandas)
    expected, _ = first_steps_gradients(
        tmp_path, name, train_dataset=without_labels(data, UNLABELLED, "-100", "values")
    )
    assert_same_gradients(actual, expected, rtol=0, atol=0)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_row_with_some_of_its_many_labels_missing_counts_as_unlabelled(tmp_path):
    data = rows("multi_label")
    partly = [{**row, "labels": row["labels"].clone()} for row in data]
    for i in UNLABELLED:
        partly[i]["labels"][i % 3] = math.nan
    actual, trainer = first_steps_gradients(tmp_path, "bert-multi-label", train_dataset=partly)
    expected, _ = first_steps_gradients(
        tmp_path, "bert-multi-label", train_dataset=without_labels(data, UNLABELLED, "None", "tensors")
    )
    assert_same_gradients(actual, expected, rtol=0, atol=0)
    assert logged(trainer, "labelled_fraction") == [3 / 8]


def test_many_labels_are_found_in_the_data_where_the_config_does_not_tell(tmp_path):
    student, teacher = pair("bert-multi-label")
    student.config.problem_type = None
    data = without_labels(rows("multi_label"), (0, 1, 5), "None", "values")
    actual, _ = first_steps_gradients(
        tmp_path, "bert-multi-label", models=(student, teacher), train_dataset=data, task_weight=0.0
    )
    expected, _ = first_steps_gradients(tmp_path, "bert-multi-label", train_dataset=data, task_weight=0.0)
    assert_same_gradients(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_padding_collator_takes_ragged_rows_with_missing_labels(column, tmp_path):
    data = [
        {**{key: row[key][: 4 + i].tolist() for key in ("input_ids", "attention_mask")}, column: row["labels"].item()}
        for i, row in enumerate(rows("sequence"))
    ]
    data[0][column] = data[6][column] = None
    collator = DataCollatorWithPadding(tokenizer())
    actual, trainer = first_steps_gradients(
        tmp_path, "bert", train_dataset=datasets.Dataset.from_list(data), data_collator=collator
    )
    batch = collator([{**row, column: -100 if row[column] is None else row[column]} for row in data])
    padded = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    expected, _, _ = reference_gradients("bert", padded, (0, 6), weights=(0.5, 0.5), temperature=2.0)
    assert_same_gradients(actual, expected)
    assert logged(trainer, "labelled_fraction") == [6 / 8]


def test_unlabelled_tokens_teach_unless_they_are_special_and_an_unknown_word_is_a_word(tmp_path):
    data = rows("tokens")
    for row in data:
        row["input_ids"][:3] = torch.tensor([2, 1, 5])  # [CLS] [UNK] w0
    ragged = [{key: value[: int(row["attention_mask"].sum())].tolist() for key, value in row.items()} for row in data]
    for i in UNLABELLED:
        ragged[i]["labels"] = None
    words = tokenizer()
    actual, _ = first_steps_gradients(
        tmp_path,
        "bert-tokens",
        train_dataset=datasets.Dataset.from_list(ragged),
        data_collator=DataCollatorForTokenClassification(words),
        processing_class=words,
    )
    special = torch.tensor([0, 2, 3, 4])
    taught = [{**row, "taught": row["attention_mask"].bool() & ~torch.isin(row["input_ids"], special)} for row in data]
    expected, _, _ = reference_gradients("bert-tokens", taught, UNLABELLED, weights=(0.5, 0.5), temperature=2.0)
    assert_same_gradients(actual, expected)


def test_evaluation_scores_the_labelled_rows_and_asks_the_teacher_about_all(tmp_path):
    data = rows("sequence")
    mixed = without_labels(data, UNLABELLED, "None", "values")
    trainer = make_trainer(tmp_path, "bert", eval_dataset=mixed)
    metrics = trainer.evaluate()
    labelled = [row for i, row in enumerate(data) if i not in UNLABELLED]
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate(labelled)["eval_loss"], rel=1e-6)
    assert metrics["eval_kd"] == pytest.approx(trainer.evaluate(data)["eval_kd"], rel=1e-6)


def test_an_evaluation_without_a_single_label_reports_no_loss_of_0(tmp_path):
    trainer = make_trainer(tmp_path, "bert", eval_dataset=without_labels(rows("sequence"), range(8), "None", "values"))
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    assert metrics["eval_kd"] > 0


def test_the_teachers_kind_of_labels_decides_where_the_student_has_neither_labels_nor_a_problem_type(tmp_path):
    student, teacher = pair("bert-multi-label")
    student.config.problem_type = None
    data = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows("multi_label")]
    _, trainer = first_steps_gradients(
        tmp_path, "bert-multi-label", models=(student, teacher), train_dataset=data, task_weight=0.0
    )
    _, _, kd = reference_gradients("bert-multi-label", rows("multi_label"), range(8), weights=(0, 1), temperature=2.0)
    assert logged(trainer, "loss_kd") == pytest.approx([kd.item()], rel=1e-5)
