"""Twins of the losses on logits that are more, or other, than one divergence of two distributions.

Each looks at one item after the other, over the classes alone that count for it, and returns (...,) float64 values
that torch can differentiate.
"""

import math

import torch

from tests.references.logits import binary_forward_kl, forward_kl

listnet = forward_kl  # ListNet's top-one probabilities are a softmax over the candidates


def _items(student_logits, *others):
    """Every item's rows of float64 numbers; what has no classes is one number per item or for all."""
    shape = student_logits.shape[:-1]
    parts = [student_logits.double().reshape(math.prod(shape), student_logits.shape[-1])]
    for other in others:
        if isinstance(other, torch.Tensor) and other.shape == student_logits.shape:
            parts.append(other.double().reshape(parts[0].shape))
        else:
            parts.append(torch.as_tensor(other).expand(shape).reshape(-1))
    return list(zip(*parts, strict=True))


def _per_item(values, student_logits):
    if not values:
        return student_logits.double().sum(-1)
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).view(
        student_logits.shape[:-1]
    )


def _zero(row):
    """0, with a graph, unless the row holds NaN."""
    return torch.where(row.isnan(), row, 0.0).sum()


def _labels(targets, teacher_logits):
    best = teacher_logits.max(-1).indices
    return best if targets is None else torch.where(targets < 0, best, targets)


def _entropy(logits):
    probability = logits.softmax(-1)
    return torch.special.entr(probability).sum(-1)


def soft_cross_entropy(student_logits, teacher_logits, temperature=1.0, class_mean=False):
    """TinyBERT's soft_cross_entropy, as KL and entropy; its code has the mean over the classes."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    entropy = _entropy(teacher_logits.double() / temperature.unsqueeze(-1))
    values = forward_kl(student_logits, teacher_logits, temperature) + temperature**2 * entropy
    return values / (student_logits.shape[-1] if class_mean else 1)


def soft_bce(student_logits, teacher_logits, temperature=1.0):
    """A label of logit z is a choice between two classes of logits 0 and z."""
    student, teacher = (torch.stack([torch.zeros_like(x), x], dim=-1) for x in (student_logits, teacher_logits))
    temperature = torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1).expand(student_logits.shape)
    return soft_cross_entropy(student, teacher, temperature).sum(-1)


def logit_cosine(student_logits, teacher_logits):
    """One minus cosine similarity."""
    values = []
    for student, teacher in _items(student_logits, teacher_logits):
        own, taught = student[teacher != -math.inf], teacher[teacher != -math.inf]
        lengths = own.dot(own) * taught.dot(taught)
        values.append(1 - own.dot(taught) / lengths.sqrt() if lengths else _zero(own) + 1)
    return _per_item(values, student_logits)


def centered_logit_mse(student_logits, teacher_logits):
    """The variance of the differences."""
    values = []
    for student, teacher in _items(student_logits, teacher_logits):
        kept = teacher != -math.inf
        values.append((student[kept] - teacher[kept]).var(correction=0) if kept.any() else _zero(student))
    return _per_item(values, student_logits)


def _set_apart(student, teacher, target):
    """Both items as two classes, the target and the others as one, and the others among themselves."""
    possible = (student != -math.inf) | (teacher != -math.inf)
    possible[target] = False
    pairs, others = [], []
    for logits in (student, teacher):
        rest = logits[possible]
        total = rest.logsumexp(-1) if len(rest) else torch.tensor(-math.inf, dtype=torch.float64)
        pairs.append(torch.stack([logits[target], total]))
        others.append(rest)
    return pairs, others


def dkd(student_logits, teacher_logits, temperature=1.0, targets=None, alpha=1.0, beta=8.0):
    """Zhao et al., eq. 5: the KL of two classes and the KL of the others."""
    values = []
    targets = _labels(targets, teacher_logits)
    for student, teacher, t, target in _items(student_logits, teacher_logits, temperature, targets):
        pairs, others = _set_apart(student / t, teacher / t, target)
        value = alpha * forward_kl(*pairs)
        if (others[1] != -math.inf).any():
            value = value + beta * forward_kl(*others)
        values.append(t.double() ** 2 * value)
    return _per_item(values, student_logits)


def nkd(student_logits, teacher_logits, temperature=1.0, targets=None, gamma=1.5):
    """Yang et al.: soft target loss, and the cross-entropy of the normalised others at the temperature."""
    values = []
    targets = _labels(targets, teacher_logits)
    for student, teacher, t, target in _items(student_logits, teacher_logits, temperature, targets):
        belief = teacher.softmax(-1)[target]
        value = -belief * student.log_softmax(-1)[target] if belief != 0 else _zero(student)
        _, others = _set_apart(student / t, teacher / t, target)
        if (others[1] != -math.inf).any():
            value = value + gamma * t.double() ** 2 * soft_cross_entropy(*others)
        values.append(value)
    return _per_item(values, student_logits)


def _correlation(first, second):
    """Pearson's; 0 where one is constant, but for rounding, and 1 where both are. What is below 1e-150 is 0."""
    first, second = (torch.where(x < 1e-150, 0.0, x) for x in (first, second))
    sizes = [x.detach().abs().max() for x in (first, second)]
    first, second = first - first.sum() / len(first), second - second.sum() / len(second)
    constant = [bool(x.detach().abs().max() <= 1e-12 * size) for x, size in zip((first, second), sizes, strict=True)]
    if any(constant):
        return float(all(constant))
    return (first * second).sum() / ((first**2).sum().sqrt() * (second**2).sum().sqrt())


