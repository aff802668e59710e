"""A report's numbers in other words: row by row without padding, in float64, with numpy, scipy and scikit-learn."""

import copy
import math

import numpy as np
import torch
from scipy.special import expit, log_softmax, rel_entr, softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_squared_error

from tests.tiny import ZOO

LABELS = ("labels", "start_positions", "end_positions")


def forward(model, row):
    """The output of one row in float64; of text without its padding."""
    inputs = {k: v for k, v in row.items() if k not in LABELS}
    if "input_ids" in inputs and inputs["input_ids"].dim() == 1:
        real = int(inputs["attention_mask"].sum())
        inputs = {k: v[:real] for k, v in inputs.items()}
    batch = {k: v[None].double() if v.is_floating_point() else v[None] for k, v in inputs.items()}
    if model.config.is_encoder_decoder:
        batch["labels"] = row["labels"][None]
    with torch.no_grad():
        return copy.deepcopy(model).eval().double()(**batch)


def items(model, row, kind):
    """(items, classes) logits and (items,) labels of one row; -100 for none."""
    if kind == "spans":
        out, length = forward(model, row), int(row["attention_mask"].sum())
        return [
            (out[f"{side}_logits"][0, :length].numpy()[None], np.array([int(row[f"{side}_positions"])]))
            for side in ("start", "end")
        ]
    logits = forward(model, row).logits[0].numpy()
    labels = row["labels"].numpy()
    if kind in ("sequence", "image", "choices", "sound", "multi_label", "number"):
        return [(logits.reshape(1, -1), labels[None])]
    if kind == "speech":
        samples = int(row["attention_mask"].sum())
        frames = int(model._get_feat_extract_output_lengths(samples))
        return [(logits[:frames], np.full(frames, -100))]
    if kind == "causal":
        logits, labels = logits[:-1], labels[1 : len(logits)]
    labels = labels[: len(logits)]
    return [(logits[labels != -100], labels[labels != -100])]


def all_items(name, models, rows):
    """Student's and teacher's logits, item by item, and the labels; a list of one side or two."""
    kind = ZOO[name][1]
    sides = 2 if kind == "spans" else 1
    found = []
    for side in range(sides):
        student, teacher, labels = [], [], []
        for row in rows:
            own, label = items(models[0], row, kind)[side]
            other, _ = items(models[1], row, kind)[side]
            student += [*own]
            teacher += [*other]
            labels += [*label]
        found.append((student, teacher, np.array(labels)))
    return found


def calibration_error(confidences, hits, bins=15):
    total = 0.0
    for low in range(bins):
        inside = [i for i, sure in enumerate(confidences) if low / bins < sure <= (low + 1) / bins]
        if inside:
            gap = np.mean([hits[i] for i in inside]) - np.mean([confidences[i] for i in inside])
            total += abs(gap) * len(inside)
    return total / len(confidences)


def kl(own, other):
    return float(rel_entr(softmax(other), softmax(own)).sum())


def of_classes(sides):
    """Agreement, KL and both calibration errors of heads that choose one class."""
    same = np.all([[a.argmax() == b.argmax() for a, b in zip(s, t, strict=True)] for s, t, _ in sides], axis=0)
    divergence = np.mean([[kl(a, b) for a, b in zip(s, t, strict=True)] for s, t, _ in sides])
    sure = [softmax(a).max() for s, _, _ in sides for a in s]
    like_teacher = [a.argmax() == b.argmax() for s, t, _ in sides for a, b in zip(s, t, strict=True)]
    known = [(softmax(a).max(), a.argmax() == y) for s, _, labels in sides for a, y in zip(s, labels, strict=True)]
    return {
        "agreement": np.mean(same),
        "kl_to_teacher": divergence,
        "calibration_error": calibration_error(*zip(*known, strict=True)) if (sides[0][2] >= 0).all() else None,
        "calibration_error_to_teacher": calibration_error(sure, like_teacher),
    }


def of_labels(student, teacher, labels):
    """The same of heads with a yes or no for each label."""
    own, other = np.array(student), np.array(teacher)
    p, q = expit(other), expit(own)
    sure, yes = np.maximum(q, 1 - q).ravel(), own > 0
    return {
        "agreement": np.mean(yes == (other > 0)),
        "kl_to_teacher": (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(-1).mean(),
        "calibration_error": calibration_error(sure, (yes == (labels == 1)).ravel()),
        "calibration_error_to_teacher": calibration_error(sure, (yes == (other > 0)).ravel()),
    }


def metrics(name, sides):
    """One or two of the task's scores."""
    kind, (student, _, labels) = ZOO[name][1], sides[0]
    if kind == "number":
        return {"mse": mean_squared_error(labels, np.ravel(student))}
    if kind == "multi_label":
        return {"f1_micro": f1_score(labels, np.array(student) > 0, average="micro", zero_division=0)}
    if kind == "spans":
        best = []
        for start, end in zip(sides[0][0], sides[1][0], strict=True):
            pairs = [(i, j) for i in range(len(start)) for j in range(i, min(len(end), i + 30))]
            best.append(max(pairs, key=lambda pair, s=start, e=end: s[pair[0]] + e[pair[1]]))
        wanted = [*zip(sides[0][2], sides[1][2], strict=True)]
        return {"exact_match": np.mean([a == b for a, b in zip(best, wanted, strict=True)])}
    if kind == "speech":
        return {}
    scores = {"accuracy": accuracy_score(labels, [a.argmax() for a in student])}
    if kind in ("masked", "causal", "translation", "features"):
        scores["perplexity"] = math.exp(-np.mean([log_softmax(a)[y] for a, y in zip(student, labels, strict=True)]))
    return scores


def by_class(name, sides, classes=3):
    """F1 of each class, and the confusion with the teacher."""
    kind, (student, teacher, labels) = ZOO[name][1], sides[0]
    if kind == "multi_label":
        return f1_score(labels, np.array(student) > 0, average=None, zero_division=0), None
    if kind not in ("sequence", "image", "sound", "tokens"):
        return None, None
    own, other = ([int(a.argmax()) for a in side] for side in (student, teacher))
    each = [*range(classes)]
    f1 = f1_score(labels, own, labels=each, average=None, zero_division=0)
    return f1, confusion_matrix(other, own, labels=each).tolist()
