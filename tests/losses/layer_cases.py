"""Hidden states, scores and tokens for tests of the losses inside the layers."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_distill.signals import Scores

FEATURES = ("hidden", "attention", "relation", "tokens")


@dataclass
class Case:
    student: tuple[Tensor, ...]  # what a gradient flows to
    teacher: tuple[Tensor, ...]
    build: Callable[..., Any]  # tensors and whether they are the student's -> what the loss takes
    real: Tensor  # (batch, length) bool
    options: dict[str, Any] = field(default_factory=dict)

    def values(self, function):
        return function(self.build(*self.student, own=True), self.build(*self.teacher, own=False), **self.options)

    def counted(self, values):
        """The values' items that count."""
        return self.real if values.dim() == 2 else self.real.unsqueeze(-1) & self.real.unsqueeze(-2)

    def run(self, function, seed=0, context=nullcontext):
        """The values, formed in a context, and the gradients of a weighted sum of those that count."""
        leaves = tuple(tensor.detach().requires_grad_() for tensor in self.student)
        with context():
            values = replace(self, student=leaves).values(function)
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        counted = torch.where(self.counted(values), values, 0.0)
        return counted.detach(), *torch.autograd.grad((counted * weights.to(values.dtype)).sum(), leaves)

    def to(self, dtype):
        student, teacher = (tuple(x.to(dtype) for x in side) for side in (self.student, self.teacher))
        return replace(self, student=student, teacher=teacher)

    def map(self, function):
        """The case with the function applied to every tensor and the dimension of its positions."""
        student, teacher = (tuple(function(x, -2) for x in side) for side in (self.student, self.teacher))
        real = function(self.real, -1)
        options = {name: real if name in ("keys", "tokens") else value for name, value in self.options.items()}
        return replace(self, student=student, teacher=teacher, real=real, options=options)


def random_case(feature, seed=0, *, batch=3, length=5, heads=2, widths=(4, 6), scale=1.0, near=False, **sides):
    """A case of a feature.

    Args:
        near: whether the teacher's tensors are the student's with noise of 1 %; widths are equal then.
        sides: for attention: `kv_heads`, and what `Scores` takes, as a pair for student and teacher.
    """
    generator = torch.Generator().manual_seed(seed)
    if near or feature == "hidden":
        widths = (widths[0], widths[0])
    real = torch.rand(batch, length, generator=generator) < 0.7
    real[0], real[:, 0] = True, True

    def tensors(width):
        kv_heads = sides.get("kv_heads", heads)
        shapes = {
            "hidden": [(batch, length, width)],
            "tokens": [(batch, length, width)],
            "relation": [(batch, heads, length, width)],
            "attention": [(batch, heads, length, width), (batch, kv_heads, length, width)],
        }[feature]
        return tuple(torch.randn(shape, generator=generator) * scale for shape in shapes)

    student, teacher = tensors(widths[0]), tensors(widths[1])
    if near:
        teacher = tuple(own + other * 0.01 for own, other in zip(student, teacher, strict=True))
    if feature in ("hidden", "tokens"):
        return Case(student, teacher, lambda x, own: x, real, {} if feature == "hidden" else {"tokens": real})
    extra = {name: pair for name, pair in sides.items() if name != "kv_heads"}

    def scores(left, right=None, *, own):
        given = {name: pair[0 if own else 1] for name, pair in extra.items()}
        return Scores(left, left if right is None else right, 1 / math.sqrt(left.shape[-1]), **given)

    return Case(student, teacher, scores, real, {"keys": real})


def variants(length=5, heads=2, batch=3, seed=0):
    """By name, what may set scores apart."""
    generator = torch.Generator().manual_seed(seed)

    def both(*shape):
        return tuple(torch.randn(*shape, generator=generator) for _ in range(2))

    near = (torch.arange(length).unsqueeze(-1) - torch.arange(length)).abs() <= 1
    per_head = torch.rand(batch, heads, length, length, generator=generator) < 0.7
    return {
        "plain": {},
        "causal": {"causal": (True, True)},
        "causal student": {"causal": (True, False)},
        "bias": {"bias": both(1, heads, length, length)},
        "teacher's bias": {"bias": (None, torch.randn(heads, 1, length, generator=generator))},
        "softcap": {"softcap": (2.0, 3.0)},
        "sinks": {"sinks": both(heads)},
        "student's sinks": {"sinks": (torch.randn(heads, generator=generator), None)},
        "sliding window": {"allowed": (near, near), "causal": (True, True)},
        "windows of the student": {"allowed": (near, None)},
        "keys not allowed": {"allowed": (None, torch.rand(batch, 1, 1, length, generator=generator) < 0.7)},
        "allowed by head": {"allowed": (per_head, None)},
        "bias and window": {"bias": both(batch, 1, length, length), "allowed": (near, None)},
        "one key head": {"kv_heads": 1},
        "all": {
            "bias": both(1, heads, length, length),
            "softcap": (5.0, None),
            "sinks": both(heads),
            "allowed": (per_head, near),
            "causal": (True, True),
        },
    }


@st.composite
def cases(draw, feature):
    shape = {name: draw(st.integers(1, most)) for name, most in (("batch", 3), ("length", 6), ("heads", 3))}
    sides = {}
    if feature == "attention":
        available = variants(**shape, seed=draw(st.integers(0, 99)))
        sides = available[draw(st.sampled_from(sorted(available)))]
    return random_case(
        feature,
        draw(st.integers(0, 2**16)),
        **shape,
        widths=draw(st.sampled_from([(2, 3), (4, 6), (8, 8)])),
        scale=draw(st.sampled_from([0.1, 1.0, 3.0])),
        near=draw(st.booleans()),
        **sides,
    )
