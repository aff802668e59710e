"""How hard each item is, judged by its logits: what a temperature of its own is made from. Nothing has a gradient.

Everything is measured at temperature 1 in float32, row block by row block, and of each row alone. A row that holds NaN
has the value NaN.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.losses.base import check_logits, compute_dtype
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.row_gradient import row_blocks, rows_per_block
from hf_distill.registry import Registry

_SCRATCH_BUFFERS = 6  # temporaries of one block that are alive at a time
_CERTAINTY_OFFSET = 1e-3

# (rows, classes) logits of student and teacher in the dtype of the computation -> (rows, columns), mostly one.
RowFunction = Callable[[Tensor, Tensor], Tensor]


def _teacher_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    probs, log_probs = teacher.softmax(-1), teacher.log_softmax(-1)
    # A class without probability has the log -inf and contributes nothing.
    entropy = probs.mul_(log_probs.clamp_min_(torch.finfo(probs.dtype).min)).sum(-1, keepdim=True).neg_()
    return _share(entropy, _possible(teacher).log())


def _teacher_confidence(student: Tensor, teacher: Tensor) -> Tensor:
    doubt = 1 - teacher.softmax(-1).amax(-1, keepdim=True)
    return _share(doubt, 1 - 1 / _possible(teacher))


def _disagreement(student: Tensor, teacher: Tensor) -> Tensor:
    probs = student.softmax(-1), teacher.softmax(-1)
    # 0 * log(0) is 0. xlogy knows that too, and takes three times as long on a CPU.
    tiny = torch.finfo(student.dtype).tiny
    total = (probs[0] + probs[1]).clamp_min_(tiny)
    halves = [part.mul((part / total).clamp_min_(tiny).log_()).sum(-1, keepdim=True) for part in probs]
    return 1 + (halves[0] + halves[1]) / (2 * math.log(2))


def _loss(student: Tensor, teacher: Tensor) -> Tensor:
    return -torch.expm1(-forward_kl(student, teacher).unsqueeze(-1))


DIFFICULTIES: Registry[RowFunction] = Registry("signal of difficulty")
DIFFICULTIES.register("teacher_entropy", _teacher_entropy)
DIFFICULTIES.register("teacher_confidence", _teacher_confidence)
DIFFICULTIES.register("disagreement", _disagreement)
DIFFICULTIES.register("loss", _loss)


def difficulty(signal: str, student_logits: Tensor, teacher_logits: Tensor, *, binary: bool = False) -> Tensor:
    """How hard each item is, in [0, 1]: 0 the easiest.

    With p = softmax(logits) and C the number of classes that the teacher thinks possible (above -inf):

    - `teacher_entropy`: the entropy of p_t over log C.
    - `teacher_confidence`: (1 - max p_t) / (1 - 1/C), the lack of it.
    - `disagreement`: the Jensen-Shannon divergence of p_t and p_s over log 2, which is smooth where they agree.
    - `loss`: 1 - exp(-KL(p_t || p_s)).

    Args:
        signal: one of `DIFFICULTIES`.
        student_logits: (..., classes), any float dtype.
        teacher_logits: (..., classes).
        binary: whether each class is a choice of its own, yes or no: the mean of their difficulties.

    Returns: (...,) float32 (float64 if given float64); 0 where the teacher has one class only, for its own signals.
    """
    return _per_item(DIFFICULTIES.get(signal), student_logits, teacher_logits, binary=binary).clamp_(0, 1)


def logit_distance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 - cos(z_s, z_t), in [0, 2], over the classes that both think possible: (...,) float32.

    Args:
        student_logits: (..., classes), any float dtype.
        teacher_logits: (..., classes).

    Source: FLSW of Wen et al. 2019, arXiv:1911.07471.
    """
    return _per_item(_distance, student_logits, teacher_logits).clamp_(0, 2)


def student_doubt(student_logits: Tensor, teacher_logits: Tensor, *, binary: bool = False) -> Tensor:
    """1 / (max p_s + 0.001), which is about 1 where the student is certain: (...,) float32.

    Args:
        student_logits: (..., classes), any float dtype.
        teacher_logits: (..., classes), not looked at.
        binary: whether each class is a choice of its own, yes or no: the mean of their values.

    Source: CWSM of Wen et al. 2019, arXiv:1911.07471, with the 0.001 of TextBrewer's code, arXiv:2002.12620.
    """
    return _per_item(_doubt, student_logits, teacher_logits, binary=binary)


def top_probabilities(student_logits: Tensor, teacher_logits: Tensor, *, classes: int) -> Tensor:
    """(..., 2, classes): the teacher's largest probabilities, falling, and the student's of the same classes.

    Args:
        student_logits: (..., classes of the head), any float dtype.
        teacher_logits: (..., classes of the head).
        classes: how many; what the head has less of them is 0.
    """
    found = min(classes, teacher_logits.shape[-1])

    def largest(student: Tensor, teacher: Tensor) -> Tensor:
        values, indices = teacher.softmax(-1).topk(found)
        return torch.cat((values, student.softmax(-1).gather(-1, indices)), -1)

    values = _per_row(largest, student_logits, teacher_logits, columns=2 * found)
    return torch.nn.functional.pad(values.unflatten(-1, (2, found)), (0, classes - found))


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    impossible = (student == -math.inf) | (teacher == -math.inf)
    student, teacher = student.masked_fill(impossible, 0.0), teacher.masked_fill(impossible, 0.0)
    return 1 - torch.cosine_similarity(student, teacher, dim=-1).unsqueeze(-1)


def _doubt(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 / (student.softmax(-1).amax(-1, keepdim=True) + _CERTAINTY_OFFSET)


def _per_item(
    function: RowFunction, student_logits: Tensor, teacher_logits: Tensor, *, binary: bool = False
) -> Tensor:
    """(...,) the function of each row, or with `binary` its mean over the classes, each of which is yes or no."""
    if binary:
        yes_or_no = [
            torch.stack((logits, torch.zeros_like(logits)), -1) for logits in (student_logits, teacher_logits)
        ]
        return _per_row(function, yes_or_no[0], yes_or_no[1]).squeeze(-1).mean(-1)
    return _per_row(function, student_logits, teacher_logits).squeeze(-1)


@torch.no_grad()
def _per_row(function: RowFunction, student_logits: Tensor, teacher_logits: Tensor, *, columns: int = 1) -> Tensor:
    """(..., columns) of the function."""
    check_logits(student_logits, teacher_logits)
    dtype = compute_dtype(student_logits, teacher_logits)
    values = torch.empty(*student_logits.shape[:-1], columns, dtype=dtype, device=student_logits.device)
    rows = rows_per_block(student_logits, buffers=_SCRATCH_BUFFERS, dtype=dtype)
    for student, teacher, out in row_blocks((student_logits, teacher_logits, values), rows):
        out.copy_(function(student.to(dtype), teacher.to(dtype)))
    return values


def _possible(logits: Tensor) -> Tensor:
    """(rows, 1) how many classes are above -inf."""
    return (logits > -math.inf).sum(-1, keepdim=True).to(logits.dtype)


def _share(value: Tensor, most: Tensor) -> Tensor:
    """The value as a share of the most that it can be; 0 where that is 0, and NaN where it is NaN."""
    return value / torch.where(most > 0, most, 1.0)
