"""Losses between the relations of the words of a sequence, of vectors of any two widths (CKD)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.attentions import kl_of_rows
from hf_distill.losses.base import compute_dtype, register_loss

_PAPER = "CKD, Park et al. 2021, arXiv:2109.08359"


@register_loss("ckd_pairs", feature="tokens", item="token", paper=_PAPER)
def ckd_pairs(student: Tensor, teacher: Tensor, *, tokens: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over a token's cosines with all others of its sequence, in nats.

    Args:
        student: (batch, length, width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (batch, length, another width); carries no gradient.
        tokens: (batch, length) bool, the real ones; the others enter no relation.

    Returns: (batch, length) float32, >= 0; 0 for tokens that are not real, or alone.
    Source: CKD, arXiv:2109.08359, eq. 1-2: the pair-wise word relation. The measure and the difference are those that
        the authors' code takes by default, cosines without the token's own and KL; it divides the sum by the square
        of the length, that is, the mean over the tokens by the length once more.
    """
    dtype = _check_tokens(student, teacher, tokens)
    others = ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        student_cosines = _cosines(_real(student, tokens, dtype))
        with torch.no_grad():
            teacher_cosines = _cosines(_real(teacher, tokens, dtype))
        values = kl_of_rows(student_cosines, teacher_cosines, tokens.unsqueeze(1) & others)
    return torch.where(tokens, values, 0.0)


@register_loss("ckd_angles", feature="tokens", item="token", paper=_PAPER)
def ckd_angles(student: Tensor, teacher: Tensor, *, tokens: Tensor, window: int = 21) -> Tensor:
    """The squared difference of the cosines of the angles at a token, as a mean over the pairs of its neighbours.

    Time and memory grow with length * window * (width + window).

    Args:
        student: (batch, length, width), any float dtype; computed in float32 (float64 if given float64).
        teacher: (batch, length, another width); carries no gradient.
        tokens: (batch, length) bool, the real ones; the others enter no relation.
        window: how many tokens are seen together, the one in the middle included; odd, at least 3.

    Returns: (batch, length) float32, from 0 to 4; 0 for tokens that are not real, or have fewer than two neighbours.
    Source: CKD, arXiv:2109.08359, eq. 1 and 3: the triple-wise word relation, in a local window. Window and squared
        difference are the defaults of the authors' code, which also counts each neighbour's angle with itself, the
        token as its own neighbour, and the padding beside a real token.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window is {window}; expected an odd number, at least 3: a token and as many on each side.")
    dtype = _check_tokens(student, teacher, tokens)
    neighbours = F.pad(tokens, (window // 2, window // 2)).unfold(1, window, 1).clone()
    neighbours[:, :, window // 2] = False
    others = ~torch.eye(window, dtype=torch.bool, device=tokens.device)
    pairs = neighbours.unsqueeze(-1) & neighbours.unsqueeze(-2) & others & tokens[:, :, None, None]
    with torch.autocast(tokens.device.type, enabled=False):
        student_angles = _angles(_real(student, tokens, dtype), window)
        with torch.no_grad():
            teacher_angles = _angles(_real(teacher, tokens, dtype), window)
    squares = torch.where(pairs, student_angles - teacher_angles, 0.0).square()
    return squares.sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def _cosines(vectors: Tensor) -> Tensor:
    """(batch, length, length) cosines between (batch, length, width) vectors; those of zeros are 0."""
    unit = vectors * _inverse_root(vectors.square().sum(-1, keepdim=True))
    return unit @ unit.transpose(-1, -2)


def _angles(vectors: Tensor, window: int) -> Tensor:
    """(batch, length, window, window) cosines of the angles at each vector between those around it."""
    around = F.pad(vectors, (0, 0, window // 2, window // 2)).unfold(1, window, 1)
    rays = (around - vectors.unsqueeze(-1)).transpose(-1, -2)
    products = rays @ rays.transpose(-1, -2)
    inverse = _inverse_root(products.diagonal(dim1=-2, dim2=-1))
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / sqrt, and 0 without a gradient where that is infinite."""
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).rsqrt(), 0.0)


def _real(vectors: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    # Before the products: a NaN at padding would reach every gradient through them.
    return torch.where(tokens.unsqueeze(-1), vectors.to(dtype), 0.0)


def _check_tokens(student: Tensor, teacher: Tensor, tokens: Tensor) -> torch.dtype:
    if student.shape[:-1] != teacher.shape[:-1] or student.shape[:-1] != tokens.shape or tokens.dim() != 2:
        raise ValueError(
            f"The student's vectors have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}, tokens "
            f"{tuple(tokens.shape)}; expected (batch, length, width) and (batch, length) of the same positions. Give "
            "both sides the same tokens; pooled vectors have none."
        )
    if tokens.dtype != torch.bool:
        raise TypeError(f"tokens has dtype {tokens.dtype}; expected torch.bool. Pass tokens.bool().")
    return compute_dtype(student, teacher)
