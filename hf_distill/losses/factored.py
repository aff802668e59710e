"""Losses between attention maps, summed over each sequence, from the factors of the scores: no map outlives a block.

The gradient of the factors is formed together with the value, while a block of maps is in the cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.losses.attentions import NO_SCORE, attention_kl, attention_mse, check_scores, visible_pairs
from hf_distill.losses.base import compute_dtype
from hf_distill.losses.row_gradient import attach_gradient, may_read
from hf_distill.signals import Scores

# One buffer of scores, at most: half of a core's second-level cache. 4 MiB took 1.2 times as long at length 512. Other
# devices need enough work to hide the launches.
_CPU_BLOCK_BYTES = 2**20
_DEVICE_BLOCK_BYTES = 2**28
# Less than this is taken for this; its exponential is the least that is no special case for a processor.
_LEAST_LOG_PROB = -80.0


def scores_mse_rows(student: Scores, teacher: Scores, *, queries: Tensor, keys: Tensor) -> Tensor:
    """`attention_mse`, summed over the real pairs of each sequence.

    Args:
        student: scores; gradients flow to left and right, and to bias, softcap and sinks at the cost of whole maps.
        teacher: scores of the same batch, heads, queries and keys; carries no gradient.
        queries: (batch, queries) bool, the real ones.
        keys: (batch, keys) bool, the real ones; a pair counts if both its ends are real and both sides see it.

    Returns: (batch,) float32 (float64 if given float64).
    """
    check_scores(student, teacher, keys)
    if not _factors_suffice(student, teacher):
        values = attention_mse(student, teacher, keys=keys)
        return torch.where(queries.unsqueeze(-1), values, 0.0).sum((-2, -1))
    return _summed(student, teacher, queries, keys, _MSE)


def scores_kl_rows(student: Scores, teacher: Scores, *, queries: Tensor, keys: Tensor) -> Tensor:
    """`attention_kl`, and so `minilm_values` and `minilmv2_relations`, summed over the real queries of each sequence.

    Args:
        student: scores; gradients flow to left and right, and to bias, softcap and sinks at the cost of whole maps.
        teacher: scores of the same batch, heads, queries and keys; carries no gradient.
        queries: (batch, queries) bool, the real ones.
        keys: (batch, keys) bool, the real ones.

    Returns: (batch,) float32 (float64 if given float64).
    """
    check_scores(student, teacher, keys)
    if not _factors_suffice(student, teacher) or not (student.sinks is None or teacher.sinks is None):
        return torch.where(queries, attention_kl(student, teacher, keys=keys), 0.0).sum(-1)
    return _summed(student, teacher, queries, keys, _KL)


@dataclass
class _Block:
    """Some heads of some sequences.

    Attributes:
        shape: (sequences, heads, queries, keys); their first two together are the maps.
        left: the student's and the teacher's (maps, queries, width), 0 for masked queries.
        right: their (maps, keys, width), 0 for masked keys.
        scales: what multiplies their products.
        biases: those of student and teacher, None or of `shape`.
        queries: (sequences, 1, queries, 1) bool, the real ones.
        mask: broadcastable to `shape`, as the comparison's `mask` makes it; None where the factors' zeros suffice.
        scratch: (buffers, maps, queries, keys).
        gradients: (maps, queries, width) by the student's left and (maps, keys, width) by its right, to be written;
            None where not asked for.
        weight: what they are multiplied by, besides the scale.
    """

    shape: tuple[int, ...]
    left: list[Tensor]
    right: list[Tensor]
    scales: tuple[float, float]
    biases: list[Tensor | None]
    queries: Tensor
    mask: Tensor | None
    scratch: Tensor
    gradients: list[Tensor | None]
    weight: float

    def write_gradients(self, scores_gradient: Tensor, *, factor: float) -> None:
        """Carries (maps, queries, keys), times `factor` the gradient by the student's scores, on to the factors."""
        for out, gradient, other in zip(
            self.gradients, (scores_gradient, scores_gradient.mT), (self.right[0], self.left[0]), strict=True
        ):
            if out is not None:
                out.baddbmm_(gradient, other, beta=0, alpha=factor * self.weight * self.scales[0])


