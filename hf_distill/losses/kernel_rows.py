"""What the kernel of a head's rows is given."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.mixtures import Mixture


class KernelRows(NamedTuple):
    """A chunk of items as the kernel takes it; all contiguous but `direction`, of which the rows are."""

    student: Tensor  # (items, classes) logits before the softcap, float32 or bfloat16
    teacher: Tensor  # (items, shared) of the leading classes
    targets: Tensor  # (items,) int64 in [0, classes), anything where the term has no weight
    weights: Tensor  # (items, 3) float32: those of either term in the gradient, and 1 / temperature
    direction: Tensor | None  # (items, classes), where the gradient goes: row by row over `student`, or apart


class KernelCase(NamedTuple):
    """What Triton compiles a kernel of its own for.

    Attributes:
        form: the divergence, as `head_formulas.closed_form` gives it.
        softcap: of the student's logits.
        teacher_softcap: of the teacher's.
        dtypes: of the logits of student and teacher.
        gradient_dtype: None for no gradient.
        is_wider: whether the student has classes that the teacher lacks.
        find_agreement: whether to say where both sides choose the same class.
        device: where.
    """

    form: Mixture | str
    softcap: float | None
    teacher_softcap: float | None
    dtypes: tuple[torch.dtype, torch.dtype]
    gradient_dtype: torch.dtype | None
    is_wider: bool
    find_agreement: bool
    device: torch.device
