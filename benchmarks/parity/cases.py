"""The fixed logits that every comparison is made on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20
LABEL_WEIGHT = 0.1  # of the labels' loss, for rivals that return nothing useful without one


@dataclass(frozen=True)
class Case:
    """One set of random logits.

    Attributes:
        shape: (items, classes) or (sequences, positions, classes).
        temperature: for those that take one.
        spread: standard deviation of the logits.
        padded: so many classes at the end are at -inf in both models, as a vocabulary padded to a round size is.
    """

    shape: tuple[int, ...]
    temperature: float = 1.0
    spread: float = 3.0
    padded: int = 0

    def draw(self) -> Logits:
        """The logits, float64, the same in every run."""
        generator = torch.Generator().manual_seed(SEED)
        student, noise = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64) * self.spread
        teacher = 0.7 * student + 0.7 * noise
        targets = torch.randint(self.shape[-1] - self.padded, self.shape[:-1], generator=generator)
        if self.padded:
            student[..., -self.padded :] = teacher[..., -self.padded :] = -torch.inf
        return Logits(student.requires_grad_(), teacher, targets, self.temperature)


@dataclass(frozen=True)
class Logits:
    """What a loss is given.

    Attributes:
        student: (..., classes); wants a gradient.
        teacher: (..., classes).
        targets: (...,) int64 classes of the labels.
        temperature: > 0.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor
    temperature: float


Loss = Callable[[Logits], Tensor]  # -> a scalar


def cases(shapes: tuple[tuple[int, ...], ...], temperatures: tuple[float, ...] = (1.0,)) -> tuple[Case, ...]:
    """Every shape at every temperature."""
    return tuple(itertools.starmap(Case, itertools.product(shapes, temperatures)))


TEMPERATURES = (1.0, 2.0, 4.0)
ITEMS = cases(((8, 2), (32, 10), (16, 1000)), TEMPERATURES)
SEQUENCES = cases(((1, 7, 5), (4, 16, 97), (2, 8, 1000)), TEMPERATURES)
PADDED_SEQUENCES = (Case((4, 16, 97), padded=7),)
PADDED_ITEMS = (Case((16, 97), padded=7),)
WITH_AN_IMPROBABLE_CLASS = (Case((16, 1000), temperature=0.5),)  # at most 1e-8 for every item
CANDIDATES = cases(((8, 2), (32, 9)))
CANDIDATES_AT_TEMPERATURES = cases(((8, 2), (32, 9)), TEMPERATURES)
