"""The logged terms are the formulas' values, in float64, over rows taken one by one and without any padding."""

import pytest
import torch
from torch.nn import functional as F

from tests import references, tiny
from tests.invariants.steps import distil

TEMPERATURE = 3.0
# In question answering the padding is a class of the head's own loss, so that only its KD term has such a value.
HEADS = [name for name in tiny.ZOO if name != "bert-spans"]
IGNORED = -100


def without_padding(row):
    """The row as a batch of one, cut to its real positions, and its labels, cut to the real ones."""
    row = dict(row)
    labels = row.pop("labels", None)
    if "attention_mask" in row:
        mask = row["attention_mask"]
        longest = int(mask.sum(-1).max())  # of several choices
        row = {name: value[..., :longest] if value.shape == mask.shape else value for name, value in row.items()}
    return {name: value.unsqueeze(0) for name, value in row.items()}, labels


def predictions(model, kind, inputs, labels):
    """(items, classes): the scores of one row's items, and (items,) or (items, classes) their labels."""
    if kind == "translation" or kind == "features":
        targets = labels[labels != IGNORED]
        return model(**inputs, labels=targets.unsqueeze(0)).logits[0], targets
    if kind == "spans":
        outputs = model(**inputs)
        return torch.cat([outputs.start_logits, outputs.end_logits]), None
    logits = model(**inputs).logits[0]
    if kind == "causal":
        positions = [i for i in range(len(logits) - 1) if labels[i + 1] != IGNORED]
        return logits[positions], labels[[i + 1 for i in positions]]
    if kind in ("tokens", "masked"):
        positions = [i for i in range(len(logits)) if labels[i] != IGNORED]
        return logits[positions], labels[positions]
    if kind == "speech":
        return logits, labels[labels != IGNORED]
    return logits.reshape(1, -1), labels.reshape(1, -1) if kind == "multi_label" else labels.reshape(1)


def task_values(kind, model, logits, labels):
    """The task loss of each item, or of a whole transcript, in float64."""
    logits = logits.double()
    if kind == "number":
        return (logits[:, 0] - labels.double()) ** 2
    if kind == "multi_label":
        return (torch.log1p(logits.exp()) - labels * logits).mean(-1)
    if kind == "speech":
        lengths = torch.tensor([len(logits)]), torch.tensor([len(labels)])
        value = F.ctc_loss(logits.log_softmax(-1)[:, None], labels[None], *lengths, blank=model.config.pad_token_id)
        return value.reshape(1) * (len(labels) if model.config.ctc_loss_reduction == "sum" else 1)
    return logits.logsumexp(-1) - logits[range(len(logits)), labels]


def kd_values(kind, student_logits, teacher_logits):
    """The KD loss of each item, in float64."""
    if kind == "number":
        return references.logit_mse(student_logits, teacher_logits)
    if kind == "multi_label":
        return references.binary_forward_kl(student_logits, teacher_logits, TEMPERATURE)
    values = references.forward_kl(student_logits, teacher_logits, TEMPERATURE)
    return values.mean().reshape(1) if kind == "spans" else values  # of a start and an end


def expected_terms(name):
    """(task items,) and (KD items,) over all rows."""
    kind = tiny.ZOO[name][1]
    student, teacher = (model.eval() for model in tiny.pair(name))
    task, kd = [], []
    with torch.no_grad():
        for row in tiny.rows(kind):
            inputs, row_labels = without_padding(row)
            start_and_end = {key: inputs.pop(key) for key in ("start_positions", "end_positions") if key in inputs}
            logits, labels = predictions(student, kind, inputs, row_labels)
            kd.append(kd_values(kind, logits, predictions(teacher, kind, inputs, row_labels)[0]))
            if not start_and_end:
                task.append(task_values(kind, student, logits, labels))
    return torch.cat(task) if task else None, torch.cat(kd)


@pytest.mark.parametrize("name", HEADS)
def test_both_terms_have_their_formulas_values(name, output_dir):
    task, kd = expected_terms(name)
    is_sum = name == "wav2vec2-ctc-sum"
    run = distil(
        tiny.pair(name), tiny.rows(tiny.ZOO[name][1]), output_dir, 3, 3, temperature=TEMPERATURE, kd_weight=0.7
    )
    (log,) = run.logs
    expected = {"loss_task": float(task.sum() if is_sum else task.mean()), "loss_kd": float(kd.mean())}
    assert {key: log[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=5e-7)
    assert log["loss"] == pytest.approx(0.5 * expected["loss_task"] + 0.7 * expected["loss_kd"], rel=1e-5)


def test_the_kd_term_of_spans_has_its_formulas_value(output_dir):
    _, kd = expected_terms("bert-spans")
    run = distil(tiny.pair("bert-spans"), tiny.rows("spans"), output_dir, 3, 3, temperature=TEMPERATURE)
    assert run.logs[0]["loss_kd"] == pytest.approx(float(kd.mean()), rel=1e-5)
