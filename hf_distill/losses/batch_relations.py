"""Losses on the relations between the sequences of a batch: (rows, width) vectors in, one value per row out.

A row's value depends on the other rows, and the mean over the valid rows is the published loss. Rows that are not
valid neither have a value nor enter anybody else's, even where they hold NaN. Too few valid rows for a relation give 0
with a graph. Only the student gets a gradient. Where teacher and student widths may differ, the relations are compared
and no projection is needed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_distill.losses.base import compute_dtype, register_loss

# Angles at a block of anchors need tensors of (anchors, rows, max(rows, width)) numbers; this bounds each of them.
_ANGLE_BLOCK_NUMBERS = 2**22


@register_loss("rkd_distance", feature="batch", item="sequence", paper="Park et al. 2019, arXiv:1904.05068")
def rkd_distance(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Smooth L1 between the distances of student rows and of teacher rows, each relative to their mean.

    The mean is over the distances above 0. Rotating, moving or scaling all rows changes nothing. Equal rows have
    distance 0 and get no gradient from it.

    Args:
        student: (rows, width).
        teacher: (rows, teacher width).
        valid: (rows,) bool, the rows that count; None counts all. Fewer than 2 give 0.

    Returns: (rows,) float32: the mean over the valid rows, the row itself included. That is the authors' code, which
        averages over all rows² pairs; over pairs of different rows it would be rows / (rows - 1) times as much.
    Source: Park et al. 2019, arXiv:1904.05068, eq. 5-8. The paper sums over the pairs.
    """
    student, teacher, valid = _clean_pair(student, teacher, valid)
    pairs = valid.unsqueeze(-1) & valid
    values = F.smooth_l1_loss(
        _relative_distances(student, pairs), _relative_distances(teacher, pairs), reduction="none"
    )
    return values.sum(-1) / _at_least_one(valid.sum())