@dataclass(frozen=True)
class _Comparison:
    """What is summed.

    Attributes:
        function: takes a block, writes the gradients of its maps' values and returns these, (maps, ...).
        mask: takes a block's part of `visible_pairs`, and the dtype.
        always_masked: whether zeros in the factors do not hide a key.
        buffers: how many maps' scratch it needs per map.
    """

    function: Callable[[_Block], Tensor]
    mask: Callable[[Tensor, torch.dtype], Tensor]
    always_masked: bool
    buffers: int


def _squared_differences(block: _Block) -> Tensor:
    if _grams_pay(block):
        return _squared_differences_by_grams(block)
    difference = torch.bmm(block.left[1], block.right[1].mT, out=block.scratch[0])
    own = block.left[0], block.right[0].mT
    torch.baddbmm(difference, *own, beta=-block.scales[1], alpha=block.scales[0], out=difference)
    maps = difference.view(block.shape)
    for bias, sign in zip(block.biases, (1, -1), strict=True):
        if bias is not None:
            maps.addcmul_(bias, block.queries.to(bias.dtype), value=sign)
    if block.mask is not None:
        # What is not a number can only come from real positions here, and each of them is in a pair that counts.
        maps.mul_(block.mask)
    block.write_gradients(difference, factor=2.0)
    return torch.linalg.vector_norm(difference, dim=-1).square_()


def _squared_differences_by_grams(block: _Block) -> Tensor:
    # Q_s K_s^T - Q_t K_t^T is half of [Q_s - Q_t, Q_s + Q_t] [K_s + K_t, K_s - K_t]^T, and |A B^T|^2 = <A^T A, B^T B>.
    # Written in the differences, no term of the Grams is larger than their sum when the teacher's factors come near.
    width = block.left[0].shape[-1]
    own, other = (factor * scale for factor, scale in zip(block.left, block.scales, strict=True))
    left = torch.cat([own - other, own + other], -1)
    right = torch.cat([block.right[0] + block.right[1], block.right[0] - block.right[1]], -1)
    grams = left.mT @ left, right.mT @ right
    scales = (block.scales[0], 1.0)
    for out, factor, gram, scale in zip(block.gradients, (left, right), grams[::-1], scales, strict=True):
        if out is not None:
            # The other factor's student part is half the sum of its two halves.
            part = gram[..., :width] + gram[..., width:]
            out.baddbmm_(factor, part, beta=0, alpha=block.weight * scale / 2)
    return (grams[0] * grams[1]).sum((-2, -1)) / 4


def _grams_pay(block: _Block) -> bool:
    # Grams cost length * width², maps length² * width: from four widths on, a third to two thirds less time on a CPU.
    # Elsewhere the products may be of lower precision (TF32), which the sums over Grams would carry into the value.
    widths = [factor.shape[-1] for factor in block.left]
    long_enough = min(block.shape[2:]) >= 4 * widths[0] == 4 * widths[1]
    return long_enough and block.mask is None and block.biases == [None, None] and may_read(block.left[0])


def _divergences(block: _Block) -> Tensor:
    # A masked query has the same score for every key that it sees, on both sides, and a query that sees none has
    # NO_SCORE everywhere: the two distributions are equal, so that value and gradient are exactly 0.
    student, teacher, scratch = block.scratch
    for left, right, scale, bias, out in zip(
        block.left, block.right, block.scales, block.biases, (student, teacher), strict=True
    ):
        products = torch.baddbmm(scratch, left, right.mT, beta=0, alpha=scale, out=scratch)
        scores = products.view(block.shape)
        if bias is not None:
            scores.addcmul_(bias, block.queries.to(bias.dtype))
        if block.mask is not None:
            scores.add_(block.mask)
        torch.log_softmax(products, -1, out=out)
    teacher_probs = _exponential(teacher, out=scratch)
    values = teacher.sub_(student).mul_(teacher_probs).sum(-1)
    if block.gradients != [None, None]:
        block.write_gradients(_exponential(student, out=teacher).sub_(teacher_probs), factor=1.0)
    return values


