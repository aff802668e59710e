"""Losses between attention maps, summed over each sequence, from the factors of the scores: no map outlives a block.

The gradient of the factors is formed together with the value, while a block of maps is in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.losses.attentions import NO_SCORE, attention_kl, attention_mse, check_scores, visible_pairs
from hf_distill.losses.base import compute_dtype
from hf_distill.losses.row_gradient import attach_gradient, may_read
from hf_distill.signals import Scores

# One buffer of scores: half of a core's second-level cache. 4 MiB took 1.2 times as long at length 512, 256 KiB 1.8
# times at length 128. Other devices need enough work to hide the launches.
_CPU_BLOCK_BYTES = 2**20
_DEVICE_BLOCK_BYTES = 2**28


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
    visible = visible_pairs(student, teacher, keys)
    no_bias = student.bias is None and teacher.bias is None
    comparison = _GRAM if no_bias and _grams_pay(student, teacher, visible) else _MSE
    return _summed(student, teacher, queries, keys, visible, comparison)


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
    return _summed(student, teacher, queries, keys, visible_pairs(student, teacher, keys), _KL)


@dataclass
class _Block:
    """Some heads of some sequences, in tensors made for it.

    Attributes:
        shape: (sequences, heads, queries, keys); their first two together are the maps.
        width: the student's, the first part of the factors.
        left: (maps, queries, width + the teacher's), scaled, 0 for masked queries.
        right: (maps, keys, width + the teacher's), 0 for masked keys.
        biases: those of student and teacher, None or of `shape`.
        queries: (sequences, 1, queries, 1), 1 for the real ones, else 0.
        mask: broadcastable to `shape`, as the comparison's `mask` makes it; None where the factors' zeros suffice.
        scratch: (buffers, maps, queries, keys).
        gradients: (maps, queries, width) by the student's left and (maps, keys, width) by its right, to be written;
            None where not asked for.
        weights: what each of them is multiplied by.
    """

    shape: tuple[int, ...]
    width: int
    left: Tensor
    right: Tensor
    biases: list[Tensor | None]
    queries: Tensor
    mask: Tensor | None
    scratch: Tensor
    gradients: list[Tensor | None]
    weights: tuple[float, float]

    def write_gradients(self, scores_gradient: Tensor, *, factor: float) -> None:
        """Carries (maps, queries, keys), times `factor` the gradient by the student's scores, on to the factors."""
        for out, gradient, other, weight in zip(
            self.gradients, (scores_gradient, scores_gradient.mT), (self.right, self.left), self.weights, strict=True
        ):
            if out is not None:
                out.baddbmm_(gradient, other[..., : self.width], beta=0, alpha=factor * weight)


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
    # The difference of two products is one product of wider factors.
    block.left[..., block.width :].neg_()
    difference = torch.bmm(block.left, block.right.mT, out=block.scratch[0])
    maps = difference.view(block.shape)
    for bias, sign in zip(block.biases, (1, -1), strict=True):
        if bias is not None:
            maps.addcmul_(bias, block.queries, value=sign)
    if block.mask is not None:
        # What is not a number can only come from real positions here, and each of them is in a pair that counts.
        maps.mul_(block.mask)
    block.write_gradients(difference, factor=2.0)
    return torch.linalg.vector_norm(difference, dim=-1).square_()


def _squared_differences_by_grams(block: _Block) -> Tensor:
    # Q_s K_s^T - Q_t K_t^T is half of [Q_s - Q_t, Q_s + Q_t] [K_s + K_t, K_s - K_t]^T, and |A B^T|^2 = <A^T A, B^T B>.
    # Written in the differences, no term of the Grams is larger than their sum when the teacher's factors come near.
    width = block.width
    left, right = (
        torch.cat(
            [factor[..., :width] - sign * factor[..., width:], factor[..., :width] + sign * factor[..., width:]], -1
        )
        for factor, sign in ((block.left, 1), (block.right, -1))
    )
    grams = left.mT @ left, right.mT @ right
    for out, factor, other, weight in zip(block.gradients, (left, right), grams[::-1], block.weights, strict=True):
        if out is not None:
            # The other factor's student part is half the sum of its two halves.
            out.baddbmm_(factor, other[..., :width] + other[..., width:], beta=0, alpha=weight / 2)
    return (grams[0] * grams[1]).sum((-2, -1)) / 4


def _divergences(block: _Block) -> Tensor:
    # A masked query has the same score for every key that it sees, on both sides, and a query that sees none has
    # NO_SCORE everywhere: the two distributions are equal, so that value and gradient are exactly 0.
    student, teacher, scratch = block.scratch
    for bias, columns, out in (
        (block.biases[0], slice(None, block.width), student),
        (block.biases[1], slice(block.width, None), teacher),
    ):
        scores = torch.bmm(block.left[..., columns], block.right[..., columns].mT, out=scratch).view(block.shape)
        if bias is not None:
            scores.addcmul_(bias, block.queries)
        if block.mask is not None:
            scores.add_(block.mask)
        torch.log_softmax(scores.view_as(out), -1, out=out)
    # A CPU's exp is ten times slower where it underflows, as it does for every masked key; softmax is not.
    teacher_probs = torch.softmax(teacher, -1, out=scratch)
    values = teacher.sub_(student).mul_(teacher_probs).sum(-1)
    if block.gradients != [None, None]:
        block.write_gradients(torch.softmax(student, -1, out=teacher).sub_(teacher_probs), factor=1.0)
    return values


_MSE = _Comparison(
    _squared_differences,
    mask=lambda visible, dtype: visible.to(dtype),
    always_masked=False,
    buffers=1,
)
_GRAM = replace(_MSE, function=_squared_differences_by_grams, buffers=0)
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


def _grams_pay(student: Scores, teacher: Scores, visible: Tensor) -> bool:
    # Grams cost length * width², maps length² * width. On a CPU they took 1.3 times the time of maps at a length of 4
    # widths (256 and 64), 0.7 at 6, 0.6 at 8 and 0.4 at 16. Elsewhere products may be of lower precision (TF32), which
    # sums over Grams would carry into the value.
    width = student.left.shape[-1]
    all_see_the_same = visible.shape[1:3] == (1, 1)
    long_enough = min(student.left.shape[2], visible.shape[3]) >= 6 * width
    return all_see_the_same and long_enough and teacher.left.shape[-1] == width and may_read(visible)


def _summed(
    student: Scores, teacher: Scores, queries: Tensor, keys: Tensor, visible: Tensor, comparison: _Comparison
) -> Tensor:
    """(batch,) the comparison's values, as a sum over the queries and a mean over the heads."""
    factors = student.left, student.right.expand(-1, student.heads, -1, -1)
    dtype = compute_dtype(*factors, teacher.left, teacher.right)
    values = torch.zeros(keys.shape[0], dtype=dtype, device=keys.device)
    gradients = [
        torch.empty(factor.shape, dtype=dtype, device=keys.device)
        if torch.is_grad_enabled() and factor.requires_grad
        else None
        for factor in factors
    ]
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        for chosen, block in _blocks(student, teacher, queries, keys, visible, gradients, comparison):
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
    visible: Tensor,
    gradients: list[Tensor | None],
    comparison: _Comparison,
) -> Iterator[tuple[slice, _Block]]:
    """The blocks, each with its sequences; the next one overwrites it."""
    dtype = compute_dtype(student.left, student.right, teacher.left, teacher.right)
    full = batch, heads, rows, columns = *student.left.shape[:3], keys.shape[1]
    width, both = student.left.shape[-1], student.left.shape[-1] + teacher.left.shape[-1]
    map_bytes = (rows * columns if comparison.buffers else max(rows, columns) * both) * dtype.itemsize
    sequences, group = _block_size(batch, heads, map_bytes, cpu=may_read(keys))
    left = torch.empty(sequences, group, rows, both, dtype=dtype, device=keys.device)
    right = torch.empty(sequences, group, columns, both, dtype=dtype, device=keys.device)
    scratch = torch.empty(comparison.buffers, sequences * group, rows, columns, dtype=dtype, device=keys.device)
    rights = [side.right.expand(-1, heads, -1, -1) for side in (student, teacher)]
    biases = [None if side.bias is None else side.bias.expand(full) for side in (student, teacher)]
    same_keys = visible.shape[1:3] == (1, 1)
    keys = visible[:, 0, 0] if same_keys else keys
    masked = comparison.always_masked or not same_keys or biases != [None, None]
    for first in range(0, batch, sequences):
        chosen = slice(first, min(first + sequences, batch))
        count = chosen.stop - first
        mask = comparison.mask(visible[chosen], dtype) if masked else None
        for head in range(0, heads, group):
            part = chosen, slice(head, head + group)
            for factors, sources, real in (
                (left[:count], (student.left, teacher.left), queries[chosen]),
                (right[:count], rights, keys[chosen]),
            ):
                factors[..., :width] = sources[0][part]
                factors[..., width:] = sources[1][part]
                _clear(factors, ~real)
            left[:count, ..., :width] *= student.scale
            left[:count, ..., width:] *= teacher.scale
            yield (
                chosen,
                _Block(
                    shape=(count, group, rows, columns),
                    width=width,
                    left=left[:count].flatten(0, 1),
                    right=right[:count].flatten(0, 1),
                    biases=[None if bias is None else bias[part] for bias in biases],
                    queries=queries[chosen, None, :, None].to(dtype),
                    mask=mask[:, part[1]] if mask is not None and mask.shape[1] > 1 else mask,
                    scratch=scratch[:, : count * group],
                    gradients=[None if out is None else out[part].flatten(0, 1) for out in gradients],
                    weights=(student.scale / heads, 1 / heads),
                ),
            )


def _clear(factors: Tensor, masked: Tensor) -> None:
    """Sets (sequences, heads, positions, width) to 0 at the masked ones of (sequences, positions)."""
    # On a CPU masked_fill_ takes ten times as long where the mask is broadcast; elsewhere nonzero would wait.
    if may_read(masked):
        factors.transpose(1, 2).index_put_(masked.nonzero(as_tuple=True), factors.new_zeros(()))
    else:
        factors.masked_fill_(masked[:, None, :, None], 0.0)


def _block_size(batch: int, heads: int, map_bytes: int, *, cpu: bool) -> tuple[int, int]:
    """How many sequences, and how many heads of each, make a block; heads are split where one sequence is too many."""
    budget = _CPU_BLOCK_BYTES if cpu else _DEVICE_BLOCK_BYTES
    fitting = max(1, budget // max(1, map_bytes))
    if fitting >= heads:
        return max(1, min(batch, fitting // heads)), heads
    return 1, max(group for group in range(1, fitting + 1) if heads % group == 0)
