"""Sequences brought to one shape: other lengths of frames and patches, other numbers of heads, one vector of many."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.features import POOLINGS


def resample_positions(features: Tensor, length: int, *, prefix: int = 0, grid: bool) -> Tensor:
    """The features at `length` positions that cover what theirs cover, interpolated linearly between them.

    Args:
        features: (batch, positions, width).
        length: positions wanted, the special ones included.
        prefix: how many special positions (CLS, distillation token, registers) come first in both sequences; they
            are kept as they are.
        grid: whether the other positions are the patches of a square image, row by row; else frames in time.

    Returns: (batch, length, width); the same tensor where the length is right already.

    Raises:
        ValueError: fewer positions than special ones; patches that are no square on either side.
    """
    positions = features.shape[1]
    if positions == length:
        return features
    for name, number in (("there are", positions), ("are wanted", length)):
        _check_positions(number, prefix, grid, name)
    special, rest = features[:, :prefix], features[:, prefix:].transpose(1, 2)
    if grid:
        sides = [math.isqrt(number - prefix) for number in (positions, length)]
        squares = rest.unflatten(2, (sides[0], sides[0]))
        resampled = F.interpolate(squares, size=(sides[1], sides[1]), mode="bilinear").flatten(2)
    else:
        resampled = F.interpolate(rest, size=length - prefix, mode="linear")
    return torch.cat([special, resampled.transpose(1, 2)], dim=1)


def stretch_frames(features: Tensor, frames: Tensor, wanted: Tensor) -> Tensor:
    """The features of each sequence's real frames, interpolated linearly at the real frames of another length.

    However far either side is padded, padding has no part in a real frame, and moves none. Without padding it is
    `resample_positions`.

    Args:
        features: (batch, length, width).
        frames: (batch, length) bool: the real ones, without gaps.
        wanted: (batch, another length) bool: likewise, those of the sequences that the features are compared with.

    Returns: (batch, another length, width); at positions that are not real, the nearest real frame.
    """
    counts, wanted_counts = (mask.sum(1, keepdim=True) for mask in (frames, wanted))
    first, wanted_first = (mask.int().argmax(1, keepdim=True) for mask in (frames, wanted))
    place = torch.arange(wanted.shape[1], device=features.device) - wanted_first + 0.5
    place = place * (counts / wanted_counts.clamp(min=1)) - 0.5
    last = (counts - 1).clamp(min=0)
    place = torch.minimum(place.clamp(min=0), last)
    before = place.floor().long()
    after = torch.minimum(before + 1, last)
    start, end = (
        features.gather(1, (first + index).unsqueeze(-1).expand(-1, -1, features.shape[2]))
        for index in (before, after)
    )
    return torch.lerp(start, end, (place - before).unsqueeze(-1).to(features.dtype))


def regroup_heads(features: Tensor, relation_heads: int) -> Tensor:
    """The features of all heads of a position, divided anew among `relation_heads` heads.

    Args:
        features: (batch, heads, length, width): queries, keys or values.
        relation_heads: must divide heads * width.

    Returns: (batch, relation_heads, length, heads * width / relation_heads).

    Raises:
        ValueError: the heads cannot share the features evenly.
    Source: MiniLMv2, Wang et al. 2021, arXiv:2012.15828, section 3.1: concatenated, then split.
    """
    total = features.shape[1] * features.shape[3]
    if relation_heads < 1 or total % relation_heads:
        valid = [number for number in range(1, total + 1) if total % number == 0]
        raise ValueError(
            f"{total} features ({features.shape[1]} heads of {features.shape[3]}) cannot be divided among "
            f"{relation_heads} relation heads. Valid numbers: {', '.join(map(str, valid))}."
        )
    return features.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)


def pool(features: Tensor, tokens: Tensor | None, how: str) -> Tensor:
    """One vector for a sequence, of its real positions alone; zeros, with a graph, where it has none.

    Args:
        features: (batch, length, width).
        tokens: (batch, length) bool, True where real; None where all are.
        how: `cls` for the first real position, wherever the padding is; `mean`; `max` of each feature.

    Returns: (batch, width), dtype of the features.

    Raises:
        ValueError: an unknown pooling.
    """
    if how not in POOLINGS:
        raise ValueError(f"Unknown pooling {how!r}. Known: {', '.join(POOLINGS)}.")
    if tokens is None:
        tokens = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    real = tokens.unsqueeze(-1)
    if how == "mean":
        total = torch.where(real, features, 0.0).sum(1, dtype=torch.promote_types(features.dtype, torch.float32))
        return (total / tokens.sum(1, keepdim=True).clamp(min=1)).to(features.dtype)
    if how == "max":
        pooled = torch.where(real, features, -torch.inf).amax(1)
    else:
        first = tokens.int().argmax(1)[:, None, None].expand(-1, 1, features.shape[2])
        pooled = features.gather(1, first).squeeze(1)
    return torch.where(tokens.any(1, keepdim=True), pooled, 0.0)


def _check_positions(number: int, prefix: int, grid: bool, name: str) -> None:
    rest = number - prefix
    if rest < 1:
        raise ValueError(f"{number} positions {name}, of which {prefix} special ones leave none to interpolate.")
    if grid and math.isqrt(rest) ** 2 != rest:
        raise ValueError(
            f"{number} positions {name}; without {prefix} special ones (CLS, distillation token, registers) {rest} "
            "patches are left, which are no square grid. Patches can be interpolated between square images, and "
            "between models with as many special tokens; else compare pooled(mean)@hidden or pooled(cls)@hidden."
        )
