"""Twins of the losses on hidden states, attention and relations between tokens.

Scores are read by their attributes. Rows of attention are formed over the keys alone that the query sees, one at a
time.
"""

import math

import torch


def _dot(left, right):
    return torch.einsum("...i,...i->...", left, right)


def _cosine(left, right):
    """Of two vectors; 0 where one is 0."""
    if not left.any() or not right.any():
        return (left.sum() + right.sum()) * 0
    return _dot(left, right) / (_dot(left, left) * _dot(right, right)).sqrt()


def _nothing(*tensors):
    """0, with a graph."""
    return sum(tensor[:0].sum().double() for tensor in tensors)


def hidden_mse(student, teacher):
    """Equation 8 of TinyBERT: MSE of two vectors."""
    difference = student.double() - teacher.double()
    return _dot(difference, difference) / student.shape[-1]


def hidden_hint(student, teacher):
    """Equation 3 of FitNets."""
    return hidden_mse(student, teacher) * (student.shape[-1] / 2)


def hidden_cosine(student, teacher):
    """One minus cosine similarity."""
    pairs = zip(student.double().flatten(0, -2), teacher.double().flatten(0, -2), strict=True)
    return torch.stack([1 - _cosine(*pair) for pair in pairs]).view(student.shape[:-1])


def hidden_normalized_mse(student, teacher):
    """Equation 7 of Patient KD, over the width, by |a - b|^2 = |a|^2 + |b|^2 - 2ab of vectors of length 1 or 0."""
    lengths = student.double().any(-1).double() + teacher.double().any(-1).double()
    return (lengths - 2 * (1 - hidden_cosine(student, teacher))) / student.shape[-1]


def hidden_kl(student, teacher, *, temperature=1.0):
    """sum_i t_i log(t_i / s_i) of the softened features."""
    own, taught = (torch.exp(side.double() / temperature) for side in (student, teacher))
    own, taught = (side / side.sum(-1, keepdim=True) for side in (own, taught))
    return temperature**2 * _dot(taught, torch.log(taught / own))


def _maps(student, teacher, keys):
    """For each sequence, head and query: both sides' scores of the keys it sees, and which these are."""
    batch, heads, queries, _ = student.left.shape
    for sequence in range(batch):
        for head in range(heads):
            for query in range(queries):
                seen = [key for key in range(keys.shape[1]) if keys[sequence, key]]
                for side in (student, teacher):
                    if side.causal:
                        seen = [key for key in seen if key <= query]
                    if side.allowed is not None:
                        allowed = side.allowed.expand(batch, heads, queries, keys.shape[1])
                        seen = [key for key in seen if allowed[sequence, head, query, key]]
                rows = [_row(side, sequence, head, query, seen) for side in (student, teacher)]
                yield (sequence, head, query), seen, rows


def _row(side, sequence, head, query, seen):
    right = side.right[sequence, head if side.right.shape[1] > 1 else 0]
    scores = (right[seen].double() @ side.left[sequence, head, query].double()) * side.scale
    if side.softcap is not None:
        scores = side.softcap * torch.tanh(scores / side.softcap)
    if side.bias is not None:
        scores = scores + side.bias.expand(*side.left.shape[:3], side.right.shape[2])[sequence, head, query, seen]
    return scores


def _with_sinks(student, teacher, head, rows):
    if student.sinks is None or teacher.sinks is None:
        return rows
    sinks = student.sinks, teacher.sinks
    return [torch.cat([row, sink[head : head + 1].double()]) for row, sink in zip(rows, sinks, strict=True)]


def attention_mse(student, teacher, *, keys):
    """Equation 7 of TinyBERT, pair by pair; padding makes no pair, be it the key or, in self-attention, the query."""
    batch, heads, queries, _ = student.left.shape
    squares = torch.zeros(batch, queries, keys.shape[1], dtype=torch.float64) + _nothing(student.left, student.right)
    for (sequence, _head, query), seen, (own, other) in _maps(student, teacher, keys):
        if seen and (queries != keys.shape[1] or keys[sequence, query]):
            places = tuple(torch.tensor(part) for part in ([sequence] * len(seen), [query] * len(seen), seen))
            squares = squares.index_put(places, (own - other) ** 2 / heads, accumulate=True)
    return squares


def _mean_of_rows(student, teacher, keys, distance):
    batch, heads, queries, _ = student.left.shape
    values = [[_nothing(student.left, student.right)] * queries for _ in range(batch)]
    for (sequence, head, query), seen, rows in _maps(student, teacher, keys):
        if seen:
            probabilities = [
                torch.exp(row) / torch.exp(row).sum() for row in _with_sinks(student, teacher, head, rows)
            ]
            values[sequence][query] = values[sequence][query] + distance(*probabilities) / heads
    return torch.stack([torch.stack(row) for row in values])


def attention_kl(student, teacher, *, keys):
    """Mean over the heads of sum_k t_k log(t_k / s_k)."""
    return _mean_of_rows(student, teacher, keys, lambda own, other: (other * torch.log(other / own)).sum())


def attention_probs_mse(student, teacher, *, keys):
    """Mean over the heads of sum_k (s_k - t_k)^2."""
    return _mean_of_rows(student, teacher, keys, lambda own, other: _dot(own - other, own - other))


minilm_values = minilmv2_relations = attention_kl


def ckd_pairs(student, teacher, *, tokens):
    """For each token the KL between two softmaxes over its cosines with the others."""
    values = torch.zeros(tokens.shape, dtype=torch.float64) + _nothing(student)
    for sequence, token in tokens.nonzero().tolist():
        others = [other for other in tokens[sequence].nonzero().flatten().tolist() if other != token]
        if others:
            own, taught = (
                torch.stack([_cosine(side[sequence, token].double(), side[sequence, o].double()) for o in others])
                for side in (student, teacher)
            )
            weights = taught.exp() / taught.exp().sum()
            kl = (weights * (taught - own)).sum() - taught.exp().sum().log() + own.exp().sum().log()
            values = values.index_put((torch.tensor(sequence), torch.tensor(token)), kl)
    return values


def ckd_angles(student, teacher, *, tokens, window=21):
    """For each token the mean over pairs of neighbours of the squared difference of the cosines at the token."""
    values = torch.zeros(tokens.shape, dtype=torch.float64) + _nothing(student)
    for sequence, middle in tokens.nonzero().tolist():
        near = [
            place
            for place in tokens[sequence].nonzero().flatten().tolist()
            if place != middle and abs(place - middle) <= window // 2
        ]
        pairs = [(one, two) for one in near for two in near if one < two]
        if pairs:
            own, taught = (
                torch.stack([_cosine(x[one] - x[middle], x[two] - x[middle]) for one, two in pairs])
                for x in (student[sequence].double(), teacher[sequence].double())
            )
            mean = _dot(own - taught, own - taught) / math.comb(len(near), 2)
            values = values.index_put((torch.tensor(sequence), torch.tensor(middle)), mean)
    return values
