"""What `head_rows` does to a chunk of logits, as one Triton kernel for GPUs: a program for each row.

A row is read twice, by mixtures three times, and its gradient written once; nothing else of its length exists. Sums
are of powers of 2, relative to the largest logit so far. Before that each side is shifted by the largest logit of its
first block: logits of 1e4 carry an error of 5e-4, and their differences none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_distill.losses.kernel_rows import KernelCase, KernelRows
from hf_distill.losses.mixtures import Mixture

# Four logits of either side per thread, one load each: five programs fit a multiprocessor of Ampere or Hopper.
BLOCK = 1024
_WARPS = 8
_LOG_2, _LOG2_E = tl.constexpr(math.log(2)), tl.constexpr(math.log2(math.e))
_INFINITY = tl.constexpr(math.inf)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_NEARLY_ONE = tl.constexpr(1 - 4 * torch.finfo(torch.float32).eps)  # also after another rounding


class HeadKernel:
    """The kernel for one case."""

    def __init__(self, case: KernelCase) -> None:
        mixture = None
        if isinstance(case.form, Mixture):
            ratio = case.form.teacher_share / case.form.student_share
            spread = case.form.spread_weight / case.form.student_share
            mixture = (ratio, case.form.teacher_weight, case.form.student_weight, spread)
        self._constants = {
            "softcap": case.softcap,
            "teacher_softcap": case.teacher_softcap,
            "is_reverse": case.form == "reverse_kl",
            "mixture": mixture,
            "is_wider": case.is_wider,
            "find_agreement": case.find_agreement,
        }

    def __call__(self, rows: KernelRows, *, teacher_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Writes the gradient; returns (items,) cross-entropies and divergences, float32, and agreements, bool.

        Divergences are without temperature². The gradient is by the logits before the softcap: task weight times that
        of the cross-entropy, and comparison's weight times that of the divergence by the softened logits. A term of
        weight 0 adds nothing to it, whatever its row holds.

        Args:
            rows: of the case.
            teacher_scale: what the teacher's logits are multiplied by after the softcap.
        """
        (items, classes), shared = rows.student.shape, rows.teacher.shape[-1]
        values = rows.weights.new_empty(2, items)
        agreement = rows.targets.new_zeros(items, dtype=torch.bool)
        direction = rows.student if rows.direction is None else rows.direction
        with torch.cuda.device_of(values):
            _rows[(items,)](
                *rows[:-1],
                direction,
                values,
                agreement,
                items,
                classes,
                shared,
                direction.stride(0),
                float(teacher_scale),
                **self._constants,
                gradient=rows.direction is not None,
                block=BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,  # it would leave a rest of p - p where both sides agree
            )
        return values[0], values[1], agreement


# Chunks of other sizes, which begin anywhere, are no reason to compile it again.
@triton.jit(do_not_specialize=["items"], do_not_specialize_on_alignment=["targets"])
def _rows(
    student,
    teacher,
    targets,
    weights,
    direction,
    values,
    agreement,
    items,
    classes,
    shared,
    direction_stride,
    teacher_scale,
    softcap: tl.constexpr,
    teacher_softcap: tl.constexpr,
    is_reverse: tl.constexpr,
    mixture: tl.constexpr,
    is_wider: tl.constexpr,
    find_agreement: tl.constexpr,
    gradient: tl.constexpr,
    block: tl.constexpr,
):
    """The row of the program."""
    row = tl.program_id(0).to(tl.int64)
    sides = (student + row * classes, teacher + row * shared, classes, shared, teacher_scale)
    caps: tl.constexpr = (softcap, teacher_softcap)
    factor = tl.load(weights + 3 * row + 2) * _LOG2_E
    target = tl.load(targets + row)
    # Read before the gradient may be written over it; a label that there is no class for makes the loss NaN.
    is_class = (target >= 0) & (target < classes)
    target_logit = _capped(tl.load(student + row * classes + target, mask=is_class, other=float("nan")), softcap)
    bases = _bases(sides, caps, block)
    softmaxes, expected, agrees = _sums(
        sides, bases, factor, caps, is_reverse, mixture is None, is_wider, find_agreement, block
    )
    tl.store(values + row, tl.log(softmaxes[0][1]) + softmaxes[0][0] + (bases[0] - target_logit))
    if find_agreement:
        tl.store(agreement + row, agrees)
    spread = 0.0
    if mixture is None:
        value, expected = _kl(softmaxes, expected, factor, is_reverse)
    else:
        value, expected, spread = _mixture_sums(sides, bases, softmaxes, factor, caps, mixture, block)
    tl.store(values + items + row, value)
    if gradient:
        direction += row * direction_stride
        means, own_weights = (expected, spread), (tl.load(weights + 3 * row), tl.load(weights + 3 * row + 1))
        for start in range(0, classes, block):
            at = start + tl.arange(0, block)
            formed = _gradient(
                sides, bases, softmaxes, means, own_weights, at, target, factor, caps, is_reverse, mixture, is_wider
            )
            # All threads have read their part of the block before any writes over that of another.
            tl.debug_barrier()
            tl.store(direction + at, formed, mask=at < classes)


