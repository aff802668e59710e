"""Losses that draw the student's vectors of two domains together, such as a source and a target of adaptation.

They look at the rows of one batch, compare the student's source rows with its own target rows, and need no teacher.
Every valid row has the same value, that of the batch, so that the mean over the rows is the published loss. Rows that
are not valid do not matter, even where they hold NaN. A batch with fewer than 2 valid rows of either domain gives 0
with a graph.
"""

import torch
from torch import Tensor

from hf_distill.losses.base import compute_dtype, register_loss
from hf_distill.losses.batch_relations import centred, clean, distances, products, valid_rows

_BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@register_loss(
    "mmd",
    feature="domain",
    item="sequence",
    paper="Gretton et al. 2012, arXiv:0805.2368; Long et al. 2015, arXiv:1502.02791",
)
def mmd(student: Tensor, *, target_rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """The squared maximum mean discrepancy between the domains, under a mean of five Gaussian kernels.

    The estimate is the unbiased one: 0 on average for equal distributions, and so sometimes a little below. The
    kernels are exp(-distance² / bandwidth) with 1/4, 1/2, 1, 2 and 4 times the mean distance² between different valid
    rows; no gradient goes through that mean. Rotating, moving or scaling all rows changes nothing.

    Args:
        student: (rows, width), vectors of both domains.
        target_rows: (rows,) bool, the rows of the target domain.
        valid: (rows,) bool, the rows that count; None counts all.

    Returns: (rows,) float32, at most 2.
    Source: Gretton et al. 2012 ("A Kernel Two-Sample Test", eq. 3; in arXiv:0805.2368 the lemma on the unbiased
        statistic); bandwidths of Long et al. 2015 (DAN), arXiv:1502.02791. The authors' code adds the five kernels, so
        gives five times as much, and takes the biased estimate, which rewards vectors for being close to each other
        within a domain too.
    """
    student, source, target = _split_domains(student, target_rows, valid)
    squared = distances(student).square()
    different = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    valid = source | target
    pairs = valid.unsqueeze(-1) & valid & different
    mean = torch.where(pairs, squared, 0.0).sum().detach() / pairs.sum().clamp(min=1)
    relative = squared / torch.where(mean == 0, 1.0, mean)
    kernel = torch.stack([(-relative / factor).exp() for factor in _BANDWIDTH_FACTORS]).mean(0)

    def mean_kernel(left: Tensor, right: Tensor) -> Tensor:
        between = left.unsqueeze(-1) & right & different
        return torch.where(between, kernel, 0.0).sum() / between.sum().clamp(min=1)

    value = mean_kernel(source, source) + mean_kernel(target, target) - 2 * mean_kernel(source, target)
    return _for_every_row(value, source, target)


@register_loss("coral", feature="domain", item="sequence", paper="Sun & Saenko 2016, arXiv:1607.01719")
def coral(student: Tensor, *, target_rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """The squared distance between the covariances of the domains, divided by 4 width².

    Moving all rows of a domain changes nothing: the means are not compared.

    Args:
        student: (rows, width), vectors of both domains.
        target_rows: (rows,) bool, the rows of the target domain.
        valid: (rows,) bool, the rows that count; None counts all.

    Returns: (rows,) float32, at least 0.
    Source: Sun & Saenko 2016 (Deep CORAL), arXiv:1607.01719, eq. 1-3.
    """
    student, source, target = _split_domains(student, target_rows, valid)
    difference = _covariance(student, source) - _covariance(student, target)
    return _for_every_row((difference / (2 * student.shape[-1])).square().sum(), source, target)


def _split_domains(student: Tensor, target_rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The rows without what is not valid, and the valid rows of source and target, (rows,) bool."""
    valid, target_rows = valid_rows(valid, student), valid_rows(target_rows, student)
    return clean(student, valid, dtype=compute_dtype(student)), valid & ~target_rows, valid & target_rows


def _covariance(rows: Tensor, members: Tensor) -> Tensor:
    features = centred(rows, members).T
    return products(features, features) / (members.sum() - 1).clamp(min=1)


def _for_every_row(value: Tensor, source: Tensor, target: Tensor) -> Tensor:
    enough = (source.sum() >= 2) & (target.sum() >= 2)
    return torch.where((source | target) & enough, value, 0.0)