def _exponential(log_probs: Tensor, *, out: Tensor) -> Tensor:
    # A CPU's exp is ten times slower where it underflows, as it does for every masked key.
    return torch.clamp(log_probs, min=_LEAST_LOG_PROB, out=out).exp_()


_MSE = _Comparison(
    _squared_differences,
    mask=lambda visible, dtype: visible.to(dtype),
    always_masked=False,
    buffers=1,
)
_KL = _Comparison(
    _divergences,
    mask=lambda visible, dtype: torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, NO_SCORE
    ),
    always_masked=True,
    buffers=3,
)


def _factors_suffice(student: Scores, teacher: Scores) -> bool:
    # The gradient of a bias is a map itself, and a soft cap stands between the products and the scores.
    trained = torch.is_grad_enabled() and student.bias is not None and student.bias.requires_grad
    return not trained and student.softcap is None and teacher.softcap is None


def _summed(student: Scores, teacher: Scores, queries: Tensor, keys: Tensor, comparison: _Comparison) -> Tensor:
    """(batch,) the comparison's values, as a sum over the queries and a mean over the heads."""
    factors = student.left, student.right.expand(-1, student.heads, -1, -1)
    dtype = compute_dtype(*factors, teacher.left, teacher.right)
    values = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    gradients = [
        torch.zeros(factor.shape, dtype=dtype, device=keys.device)
        if torch.is_grad_enabled() and factor.requires_grad
        else None
        for factor in factors
    ]
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        for chosen, block in _blocks(student, teacher, queries, keys, gradients, comparison):
            block_values = comparison.function(block).view(block.shape[0], -1)
            values[chosen] += block_values.sum(-1) / student.heads
    total = values
    for factor, direction in zip(factors, gradients, strict=True):
        if direction is not None:
            zeros = values.new_zeros(factor.shape[:3])
            scale = torch.ones_like(zeros).unsqueeze(-1)
            total = total + attach_gradient(zeros, factor, direction=direction, scale=scale).sum((1, 2))
    return total


def _blocks(
    student: Scores,
    teacher: Scores,
    queries: Tensor,
    keys: Tensor,
    gradients: list[Tensor | None],
    comparison: _Comparison,
) -> Iterator[tuple[slice, _Block]]:
    """The blocks, each with its sequences; the next one overwrites its scratch."""
    full = (*student.left.shape[:3], keys.shape[1])
    dtype = compute_dtype(student.left, student.right, teacher.left, teacher.right)
    lefts = [side.left.to(dtype) for side in (student, teacher)]
    rights = [side.right.to(dtype).expand(-1, full[1], -1, -1) for side in (student, teacher)]
    biases = [None if side.bias is None else side.bias.expand(full) for side in (student, teacher)]
    visible = visible_pairs(student, teacher, keys)
    same_keys = visible.shape[1:3] == (1, 1)
    if same_keys:
        keys = visible[:, 0, 0]
    always_masked = not same_keys or biases != [None, None]
    visible = visible.expand(-1, -1, full[2], -1)
    scratch = torch.empty(0, dtype=dtype, device=keys.device)
    for part in _parts(queries, keys, heads=full[1], itemsize=dtype.itemsize):
        at_rows, at_columns = (part.sequences, part.heads, part.rows), (part.sequences, part.heads, part.columns)
        at_pairs = (*at_rows, part.columns)
        at_visible = (part.sequences, part.heads if visible.shape[1] > 1 else slice(None), part.rows, part.columns)
        own_queries, own_keys = queries[part.sequences, part.rows], keys[part.sequences, part.columns]
        shape = (len(own_queries), part.heads.stop - part.heads.start, own_queries.shape[1], own_keys.shape[1])
        size = comparison.buffers * math.prod(shape)
        scratch = scratch if len(scratch) >= size else torch.empty(size, dtype=dtype, device=keys.device)
        masked = always_masked or (comparison.always_masked and part.has_holes)
        yield (
            part.sequences,
            _Block(
                shape=shape,
                left=[_maps(left[at_rows], own_queries, clear=part.has_holes) for left in lefts],
                right=[_maps(right[at_columns], own_keys, clear=part.has_holes) for right in rights],
                scales=(student.scale, teacher.scale),
                biases=[None if bias is None else bias[at_pairs] for bias in biases],
                queries=own_queries[:, None, :, None],
                mask=comparison.mask(visible[at_visible], dtype) if masked else None,
                scratch=scratch[:size].view(comparison.buffers, -1, *shape[2:]),
                gradients=[
                    None if out is None else out[at].flatten(0, 1)
                    for out, at in zip(gradients, (at_rows, at_columns), strict=True)
                ],
                weight=1 / full[1],
            ),
        )