@triton.jit
def _gradient(
    sides,
    bases,
    softmaxes,
    means,
    weights,
    at,
    target,
    factor,
    caps: tl.constexpr,
    is_reverse: tl.constexpr,
    mixture: tl.constexpr,
    is_wider: tl.constexpr,
):
    """Of a block of logits, in float32."""
    logits, slope = _student(sides, bases, at, caps[0])
    shifted = tl.where(at < sides[3], logits, -_INFINITY) if is_wider else logits
    other = _teacher(sides, bases, at, caps[1])
    probs, other_probs = _probs(shifted, softmaxes[1], factor), _probs(other, softmaxes[2], factor)
    if mixture is None:
        compared = _kl_gradient(probs, other_probs, (shifted - other) * factor, means[0], is_reverse)
    else:
        compared = _mixture_gradient(probs, other_probs, means, mixture)
    labelled = _probs(logits, softmaxes[0], _LOG2_E) - tl.where(at == target, 1.0, 0.0)
    # A row may hold NaN in what has no weight.
    compared = tl.where(weights[1] == 0, 0.0, weights[1] * compared)
    return (tl.where(weights[0] == 0, 0.0, weights[0] * labelled) + compared) * slope


@triton.jit
def _capped(logits, softcap: tl.constexpr):
    """In float32; tanh(x) is 2 sigmoid(2 x) - 1."""
    logits = logits.to(tl.float32)
    if softcap is not None:
        logits = softcap * (2 * tl.sigmoid(logits * (2 / softcap)) - 1)
    return logits


@triton.jit
def _student(sides, bases, at, softcap: tl.constexpr):
    """Logits less their base, -inf behind the last, and what the softcap multiplies their gradient by."""
    logits = _capped(tl.load(sides[0] + at, mask=at < sides[2], other=-_INFINITY), softcap)
    slope = 1.0
    if softcap is not None:
        slope = 1 - (logits / softcap) * (logits / softcap)
        # tanh has made a number of the -inf behind the last.
        logits = tl.where(at < sides[2], logits, -_INFINITY)
    return logits - bases[0], slope


@triton.jit
def _teacher(sides, bases, at, softcap: tl.constexpr):
    """Scaled logits less their base, -inf behind the last."""
    logits = _capped(tl.load(sides[1] + at, mask=at < sides[3], other=-_INFINITY), softcap) * sides[4]
    return tl.where(at < sides[3], logits - bases[1], -_INFINITY)


@triton.jit
def _bases(sides, caps: tl.constexpr, block: tl.constexpr):
    """The largest logit of the first block of either side; 0 where that is not finite."""
    at = tl.arange(0, block)
    student, _ = _student(sides, (0.0, 0.0), at, caps[0])
    return _finite(tl.max(student, 0)), _finite(tl.max(_teacher(sides, (0.0, 0.0), at, caps[1]), 0))


@triton.jit
def _finite(number):
    return tl.where(tl.abs(number) < _INFINITY, number, 0.0)


@triton.jit
def _powers(logits, largest, factor):
    """The powers of e of the softened logits less the largest; `factor` is log2(e) / temperature."""
    return tl.exp2((logits - tl.where(largest == -_INFINITY, 0.0, largest)) * factor)


@triton.jit
def _probs(logits, side, factor):
    return _powers(logits, side[0], factor) * (1 / side[1])


@triton.jit
def _closed(largest, total):
    """The largest logit and the sum of powers, NaN where no class is possible."""
    return largest, tl.where(largest == -_INFINITY, float("nan"), tl.sum(total, 0))


@triton.jit
def _log_of_sum(side, factor):
    """To base 2."""
    return tl.log2(side[1]) + side[0] * factor


