"""Cross-entropy on the labels and forward KL to the teacher in one pass over the logits, with one gradient."""

import torch
from torch import Tensor

from hf_distill.losses import row_gradient
from hf_distill.losses.base import compute_dtype, item_temperature
from hf_distill.losses.divergence import FLOAT16_HEADROOM, subtract_maximum, write_forward_kl
from hf_distill.losses.row_gradient import attach_gradient, clear_rows, row_blocks, rows_per_block


def cross_entropy_and_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    task_weights: Tensor,
    kd_weights: Tensor,
    temperature: float | Tensor = 1.0,
    overwrite_teacher: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of cross-entropy and forward KL * temperature², and both per item, in nats.

    The gradient task_weight * (p - onehot) + kd_weight * temperature * (p_s - p_t) is formed together with the values,
    row block by row block, and is the only tensor of the logits' size. Only the student gets one. The KL is
    `forward_kl`'s, in accuracy and for classes at -inf. Where the student holds a target impossible, the cross-entropy
    is +inf and its gradient p - onehot. An item of weight 0 in a term adds exactly nothing to that term's value and
    gradient, even where its row holds NaN or inf.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., shared), shared <= classes. The KL compares the distributions over these leading classes,
            each of sum 1; the cross-entropy is over all classes.
        targets: (...,) int64 in [0, classes); any number where the task weight is 0.
        task_weights: (...,) >= 0, of each cross-entropy.
        kd_weights: (...,) >= 0, of each KL.
        temperature: > 0, of the KL alone; a number, a scalar tensor or one value per item, (...,).
        overwrite_teacher: the caller promises that nobody reads `teacher_logits` again. The gradient is written over
            them if their shape and dtype are the student's, so that nothing of this size is allocated.

    Returns: the loss, a float32 scalar, sum(task_weights * cross_entropy + kd_weights * kl); the cross-entropy and the
        KL with its temperature², (...,) float32 each, without a graph and 0 where their weight is 0.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    _check(student_logits, teacher_logits, targets, task_weights=task_weights, kd_weights=kd_weights)
    dtype = compute_dtype(student_logits, teacher_logits)
    is_one = not isinstance(temperature, Tensor) and temperature == 1
    temperature = item_temperature(temperature, student_logits, dtype)
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        task, kd = (weights.to(dtype).unsqueeze(-1) for weights in (task_weights, kd_weights))
        scale = _gradient_scale(task + kd * temperature, student_logits.dtype)
        weights = (task / scale, kd * temperature / scale)
        targets = targets.unsqueeze(-1).masked_fill(task == 0, 0)
        tensors = [student_logits, teacher_logits, targets, *weights, temperature.reciprocal()]
        values = torch.empty(2, *task.shape, dtype=dtype, device=task.device)
        direction = _gradient_buffer(student_logits, teacher_logits, overwrite_teacher) if needs_gradient else None
        _walk([*tensors, *values], direction, one_softmax=is_one and student_logits.shape == teacher_logits.shape)
        cross_entropy = values[0].masked_fill_(task == 0, 0.0)
        kl = values[1].mul_(temperature.square()).masked_fill_(kd == 0, 0.0)
        loss = (task * cross_entropy + kd * kl).sum()
    if direction is not None:
        loss = attach_gradient(loss, student_logits, direction=direction, scale=scale)
    return loss, cross_entropy.squeeze(-1), kl.squeeze(-1)


def _check(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, **weights: Tensor) -> None:
    if student_logits.dim() == 0 or teacher_logits.dim() == 0 or teacher_logits.shape[-1] == 0:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits {tuple(teacher_logits.shape)}; "
            "expected (..., classes) and (..., shared) with at least one class."
        )
    *items, classes = student_logits.shape
    *teacher_items, shared = teacher_logits.shape
    if teacher_items != items or shared > classes:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)}, teacher_logits {tuple(teacher_logits.shape)}; "
            "expected the same items, and the teacher to have no class beyond the student's. "
            "Align positions and vocabularies first."
        )
    for name, tensor in {"targets": targets, **weights}.items():
        if list(tensor.shape) != items:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} beside student_logits {tuple(student_logits.shape)}; "
                f"expected one value per item, {tuple(items)}."
            )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets have dtype {targets.dtype}; expected torch.int64. Pass targets.long().")


