"""Logits, targets and weights for tests of the task and the logit term in one."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_distill.losses.fused import cross_entropy_and_forward_kl
from tests.losses.cases import cases, random_case


@dataclass
class Terms:
    student: Tensor  # (..., classes)
    teacher: Tensor  # (..., shared)
    targets: Tensor  # (...,)
    task_weights: Tensor  # (...,)
    kd_weights: Tensor  # (...,)
    temperature: float | Tensor

    def __call__(self, function=cross_entropy_and_forward_kl, **options):
        return function(
            self.student,
            self.teacher,
            self.targets,
            task_weights=self.task_weights,
            kd_weights=self.kd_weights,
            temperature=self.temperature,
            **options,
        )

    def run(self, function=cross_entropy_and_forward_kl, *, incoming=1.0, **options):
        """Loss, cross-entropy, KL and the gradient that an incoming gradient gives."""
        self.student = self.student.detach().requires_grad_()
        loss, cross_entropy, kl = self(function, **options)
        (gradient,) = torch.autograd.grad(loss * incoming, self.student)
        return loss.detach(), cross_entropy, kl, gradient


def weigh(case, seed, *, extra=0, zeros=0.0):
    """Terms of the case: `extra` classes that the teacher lacks, a share `zeros` of each term's weights at 0."""
    generator = torch.Generator().manual_seed(seed)
    items = case.student.shape[:-1]
    scale = case.student[case.student.isfinite()].abs().max().item() if case.student.isfinite().any() else 1.0
    student = torch.cat([case.student, torch.randn(*items, extra, generator=generator) * scale], -1)
    weights = torch.rand(2, *items, generator=generator) + 0.1
    weights *= torch.rand(weights.shape, generator=generator) >= zeros
    targets = torch.randint(student.shape[-1], items, generator=generator)
    return Terms(student, case.teacher, targets, *weights, case.temperature)


def random_terms(shape, classes, seed=0, *, extra=0, zeros=0.0, **options):
    return weigh(random_case(shape, classes, seed, **options), seed, extra=extra, zeros=zeros)


def poison(terms):
    """Puts NaN and wrong targets wherever no weight asks for them."""
    no_task, no_kd = terms.task_weights == 0, terms.kd_weights == 0
    shared = terms.teacher.shape[-1]
    terms.targets[no_task] = -100
    terms.teacher[no_kd] = math.nan
    terms.student[..., shared:][no_task] = math.nan
    terms.student[no_task & no_kd] = math.nan


@st.composite
def weighted_terms(draw):
    terms = weigh(
        draw(cases()),
        draw(st.integers(0, 2**16)),
        extra=draw(st.sampled_from([0, 0, 1, 5])),
        zeros=draw(st.sampled_from([0.0, 0.4, 1.0])),
    )
    if draw(st.booleans()):
        poison(terms)
    return terms