@triton.jit
def _sums(
    sides,
    bases,
    factor,
    caps: tl.constexpr,
    is_reverse: tl.constexpr,
    is_kl: tl.constexpr,
    is_wider: tl.constexpr,
    find_agreement: tl.constexpr,
    block: tl.constexpr,
):
    """What three softmaxes and a KL are made of, and whether both sides choose the same class.

    The softmaxes are the student's at temperature 1 and softened and the teacher's, each as its largest logit and the
    sum of its powers. Of a KL it is the expectation of its ratio to base 2, before it is divided by a sum.
    """
    largest = tl.full([], -_INFINITY, tl.float32)
    soft_largest, other_largest = largest, largest
    choice, other_choice = 0, 0
    total = tl.zeros([block], tl.float32)
    soft_total, other_total, expected = total, total, total
    for start in range(0, sides[2], block):
        at = start + tl.arange(0, block)
        logits, _ = _student(sides, bases, at, caps[0])
        top = tl.maximum(largest, tl.max(logits, 0))
        total = total * _powers(largest, top, _LOG2_E) + _powers(logits, top, _LOG2_E)
        largest = top
        if is_wider:
            logits = tl.where(at < sides[3], logits, -_INFINITY)
        other = _teacher(sides, bases, at, caps[1])
        if find_agreement:
            choice = _choice(choice, soft_largest, logits, start)
            other_choice = _choice(other_choice, other_largest, other, start)
        top, other_top = tl.maximum(soft_largest, tl.max(logits, 0)), tl.maximum(other_largest, tl.max(other, 0))
        fading, other_fading = _powers(soft_largest, top, factor), _powers(other_largest, other_top, factor)
        powers, other_powers = _powers(logits, top, factor), _powers(other, other_top, factor)
        soft_total, other_total = soft_total * fading + powers, other_total * other_fading + other_powers
        soft_largest, other_largest = top, other_top
        if is_kl:
            ratio = (other - logits) * factor
            if is_reverse:
                ratio, fading, other_powers = -ratio, fading, powers
            else:
                fading = other_fading
            # 0 * inf is NaN.
            expected = tl.where(fading == 0, 0.0, expected * fading)
            expected += tl.where(other_powers == 0, 0.0, other_powers * ratio)
    softmaxes = (
        _closed(largest, total),
        _closed(soft_largest, soft_total),
        _closed(other_largest, other_total),
    )
    return softmaxes, tl.sum(expected, 0), choice == other_choice


@triton.jit
def _choice(choice, largest, logits, start):
    """The first of the largest so far; a row of NaN keeps the first class."""
    top, place = tl.max(logits, 0, return_indices=True)
    return tl.where(top > largest, start + place, choice)


@triton.jit
def _kl(softmaxes, expected, factor, is_reverse: tl.constexpr):
    """The value in nats, and the expectation of the ratio to base 2."""
    soft, other = softmaxes[1], softmaxes[2]
    difference = _log_of_sum(soft, factor) - _log_of_sum(other, factor)
    if is_reverse:
        expected = expected / soft[1]
        value = (expected - difference) * _LOG_2
        expected = tl.where(value != value, float("nan"), expected)
    else:
        expected = expected / other[1]
        value = (expected + difference) * _LOG_2
    return value, expected


@triton.jit
def _kl_gradient(probs, other_probs, ratio, expected, is_reverse: tl.constexpr):
    """By the softened logits; 0 where the value is infinite, as no finite one is right."""
    if not is_reverse:
        return probs - other_probs
    formed = tl.where(probs == 0, 0.0, probs * (ratio - expected)) * _LOG_2
    return tl.where(expected == _INFINITY, 0.0, formed)


@triton.jit
def _mixture_terms(probs, other_probs, ratio: tl.constexpr):
    """What p_t / m is above 1, student_share * (p_t - p_s) / m, and the logarithms of p_t / m and p_s / m."""
    m = tl.maximum(probs + ratio * other_probs, _TINY)
    w = (other_probs - probs) / m
    # Where a ratio is 0, a probability of 0 multiplies its logarithm, which has to be finite for that.
    w = tl.where(w != w, w, tl.minimum(tl.maximum(w, -_NEARLY_ONE), _NEARLY_ONE / ratio))
    return w, _log_1_plus(w), _log_1_plus(-ratio * w)


@triton.jit
def _log_1_plus(x):
    """log(1 + x), exact for small x: what 1 + x rounds away is made up for by the factor."""
    rounded = 1 + x
    return tl.where(rounded == 1, x, tl.log(rounded) * (x / (rounded - 1)))


@triton.jit
def _mixture_sums(sides, bases, softmaxes, factor, caps: tl.constexpr, mixture: tl.constexpr, block: tl.constexpr):
    """The value in nats, the expectation of the student's logarithms, and that of w."""
    value = tl.zeros([block], tl.float32)
    expected, spread = value, value
    for start in range(0, sides[3], block):
        at = start + tl.arange(0, block)
        logits, _ = _student(sides, bases, at, caps[0])
        probs = _probs(tl.where(at < sides[3], logits, -_INFINITY), softmaxes[1], factor)
        other_probs = _probs(_teacher(sides, bases, at, caps[1]), softmaxes[2], factor)
        w, other_log, log = _mixture_terms(probs, other_probs, mixture[0])
        value += other_probs * other_log
        expected += probs * log
        spread += probs * w
    expected = tl.sum(expected, 0)
    return mixture[1] * tl.sum(value, 0) + mixture[2] * expected, expected, tl.sum(spread, 0)


@triton.jit
def _mixture_gradient(probs, other_probs, means, mixture: tl.constexpr):
    """By the softened logits."""
    w, _, log = _mixture_terms(probs, other_probs, mixture[0])
    return probs * (mixture[2] * (log - means[0]) + mixture[3] * (w - means[1]))