def _gradient_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 1): what the gradient is divided by while it is stored, so that it keeps to the range of its dtype.

    Weights are about 1 / items and probabilities 1 / vocabulary. Their product is subnormal in float16 alone, so there
    each row is stored relative to its weights, which bound it, and with headroom.

    Args:
        largest: (..., 1) a bound of the gradient's entries.
        dtype: of the gradient.
    """
    if dtype != torch.float16:
        return torch.ones_like(largest)
    return (largest / FLOAT16_HEADROOM).clamp_(min=torch.finfo(largest.dtype).tiny)


def _gradient_buffer(student_logits: Tensor, teacher_logits: Tensor, overwrite_teacher: bool) -> Tensor:
    fits = teacher_logits.shape == student_logits.shape and teacher_logits.dtype == student_logits.dtype
    # Autograd may still need a teacher with a graph; entries of an expanded one share their memory; torch lets nobody
    # write to an inference tensor.
    if overwrite_teacher and fits and not teacher_logits.requires_grad and not teacher_logits.is_inference():
        if 0 not in teacher_logits.stride():
            return teacher_logits.detach()  # a handle of its own, which backward can give away
    return torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)


def _walk(tensors: list[Tensor], direction: Tensor | None, *, one_softmax: bool) -> None:
    """Runs `_fused_block`, whose arguments these are, over all rows."""
    student_logits, values = tensors[0], tensors[-1]
    buffers = 4 if one_softmax else 5
    rows = rows_per_block(student_logits, buffers=buffers, dtype=values.dtype)
    scratch = torch.empty(buffers, rows * student_logits.shape[-1], dtype=values.dtype, device=values.device)
    for block in row_blocks(tensors if direction is None else [*tensors, direction], rows):
        _fused_block(*block, scratch=scratch, one_softmax=one_softmax)


def _fused_block(
    student_logits: Tensor,  # (rows, classes)
    teacher_logits: Tensor,  # (rows, shared)
    targets: Tensor,  # (rows, 1)
    task: Tensor,  # (rows, 1) weight of the cross-entropy's gradient
    kd: Tensor,  # (rows, 1) weight of the KL's, its temperature included
    inverse_temperature: Tensor,  # (rows, 1)
    cross_entropy: Tensor,  # (rows, 1), written
    kl: Tensor,  # (rows, 1), written without temperature²
    direction: Tensor | None = None,  # (rows, classes), written with task * (p - onehot) + kd * (p_s - p_t)
    *,
    scratch: Tensor,  # (4 or 5, at least rows * classes)
    one_softmax: bool,  # whether p is p_s
) -> None:
    # Prompts and padding come in runs. Only a CPU can look for them without waiting.
    if row_gradient.may_read(task) and not bool((task + kd).any()):
        if direction is not None:
            direction.zero_()
        return
    (rows, classes), shared = student_logits.shape, teacher_logits.shape[-1]
    student, probs = (buffer[: rows * classes].view(rows, classes) for buffer in scratch[:2])
    teacher, teacher_probs = (buffer[: rows * shared].view(rows, shared) for buffer in scratch[2:4])
    subtract_maximum(student_logits, out=student)
    torch.softmax(student, -1, out=probs)
    torch.add(student.gather(-1, targets), probs.amax(-1, keepdim=True).log_(), out=cross_entropy).neg_()

    student_probs = probs
    if not one_softmax:
        student_probs = scratch[4, : rows * shared].view(rows, shared)
        if shared < classes:
            student = scratch[0, : rows * shared].view(rows, shared)
            subtract_maximum(student_logits[:, :shared], out=student)
        torch.softmax(student.mul_(inverse_temperature), -1, out=student_probs)
    subtract_maximum(teacher_logits, out=teacher)
    torch.softmax(teacher.mul_(inverse_temperature), -1, out=teacher_probs)
    write_forward_kl(student, teacher, student_probs, teacher_probs, out=kl)

    if direction is not None:
        difference = torch.sub(student_probs, teacher_probs, out=teacher_probs)
        clear_rows(difference, kd)
        clear_rows(probs.mul_(task), task)
        probs.scatter_add_(-1, targets, -task)
        torch.addcmul(probs[:, :shared], difference, kd, out=direction[:, :shared])
        direction[:, shared:] = probs[:, shared:]