@register_loss("rkd_angle", feature="batch", item="sequence", paper="Park et al. 2019, arXiv:1904.05068")
def rkd_angle(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Smooth L1 between the cosines of the angles that two rows have seen from a third, in student and teacher.

    Rotating, moving or scaling all rows changes nothing. A direction between equal rows is the vector 0 and gets no
    gradient. Time grows with rows³. Memory does not: angles are formed for a block of anchors at a time, and where
    there are several blocks, each is formed again in backward.

    Args:
        student: (rows, width).
        teacher: (rows, teacher width).
        valid: (rows,) bool, the rows that count; None counts all. Fewer than 3 give 0.

    Returns: (rows,) float32: at each anchor, the mean over all valid rows² pairs of the others. That is the authors'
        code, which averages over rows³; over triples of different rows it would be rows² / ((rows - 1) (rows - 2))
        times as much.
    Source: Park et al. 2019, arXiv:1904.05068, eq. 9-11. The paper sums over the triples.
    """
    student, teacher, valid = _clean_pair(student, teacher, valid)
    rows = len(valid)
    pairs = (valid.unsqueeze(-1) & valid).logical_and_(~torch.eye(rows, dtype=torch.bool, device=valid.device))
    block = max(1, _ANGLE_BLOCK_NUMBERS // max(1, rows * max(rows, student.shape[-1], teacher.shape[-1])))
    if rows <= block:
        values = _angle_differences(student, teacher, student, teacher, pairs)
    else:
        anchors = zip(student.split(block), teacher.split(block), strict=True)
        values = torch.cat(
            [
                checkpoint(
                    _angle_differences, student, teacher, *own, pairs, use_reentrant=False, preserve_rng_state=False
                )
                for own in anchors
            ]
        )
    return torch.where(valid, values, 0.0) / _at_least_one(valid.sum()).square()


@register_loss("similarity_preserving", feature="batch", item="sequence", paper="Tung & Mori 2019, arXiv:1907.09682")
def similarity_preserving(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Squared difference between the rows' similarities to each other, in student and teacher.

    The similarities are dot products, and those of each row are divided by their norm. Rotating or scaling all rows
    changes nothing; moving them does.

    Args:
        student: (rows, width).
        teacher: (rows, teacher width).
        valid: (rows,) bool, the rows that count; None counts all. A single one has the value 0.

    Returns: (rows,) float32: the sum over the other row of the pair, divided by the number of valid rows.
    Source: Tung & Mori 2019, arXiv:1907.09682, eq. 1-4: the mean over rows².
    """
    student, teacher, valid = _clean_pair(student, teacher, valid)
    difference = _unit(products(student, student)) - _unit(products(teacher, teacher))
    return difference.square().sum(-1) / _at_least_one(valid.sum())


@register_loss("cka", feature="batch", item="sequence", paper="Kornblith et al. 2019, arXiv:1905.00414")
def cka(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """1 - linear CKA of student and teacher rows, the same for every valid row.

    Rotating, moving or scaling all rows changes nothing. Any two rows have the CKA 1: three are needed to differ, and
    it stays near 1 where rows are much fewer than features. Teacher rows that are all equal give 0; student rows that
    are all equal give 1/2 and get no gradient, as their CKA is 0 / 0.

    Args:
        student: (rows, width).
        teacher: (rows, teacher width).
        valid: (rows,) bool, the rows that count; None counts all.

    Returns: (rows,) float32 in [0, 1], exactly 0 for equal rows.
    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3: linear kernels, centred, the biased estimate of HSIC.
    """
    student, teacher, valid = _clean_pair(student, teacher, valid)
    student, teacher = centred(student, valid), centred(teacher, valid)
    student_kernel, teacher_kernel = (_unit(products(rows, rows).flatten()) for rows in (student, teacher))
    # Half the squared distance of unit vectors is 1 - cosine, without its cancellation near 0.
    value = (student_kernel - teacher_kernel).square().sum() / 2
    return torch.where(valid & teacher_kernel.any(), value, 0.0)


@register_loss(
    "contrastive",
    feature="batch",
    item="sequence",
    paper="Tian et al. 2020, arXiv:1910.10699; van den Oord et al. 2018, arXiv:1807.03748",
)
def contrastive(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, contrast_temperature: float = 0.07
) -> Tensor:
    """Cross-entropy, in nats, of each student row picking its own teacher row among those of the batch.

    It picks by cosine. With n valid rows, log n is the value of rows that tell nothing; equal rows do not give 0.
    Texts that occur twice in a batch are told apart in vain.

    Args:
        student: (rows, width).
        teacher: (rows, width), the same width.
        valid: (rows,) bool, the rows that count; None counts all. A single one has the value 0.
        contrast_temperature: > 0, divides the cosines. It is no temperature of logits and multiplies nothing.

    Returns: (rows,) float32.
    Source: InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, eq. 4, on the pairs of Tian et al. 2020 (CRD),
        arXiv:1910.10699, with the other rows of the batch in place of their memory bank of negatives.
    """
    if not contrast_temperature > 0:
        raise ValueError(f"contrast_temperature is {contrast_temperature}; expected a number above 0, such as 0.07.")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"The student's rows have width {student.shape[-1]}, the teacher's {teacher.shape[-1]}; contrastive "
            "compares them by cosine. Give the match a projection."
        )
    student, teacher, valid = _clean_pair(student, teacher, valid)
    scores = products(_unit(student), _unit(teacher)) / contrast_temperature
    # Its own teacher row stays a candidate even where it is not valid: a row without any would have NaN gradients.
    candidates = valid | torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    scores = scores.masked_fill(~candidates, -torch.inf)
    return torch.where(valid, scores.logsumexp(-1) - scores.diagonal(), 0.0)


def valid_rows(valid: Tensor | None, rows: Tensor) -> Tensor:
    """(rows,) bool: `valid`, checked against the (rows, width) it is for, or True throughout for None."""
    if rows.dim() != 2:
        raise ValueError(
            f"Rows have shape {tuple(rows.shape)}; expected (rows, width), one vector per sequence. Pool the "
            "features, as in pooled(mean)@hidden[-1]."
        )
    if valid is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if valid.dtype != torch.bool or valid.shape != rows.shape[:1]:
        raise ValueError(
            f"A choice of rows has shape {tuple(valid.shape)} and dtype {valid.dtype}; expected "
            f"({len(rows)},) and torch.bool, one value per row."
        )
    return valid


def clean(rows: Tensor, valid: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(rows, width) in `dtype` with 0 in place of the rows that are not valid, whatever they hold."""
    return torch.where(valid.unsqueeze(-1), rows.to(dtype), 0.0)


def centred(rows: Tensor, members: Tensor) -> Tensor:
    """(rows, width) less the mean of the members, (rows,) bool; 0 for the others."""
    members = members.unsqueeze(-1)
    mean = torch.where(members, rows, 0.0).sum(0) / _at_least_one(members.sum())
    return torch.where(members, rows - mean, 0.0)


def distances(rows: Tensor) -> Tensor:
    """(rows, rows) Euclidean distances of (rows, width); the gradient at distance 0 is 0."""
    # By matrix products, torch's choice above 25 rows, distances of 1e-3 of the norm are noise in float32.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def products(left: Tensor, right: Tensor) -> Tensor:
    """The dot products of (..., n, width) and (..., m, width), (..., n, m), in their dtype even under autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.transpose(-1, -2)


def _clean_pair(student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    valid = valid_rows(valid, student)
    if teacher.dim() != 2 or len(teacher) != len(student):
        raise ValueError(
            f"The student's rows have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; expected "
            "(rows, width) and (rows, teacher width) of the same sequences."
        )
    dtype = compute_dtype(student, teacher)
    return clean(student, valid, dtype=dtype), clean(teacher.detach(), valid, dtype=dtype), valid


def _at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)


def _unit(vectors: Tensor) -> Tensor:
    """(..., width) divided by their norms; the vector 0 stays and gets no gradient."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, 0.0, vectors / torch.where(norms == 0, 1.0, norms))


def _relative_distances(rows: Tensor, pairs: Tensor) -> Tensor:
    """(rows, rows) distances over the mean of those above 0; 0 outside the pairs."""
    apart = torch.where(pairs, distances(rows), 0.0)
    mean = apart.sum() / _at_least_one((apart > 0).sum())
    return apart / torch.where(mean == 0, 1.0, mean)


def _angle_differences(
    student: Tensor,  # (rows, width)
    teacher: Tensor,  # (rows, teacher width)
    student_anchors: Tensor,  # (anchors, width)
    teacher_anchors: Tensor,  # (anchors, teacher width)
    pairs: Tensor,  # (rows, rows) bool
) -> Tensor:
    """(anchors,) sums over the pairs of rows."""
    student_cosines, teacher_cosines = (
        products(directions, directions)
        for directions in (_unit(student - student_anchors[:, None]), _unit(teacher - teacher_anchors[:, None]))
    )
    values = F.smooth_l1_loss(student_cosines, teacher_cosines, reduction="none")
    return torch.where(pairs, values, 0.0).sum((-1, -2))
