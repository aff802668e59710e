"""KL over the classes that the teacher holds likely, all others taken as one."""

import functools

import torch
from torch import Tensor

from hf_distill.losses.base import register_loss
from hf_distill.losses.divergence import Softened, forward_kl, softened_divergence, write_forward_kl


@register_loss(
    "top_k_kl", feature="logits", item="position", paper="Anshumann et al. 2025, arXiv:2503.16870", min_classes=2
)
def top_k_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, k: int = 64
) -> Tensor:
    """KL(teacher || student) over the teacher's k most likely classes and one bucket of the rest, times temperature².

    The bucket holds the probability of all other classes, so nothing is renormalised and the student is not free to
    put probability there. What lies in it is left to the student. With as many as all classes it is `forward_kl`.
    Which of equally likely classes is the k-th is arbitrary. Memory, rounding, NaN and classes at -inf are as in
    `forward_kl`.

    Args:
        student_logits: (..., classes), any float dtype and strides; computed in float32 (float64 if given float64).
        teacher_logits: (..., classes); carries no gradient.
        temperature: > 0; a number, a scalar tensor or one value per item, (...,).
        k: >= 1.

    Returns: (...,) float32, 0 where the logits are equal, at most `forward_kl`.
    Source: Anshumann et al. 2025, arXiv:2503.16870, the top-k baseline with a ghost token for the missing probability.
    """
    if not (isinstance(k, int) and k >= 1):
        raise ValueError(f"k is {k}; expected a whole number of classes, at least 1.")
    if student_logits.dim() and k >= student_logits.shape[-1]:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    return softened_divergence(student_logits, teacher_logits, temperature, functools.partial(_top_k_kl, k=k))


def _top_k_kl(block: Softened, *, k: int) -> Tensor | None:
    top = block.teacher.topk(k, sorted=False).indices
    buckets = []
    for logits in (block.student, block.teacher):
        likely = logits.gather(-1, top)
        rest = logits.scatter_(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        likely = torch.cat([likely, rest], -1)
        buckets.append(likely.sub_(likely.amax(-1, keepdim=True)))
    student, teacher = buckets
    student_probs, teacher_probs = student.softmax(-1), teacher.softmax(-1)
    write_forward_kl(student, teacher, student_probs, teacher_probs, out=block.value)
    if not block.needs_gradient:
        return None
    differences = student_probs.sub_(teacher_probs)
    # Where the student holds the whole rest impossible, nothing in it can move.
    gradient = torch.softmax(block.student, -1, out=block.student_probs).nan_to_num_(nan=0.0)
    return gradient.mul_(differences[:, -1:]).scatter_(-1, top, differences[:, :-1])
