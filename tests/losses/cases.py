"""Logits for property tests: odd shapes, extreme sizes, padded vocabularies."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

SHAPES = [(), (1,), (5,), (0,), (2, 3), (3, 0), (2, 1, 4)]
CLASSES = [1, 2, 3, 17, 64]
TEMPERATURES = [0.5, 1.0, 4.0, 10.0]


@dataclass
class Case:
    student: Tensor  # (..., classes) float32
    teacher: Tensor  # (..., classes) float32
    temperature: float | Tensor
    weights: Tensor  # (...,) the gradient that arrives at each item

    def options(self, spec):
        return {"temperature": self.temperature} if spec.takes_temperature else {}


def random_case(shape, classes, seed, *, scale=1.0, padding=0, impossible=0, near=False, temperature=1.0):
    """Logits of size `scale`: the last `padding` classes -inf in both, the `impossible` before them in the teacher."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, classes, generator=generator) * scale
    teacher = torch.randn(*shape, classes, generator=generator) * scale
    if near:
        teacher = student + teacher * (0.01 / scale)
    student[..., classes - padding :] = -math.inf
    teacher[..., classes - padding - impossible :] = -math.inf
    if temperature == "per item":
        temperature = torch.rand(shape, generator=generator) * 5 + 0.5
    elif temperature == "tensor":
        temperature = torch.tensor(3.0)
    return Case(student, teacher, temperature, torch.rand(shape, generator=generator))


@st.composite
def cases(draw):
    classes = draw(st.sampled_from(CLASSES))
    padding = draw(st.integers(0, classes - 1))
    return random_case(
        draw(st.sampled_from(SHAPES)),
        classes,
        draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4])),
        padding=padding,
        impossible=draw(st.integers(0, classes - 1 - padding)),
        near=draw(st.booleans()),
        temperature=draw(st.sampled_from([*TEMPERATURES, "tensor", "per item"])),
    )
