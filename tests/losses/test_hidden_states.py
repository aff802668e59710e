"""What the losses between vectors do beyond what every loss does."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import LOSSES, hidden_cosine, hidden_hint, hidden_mse, hidden_normalized_mse

DIRECTIONS = [hidden_cosine, hidden_normalized_mse]


@pytest.fixture(name="pair")
def _pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, generator=generator).requires_grad_(), torch.randn(3, 4, 8, generator=generator)


def test_they_are_what_torch_and_the_papers_compute(pair):
    student, teacher = pair
    squares = F.mse_loss(student, teacher, reduction="none")
    torch.testing.assert_close(hidden_mse(student, teacher), squares.mean(-1))
    torch.testing.assert_close(hidden_hint(student, teacher), squares.sum(-1) / 2)
    torch.testing.assert_close(hidden_cosine(student, teacher), 1 - F.cosine_similarity(student, teacher, dim=-1))
    unit = [F.normalize(vectors, dim=-1) for vectors in pair]
    torch.testing.assert_close(hidden_normalized_mse(student, teacher).mean(), F.mse_loss(*unit))


def test_patient_kd_averages_over_the_layers():
    assert LOSSES.get("hidden_normalized_mse").reference.pairs == "mean"
    assert LOSSES.get("hidden_mse").reference.pairs == "sum"


@pytest.mark.parametrize("loss", DIRECTIONS)
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_lengths_do_not_matter(loss, factor, pair):
    student, teacher = pair
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(student * factor, teacher), expected)
    torch.testing.assert_close(loss(student, teacher * factor), expected)


@pytest.mark.parametrize("loss", DIRECTIONS)
def test_the_gradient_turns_the_vector_and_leaves_its_length(loss, pair):
    student, teacher = pair
    (gradient,) = torch.autograd.grad(loss(student, teacher).sum(), student)
    torch.testing.assert_close((gradient * student).sum(-1), torch.zeros(3, 4), atol=1e-6, rtol=0)


def test_a_small_angle_is_exact():
    angle = 1e-4
    value = hidden_cosine(torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)]))
    torch.testing.assert_close(value, torch.tensor(angle**2 / 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("loss", "one", "none"), [(hidden_cosine, 1.0, 1.0), (hidden_normalized_mse, 0.5, 0.0)], ids=["cosine", "mse"]
)
def test_a_vector_of_zeros_has_no_direction_and_no_gradient(loss, one, none):
    zeros = torch.zeros(2)
    for student, teacher, expected in ((zeros, torch.ones(2), one), (torch.ones(2), zeros, one), (zeros, zeros, none)):
        student = student.clone().requires_grad_()
        value = loss(student, teacher)
        value.backward()
        torch.testing.assert_close(value.detach(), torch.tensor(expected))
        assert torch.equal(student.grad, zeros)


@pytest.mark.parametrize("loss", [hidden_mse, hidden_hint, *DIRECTIONS])
def test_other_widths_and_no_features_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\), the teacher's \(2, 5\).*Project"):
        loss(torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="at least one feature"):
        loss(torch.zeros(2, 0), torch.zeros(2, 0))
