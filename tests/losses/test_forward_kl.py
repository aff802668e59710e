import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import forward_kl, row_gradient
from tests import references
from tests.losses.cases import random_case
from tests.losses.observing import LargeAllocations

INF = math.inf


@given(shift=st.sampled_from([-1e4, -3.0, 512.0, 1e4]), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_a_constant_added_to_the_logits_changes_nothing(shift, seed):
    case = random_case((3,), 9, seed, temperature=2.0)
    # Logits on a grid of 1/64 stay exact beside 1e4.
    student, teacher = (torch.round(logits * 64) / 64 for logits in (case.student, case.teacher))
    expected = forward_kl(student, teacher, temperature=2.0)
    for values in (
        forward_kl(student + shift, teacher, temperature=2.0),
        forward_kl(student, teacher + shift, temperature=2.0),
    ):
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_opposite_certainties_at_1e4_cost_their_distance(temperature):
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    values = forward_kl(student, torch.tensor([[-1e4, 1e4]]), temperature=temperature)
    values.sum().backward()
    torch.testing.assert_close(values.detach(), torch.tensor([2e4 * temperature]))
    torch.testing.assert_close(student.grad, torch.tensor([[temperature, -temperature]]))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0.0, id="impossible to both"),
        pytest.param([0.0, 0.0], [0.0, -INF], math.log(2), id="impossible to the teacher"),
        pytest.param([0.0, -INF], [0.0, 0.0], INF, id="impossible to the student"),
        pytest.param([0.0, -INF], [0.0, -1e4], 0.0, id="impossible to the student, underflowing in the teacher"),
        pytest.param([-INF, 7.0], [-INF, -5.0], 0.0, id="one class left"),
        pytest.param([3.0], [-3.0], 0.0, id="one class"),
    ],
)
def test_classes_without_probability(student, teacher, expected):
    student = torch.tensor(student, requires_grad=True)
    teacher = torch.tensor(teacher)
    value = forward_kl(student, teacher)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(expected))
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("items", [1, 2, 3, 4, 6, 7])
def test_block_boundaries_do_not_show(items, three_rows_a_block):
    case = random_case((2, items), 11, items, temperature="per item")

    def run():
        student = case.student.detach().requires_grad_()
        values = forward_kl(student, case.teacher, temperature=case.temperature)
        return values.detach(), torch.autograd.grad(values, student, case.weights)[0]

    whole = run()
    three_rows_a_block(11)
    assert row_gradient.rows_per_block(case.student, buffers=4, dtype=torch.float32) == min(3, 2 * items)
    # exp2 rounds otherwise at the end of a processor's vectors, which a row's place in its block decides.
    torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-6)


def test_a_row_wider_than_the_scratch_is_a_block_of_its_own(monkeypatch):
    monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 1)
    case = random_case((5,), 11, 0)
    values = forward_kl(case.student, case.teacher)
    expected = references.forward_kl(case.student, case.teacher)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", ["whole", "classes", "positions"])
def test_nothing_of_the_logits_size_is_allocated_but_the_gradient(dtype, view, three_rows_a_block):
    base, teacher = torch.randn(2, 2, 40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    if view == "classes":
        base, teacher = base[..., :200], teacher[..., :200]
    elif view == "positions":
        base, teacher = base[:, :-1], teacher[:, 1:]
    three_rows_a_block(base.shape[-1])
    logits_bytes = base.numel() * base.element_size()

    student = base.detach()
    with LargeAllocations(logits_bytes // 2, [student, teacher]) as allocations:
        forward_kl(student, teacher, temperature=2.0)
    assert allocations.count == 0

    student.requires_grad_()
    with LargeAllocations(logits_bytes // 2, [student, teacher]) as allocations:
        (gradient,) = torch.autograd.grad(forward_kl(student, teacher, temperature=2.0).sum(), student)
    assert allocations.count == 1
    assert gradient.untyped_storage().nbytes() == logits_bytes


def test_a_leaf_takes_the_gradient_over_without_a_copy():
    student, teacher = torch.zeros(5, 300, requires_grad=True), torch.randn(5, 300)
    with LargeAllocations(4 * 5 * 300, [student, teacher]) as allocations:
        forward_kl(student, teacher).sum().backward()
    assert student.grad.untyped_storage().data_ptr() in allocations.seen
    # The four scratch buffers are one storage, the gradient the other.
    assert allocations.count == 2


def test_half_precision_gradients_do_not_underflow_in_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 50_000, generator=generator).half() for _ in range(2))
    student.requires_grad_()
    loss_scale = 2.0**12
    (forward_kl(student, teacher).sum() * loss_scale).backward()
    expected = (student.detach().double().softmax(-1) - teacher.double().softmax(-1)) * loss_scale
    torch.testing.assert_close(student.grad.double(), expected, rtol=2e-3, atol=1e-6)


def test_a_second_derivative_is_refused_and_not_taken_for_zero():
    student = torch.randn(2, 3, requires_grad=True)
    total = forward_kl(student, torch.randn(2, 3)).sum() + student.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, student, create_graph=True)


def test_without_torchs_answer_about_retained_graphs_the_gradient_is_copied(monkeypatch):
    monkeypatch.setattr(row_gradient, "_graph_is_retained", lambda: True)
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    forward_kl(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_a_wrong_answer_about_retained_graphs_raises_instead_of_scaling_twice(monkeypatch):
    monkeypatch.setattr(row_gradient, "_graph_is_retained", lambda: False)
    student = torch.randn(2, 3, requires_grad=True)
    total = forward_kl(student, torch.randn(2, 3)).sum() * 2
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