@dataclass(frozen=True)
class _Part:
    """Where a block is, and whether any of its positions may be masked."""

    sequences: slice
    heads: slice
    rows: slice
    columns: slice
    has_holes: bool


def _parts(queries: Tensor, keys: Tensor, *, heads: int, itemsize: int) -> Iterator[_Part]:
    """Covers all pairs of real positions; one sequence at a time, without its padding, where the host may look."""
    batch, rows, columns = *queries.shape, keys.shape[1]
    if may_read(keys):
        for sequence, (own, other) in enumerate(zip(_spans(queries), _spans(keys), strict=True)):
            (first_row, end_row, row_holes), (first_column, end_column, column_holes) = own, other
            map_bytes = (end_row - first_row) * (end_column - first_column) * itemsize
            group = _heads_per_block(heads, _CPU_BLOCK_BYTES // max(1, map_bytes))
            for head in range(0, heads if map_bytes else 0, group):
                yield _Part(
                    sequences=slice(sequence, sequence + 1),
                    heads=slice(head, head + group),
                    rows=slice(first_row, end_row),
                    columns=slice(first_column, end_column),
                    has_holes=row_holes or column_holes,
                )
        return
    fitting = _DEVICE_BLOCK_BYTES // max(1, rows * columns * itemsize)
    group, sequences = _heads_per_block(heads, fitting), max(1, fitting // heads)
    for first in range(0, batch, sequences):
        for head in range(0, heads, group):
            chosen = slice(first, min(first + sequences, batch)), slice(head, head + group)
            yield _Part(*chosen, slice(0, rows), slice(0, columns), has_holes=True)


def _spans(real: Tensor) -> list[tuple[int, int, bool]]:
    """For each sequence of (batch, positions): the first real position, the one after the last, and holes between."""
    numbers = torch.arange(1, real.shape[1] + 1)
    ends = (real * numbers).amax(-1)
    firsts = real.shape[1] - (real * numbers.flip(0)).amax(-1)
    holes = real.sum(-1) < ends - firsts
    return [
        (min(first, end), end, hole)
        for first, end, hole in zip(firsts.tolist(), ends.tolist(), holes.tolist(), strict=True)
    ]


def _heads_per_block(heads: int, fitting: int) -> int:
    return max(group for group in range(1, max(1, min(heads, fitting)) + 1) if heads % group == 0)


def _maps(factor: Tensor, real: Tensor, *, clear: bool) -> Tensor:
    """(sequences * heads, positions, width): the factor, and if asked 0 at the masked of (sequences, positions)."""
    if clear:
        factor = factor.clone(memory_format=torch.contiguous_format)
        # On a CPU masked_fill_ takes ten times as long where the mask is broadcast; elsewhere nonzero would wait.
        if may_read(real):
            factor.transpose(1, 2).index_put_((~real).nonzero(as_tuple=True), factor.new_zeros(()))
        else:
            factor.masked_fill_(~real[:, None, :, None], 0.0)
    return factor.flatten(0, 1)
