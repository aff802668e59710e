import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import forward_kl
from hf_distill.losses.temperature_gradient import with_temperature_gradient
from tests.losses.cases import random_case
from tests.losses.observing import LargeAllocations

INF = math.inf


def reference(student, teacher, temperature):
    """T² KL in float64 by plain torch; the classes that the teacher excludes are cut off, so that autograd may go."""
    values = []
    temperature = temperature.expand(student.shape[:-1])
    for index in torch.cartesian_prod(*map(torch.arange, student.shape[:-1])).reshape(-1, student.dim() - 1).tolist():
        s, t, own = student[tuple(index)], teacher[tuple(index)], temperature[tuple(index)]
        log_s = (s[s > -INF] / own).log_softmax(-1)[(t > -INF)[s > -INF]]
        log_t = (t[t > -INF] / own).log_softmax(-1)
        values.append(own**2 * (log_t.exp() * (log_t - log_s)).sum())
    return torch.stack(values).reshape(student.shape[:-1])


def derivatives(student, teacher, temperature, weights):
    kl = forward_kl(student, teacher, temperature=temperature.detach())
    values = with_temperature_gradient(kl, student, teacher, temperature)
    return values.detach(), torch.autograd.grad(values, temperature, weights)[0]


@given(
    seed=st.integers(0, 999),
    classes=st.sampled_from([2, 3, 17]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    per_item=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_derivative_that_autograd_takes(seed, classes, scale, per_item):
    case = random_case((2, 3), classes, seed, scale=scale, padding=classes // 3, impossible=classes // 4)
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand((2, 3) if per_item else (), generator=generator, dtype=torch.float64) * 5 + 0.7
    temperature.requires_grad_()
    student, teacher, weights = case.student.double(), case.teacher.double(), case.weights.double()
    expected = reference(student, teacher, temperature)
    values, gradient = derivatives(student, teacher, temperature, weights)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, temperature, weights)[0], rtol=1e-7, atol=1e-9)


def test_float32_logits_give_it_to_float32():
    case = random_case((50,), 300, 0, scale=5.0, temperature="per item")
    temperature = case.temperature.requires_grad_()
    _, gradient = derivatives(case.student, case.teacher, temperature, case.weights)
    exact = derivatives(
        case.student.double(), case.teacher.double(), temperature.detach().double().requires_grad_(), case.weights
    )[1]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("classes", [3, 1000])
def test_it_is_exact_at_high_temperatures_where_almost_all_of_it_cancels(classes):
    case = random_case((8,), classes, 0)
    temperature = torch.full((8,), 15.6, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(
        reference(case.student.double(), case.teacher.double(), temperature).sum(), temperature
    )[0]
    _, gradient = derivatives(case.student, case.teacher, temperature.float().detach().requires_grad_(), torch.ones(8))
    assert expected.abs().max() < 3e-3
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=0.0)


def test_the_gradient_of_the_student_stays_as_it_is():
    case = random_case((4,), 5, 0)
    student, temperature = case.student.requires_grad_(), torch.full((4,), 3.0, requires_grad=True)
    (expected,) = torch.autograd.grad(forward_kl(student, case.teacher, temperature=3.0).sum(), student)
    values = forward_kl(student, case.teacher, temperature=3.0)
    attached = with_temperature_gradient(values, student, case.teacher, temperature)
    assert torch.equal(attached, values)
    assert torch.equal(torch.autograd.grad(attached.sum(), student)[0], expected)


def test_items_without_weight_give_no_gradient_even_where_they_are_nan():
    case = random_case((3,), 5, 0)
    case.student[1] = math.nan
    temperature = torch.tensor(2.0, requires_grad=True)
    _, gradient = derivatives(case.student, case.teacher, temperature, torch.tensor([1.0, 0.0, 0.0]))
    _, alone = derivatives(case.student[:1], case.teacher[:1], temperature, torch.tensor([1.0]))
    torch.testing.assert_close(gradient, alone)


def test_a_temperature_without_a_graph_costs_nothing():
    case = random_case((3,), 5, 0)
    values = forward_kl(case.student, case.teacher)
    assert with_temperature_gradient(values, case.student, case.teacher, torch.tensor(1.0)) is values
    with torch.no_grad():
        learned = torch.tensor(1.0, requires_grad=True)
        assert with_temperature_gradient(values, case.student, case.teacher, learned) is values


@pytest.mark.parametrize("items", [1, 3, 4, 7])
def test_block_boundaries_do_not_show(items, three_rows_a_block):
    case = random_case((2, items), 11, items, temperature="per item")
    arguments = case.student, case.teacher, case.temperature.requires_grad_(), case.weights
    whole = derivatives(*arguments)
    three_rows_a_block(11)
    values, gradient = derivatives(*arguments)
    # The powers of the last few numbers of a block are rounded otherwise than those before them.
    torch.testing.assert_close(values, whole[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, whole[1], rtol=2e-6, atol=2e-6)


def test_nothing_of_the_logits_size_is_allocated(three_rows_a_block):
    student, teacher = torch.randn(2, 2, 40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    temperature = torch.full((2, 40), 2.0, requires_grad=True)
    three_rows_a_block(300)
    values = forward_kl(student, teacher, temperature=2.0)
    with LargeAllocations(student.numel(), [student, teacher]) as allocations:
        with_temperature_gradient(values, student, teacher, temperature).sum().backward()
    assert allocations.count == 0


def test_a_second_derivative_is_refused():
    case = random_case((3,), 5, 0)
    temperature = torch.tensor(2.0, requires_grad=True)
    values = forward_kl(case.student, case.teacher, temperature=2.0)
    total = with_temperature_gradient(values, case.student, case.teacher, temperature).sum() + temperature**2
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, temperature, create_graph=True)