def dist(student_logits, teacher_logits, temperature=1.0, valid=None, inter=1.0, intra=1.0):
    """Huang et al., section 3, over the rows and then over the columns of the valid rows' probabilities."""
    rows = torch.arange(len(student_logits)) if valid is None else valid.nonzero().squeeze(-1)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(len(student_logits))
    possible = (student_logits != -math.inf) | (teacher_logits != -math.inf)
    own, taught = (
        [(logits[row].double() / temperature[row]).softmax(-1) for row in rows]
        for logits in (student_logits, teacher_logits)
    )
    classes = [c for c in range(student_logits.shape[-1]) if possible[rows, c].any()]
    within_classes = [
        1 - _correlation(torch.stack([p[c] for p in own]), torch.stack([p[c] for p in taught])) for c in classes
    ]
    shared = intra * sum(within_classes) / max(1, len(classes)) if len(rows) > 1 else 0.0
    values = student_logits.double().new_zeros(len(student_logits))
    for row, p, q in zip(rows, own, taught, strict=True):
        value = inter * (1 - _correlation(p[possible[row]], q[possible[row]])) + shared
        values = values.index_put((row,), torch.as_tensor(temperature[row] ** 2 * value, dtype=torch.float64))
    return values + torch.where(student_logits.isfinite(), student_logits, 0.0).double().sum(-1) * 0


def pairwise_ranking(student_logits, teacher_logits, temperature=1.0):
    """RankNet: which of two candidates comes first is a label, and its logit the difference of their scores."""
    values = []
    for student, teacher, t in _items(student_logits, teacher_logits, temperature):
        first, second = torch.combinations((teacher != -math.inf).nonzero().flatten()).unbind(-1)
        pairs = ((scores[first] - scores[second]).unsqueeze(-1) for scores in (student, teacher))
        values.append(binary_forward_kl(*pairs, t.double()).sum() / max(1, len(first)) + _zero(student))
    return _per_item(values, student_logits)


def margin_mse(student_logits, teacher_logits, targets=None):
    """Hofstätter et al., for each candidate beside the positive one."""
    values = []
    for student, teacher, best in _items(student_logits, teacher_logits, _labels(targets, teacher_logits)):
        others = [c for c in range(len(teacher)) if c != best and teacher[c] != -math.inf]
        squares = [((student[best] - student[c]) - (teacher[best] - teacher[c])) ** 2 for c in others]
        values.append(sum(squares) / len(squares) if squares else _zero(student))
    return _per_item(values, student_logits)


def standardize(logits):
    """Sun et al., algorithm 1: the z-scores of the classes that are possible."""
    rows = []
    for (row,) in _items(logits):
        kept = row != -math.inf
        scores = row[kept] - row[kept].mean()
        if kept.sum() > 1 and (row[kept] != row[kept][0]).any():
            scores = scores / (1e-7 + row[kept].std())
        else:
            scores = scores * 0
        rows.append(row.masked_scatter(kept, scores))
    return torch.stack(rows).view(logits.shape) if rows else logits.double()
