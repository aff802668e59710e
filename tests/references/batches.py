"""Twins of the losses on relations between the rows of a batch, and between domains.

Each takes (rows, width) tensors, looks at the valid rows alone, one pair or triple after the other, and returns
(rows,) float64 values, 0 for the other rows.
"""

import itertools

import torch


def _kept(valid, *tensors):
    index = torch.arange(len(tensors[0])) if valid is None else valid.nonzero().squeeze(-1)
    return index, *(tensor.double()[index] for tensor in tensors)


def _spread(values, index, rows):
    """(rows,) with the values at the index; a graph in any case."""
    return torch.zeros(rows, dtype=torch.float64).index_put((index,), torch.as_tensor(values, dtype=torch.float64))


def _stack(values, vectors):
    return torch.stack(values) if values else vectors.sum(-1)


def _huber(difference):
    size = difference.abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5)


def _length(vector):
    return vector.dot(vector).sqrt() if vector.any() else vector.sum() * 0


def _direction(vector):
    return vector / _length(vector) if vector.any() else vector * 0


def rkd_distance(student, teacher, valid=None):
    """Park et al., eq. 5-8, averaged over rows x rows as in their code."""
    rows, (index, student, teacher) = len(student), _kept(valid, student, teacher)
    count = len(index)

    def potentials(vectors):
        apart = {(i, j): _length(vectors[i] - vectors[j]) for i in range(count) for j in range(count)}
        positive = [distance for distance in apart.values() if distance > 0]
        mean = sum(positive) / len(positive) if positive else 1.0
        return {pair: distance / mean for pair, distance in apart.items()}

    own, other = potentials(student), potentials(teacher)
    values = [sum(_huber(own[i, j] - other[i, j]) for j in range(count)) / count for i in range(count)]
    return _spread(_stack(values, student), index, rows)


def rkd_angle(student, teacher, valid=None):
    """Park et al., eq. 9-11, over triples of different rows, divided by rows x rows x rows as in their code."""
    rows, (index, student, teacher) = len(student), _kept(valid, student, teacher)
    count = len(index)

    def cosine(vectors, at, first, second):
        return _direction(vectors[first] - vectors[at]).dot(_direction(vectors[second] - vectors[at]))

    values = []
    for at in range(count):
        terms = [
            _huber(cosine(student, at, *seen) - cosine(teacher, at, *seen))
            for seen in itertools.permutations(range(count), 2)
        ]
        values.append(sum(terms, start=student.sum() * 0) / count**2)
    return _spread(_stack(values, student), index, rows)


def similarity_preserving(student, teacher, valid=None):
    """Tung & Mori, eq. 1-4."""
    rows, (index, student, teacher) = len(student), _kept(valid, student, teacher)

    def similarities(vectors):
        return _stack([_direction(torch.einsum("w,jw->j", vector, vectors)) for vector in vectors], vectors)

    difference = (similarities(student) - similarities(teacher)).reshape(len(index), len(index))
    return _spread((difference**2).sum(-1) / max(1, len(index)), index, rows)


def cka(student, teacher, valid=None):
    """Kornblith et al., section 3, from the covariances of the features in place of the kernels of the rows."""
    rows, (index, student, teacher) = len(student), _kept(valid, student, teacher)
    if len(index) < 2:
        return _spread(student.sum(-1) * 0, index, rows)
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    across, within, between = (
        torch.linalg.matrix_norm(left.T @ right)
        for left, right in ((student, teacher), (student, student), (teacher, teacher))
    )
    return _spread((1 - across**2 / (within * between)).expand(len(index)), index, rows)


def contrastive(student, teacher, valid=None, contrast_temperature=0.07):
    """Van den Oord et al., eq. 4, with exp(cosine / temperature) for the density ratio."""
    rows, (index, student, teacher) = len(student), _kept(valid, student, teacher)
    values = []
    for place, row in enumerate(student):
        ratios = [(_direction(row).dot(_direction(other)) / contrast_temperature).exp() for other in teacher]
        values.append(-(ratios[place] / sum(ratios)).log())
    return _spread(_stack(values, student), index, rows)


def _domains(student, target_rows, valid):
    index, student = _kept(valid, student)
    target_rows = target_rows[index]
    return index, student, student[~target_rows], student[target_rows]


def mmd(student, *, target_rows, valid=None):
    """Gretton et al., the unbiased statistic, with the bandwidths of Long et al. and the mean of their kernels."""
    size = len(student)
    index, rows, source, target = _domains(student, target_rows, valid)
    if min(len(source), len(target)) < 2:
        return _spread(rows.sum(-1) * 0, index, size)
    squares = [((first - second) ** 2).sum() for first, second in itertools.combinations(rows.detach(), 2)]
    bandwidth = sum(squares) / len(squares)

    def mean_kernel(pairs):
        kernels = [
            sum((-((first - second) ** 2).sum() / (bandwidth * 2.0**power)).exp() for power in range(-2, 3)) / 5
            for first, second in pairs
        ]
        return sum(kernels) / len(kernels)

    within = sum(mean_kernel(itertools.combinations(domain, 2)) for domain in (source, target))
    value = within - 2 * mean_kernel(itertools.product(source, target))
    return _spread(value.expand(len(index)), index, size)


def coral(student, *, target_rows, valid=None):
    """Sun & Saenko, eq. 1-3."""
    size = len(student)
    index, rows, source, target = _domains(student, target_rows, valid)
    if min(len(source), len(target)) < 2:
        return _spread(rows.sum(-1) * 0, index, size)

    def covariance(domain):
        total = domain.sum(0)
        return (domain.T @ domain - torch.outer(total, total) / len(domain)) / (len(domain) - 1)

    difference = covariance(source) - covariance(target)
    value = torch.linalg.matrix_norm(difference) ** 2 / (4 * rows.shape[1] ** 2)
    return _spread(value.expand(len(index)), index, size)
