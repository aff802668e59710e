"""What every registered loss must do; a new entry is tested here without being named."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings

from hf_distill.losses import masked_sum
from tests import references
from tests.losses.cases import TEMPERATURES, cases, random_case
from tests.losses.variants import (
    GRADIENT_OF_LOGIT_SIZE,
    GRADIENT_PER_LENGTH,
    LOGIT_DIFFERENCES,
    NOT_A_DERIVATIVE,
    NOT_SCALED_BY_TEMPERATURE,
    NOT_ZERO_AT_EQUALITY,
    OPTIONS,
    SPECS,
    decided,
    variants,
)

DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-12}


def looks_at_one_item(spec):
    return not spec.compares_rows


def is_softened(spec):
    return looks_at_one_item(spec) and spec.takes_temperature


every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
every_loss = variants(options=False)
every_loss_of_one_item = variants(looks_at_one_item, options=False)
every_loss_of_one_item_and_its_options = variants(looks_at_one_item)
every_softened_loss = variants(is_softened, options=False)


def value_and_gradient(function, case, **keywords):
    student = case.student.detach().clone().requires_grad_()
    values = function(student, case.teacher, **keywords)
    (gradient,) = torch.autograd.grad(values, student, case.weights.to(values.dtype))
    return values.detach(), gradient


def tolerance(loss, case, power):
    """Rounding of a softmax is about 1e-6; T enters a value squared and a gradient once."""
    largest = (
        torch.as_tensor(case.temperature).max().item() if case.student.numel() and loss.spec.takes_temperature else 1.0
    )
    if loss.spec.name in LOGIT_DIFFERENCES and case.student.numel():
        largest += largest_logit(case) / 2
    return 2e-6 * largest**power


def gradient_tolerance(loss, case):
    spread = 0.0
    if loss.spec.name in GRADIENT_OF_LOGIT_SIZE and case.student.numel():
        spread = 1e-6 * largest_logit(case)
    if loss.spec.name in GRADIENT_PER_LENGTH and case.student.numel():
        compared = torch.where(case.teacher == -torch.inf, 0.0, case.student)
        spread = 1e-6 / compared.norm(dim=-1).min().item()
    return tolerance(loss, case, 1) + spread


def largest_logit(case):
    return max(logits[logits > -torch.inf].abs().max().item() for logits in (case.student, case.teacher))


@every_spec
def test_every_loss_has_a_float64_twin_a_paper_and_a_case_of_each_option(spec):
    assert callable(getattr(references, spec.name))
    assert spec.function.__name__ == spec.name
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", spec.paper)
    for identifier in re.findall(r"arXiv:\S+\d", spec.paper):
        assert identifier in inspect.getdoc(spec.function)
    assert set(spec.options) == {name for options in OPTIONS.get(spec.name, ()) for name in options}


@every_loss_of_one_item_and_its_options
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_float64_twin_and_no_value_is_negative(loss, case):
    keywords, rows = loss.keywords(case), decided(loss.spec, case)
    values, gradient = value_and_gradient(loss.function, case, **keywords)
    expected, expected_gradient = value_and_gradient(loss.reference, case, **keywords)
    assert values.dtype == torch.float32
    assert (values >= -tolerance(loss, case, 2)).all()
    torch.testing.assert_close(values[rows].double(), expected[rows], rtol=1e-5, atol=tolerance(loss, case, 2))
    torch.testing.assert_close(
        gradient[rows].double(), expected_gradient[rows].double(), rtol=2e-5, atol=gradient_tolerance(loss, case)
    )


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_in_float32_or_better(loss, dtype):
    case = random_case((6,), 40, 0, scale=3.0, temperature=4.0)
    case.student, case.teacher = case.student.to(dtype), case.teacher.to(dtype)
    values, gradient = value_and_gradient(loss.function, case, **loss.keywords(case))
    expected, expected_gradient = value_and_gradient(loss.reference, case, **loss.keywords(case))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    exact = min(DTYPES[dtype], 3e-6)
    torch.testing.assert_close(values.double(), expected, rtol=exact, atol=exact)
    torch.testing.assert_close(
        gradient.double(), expected_gradient.double(), rtol=DTYPES[dtype], atol=max(DTYPES[dtype] / 100, 5e-7)
    )


@every_loss
def test_student_and_teacher_may_differ_in_dtype(loss):
    case = random_case((4,), 9, 1)
    expected = loss.function(case.student.bfloat16().float(), case.teacher)
    torch.testing.assert_close(loss.function(case.student.bfloat16(), case.teacher), expected)
    assert loss.function(case.student, case.teacher.double()).dtype == torch.float64


@every_loss
def test_autocast_changes_nothing(loss):
    case = random_case((4,), 9, 1, temperature=2.0)
    plain = value_and_gradient(loss.function, case, **loss.keywords(case))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = value_and_gradient(loss.function, case, **loss.keywords(case))
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@variants(lambda spec: looks_at_one_item(spec) and spec.name not in NOT_ZERO_AT_EQUALITY)
@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_equal_logits_give_zero_value_and_gradient(loss, case):
    case.teacher = case.student
    values, gradient = value_and_gradient(loss.function, case, **loss.keywords(case))
    assert torch.equal(values, torch.zeros_like(values))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_loss
def test_permuted_items_give_permuted_values(loss):
    case = random_case((7,), 33, 2, temperature="per item")
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    keywords = loss.keywords(case)
    permuted = {name: value[order] for name, value in keywords.items()}
    values = loss.function(case.student, case.teacher, **keywords)
    again = loss.function(case.student[order], case.teacher[order], **permuted)
    torch.testing.assert_close(again, values[order], rtol=1e-6 if loss.spec.compares_rows else 0, atol=0)


@every_loss_of_one_item
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_masked_items_change_neither_value_nor_gradient(loss, poison, side):
    case = random_case((2, 5), 8, 3, temperature=2.0)
    mask = torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    getattr(case, side)[~mask] = poison
    student = case.student.requires_grad_()
    keywords = loss.keywords(case)
    total = masked_sum(loss.function(student, case.teacher, **keywords), mask)
    total.backward()

    kept = case.student.detach()[mask].requires_grad_()
    keywords |= {name: value[mask] for name, value in keywords.items() if name == "targets"}
    expected = loss.function(kept, case.teacher[mask], **keywords).sum()
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(student.grad[mask], kept.grad)
    assert torch.equal(student.grad[~mask], torch.zeros_like(student.grad[~mask]))


@every_loss_of_one_item
def test_nan_in_an_item_that_counts_reaches_value_and_gradient(loss):
    for side in ("student", "teacher"):
        case = random_case((3,), 6, 4)
        getattr(case, side)[1, 2] = float("nan")
        values, gradient = value_and_gradient(loss.function, case)
        assert values.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().any()
        assert gradient[[0, 2]].isfinite().all()


@every_loss
def test_a_batch_without_counting_items_gives_zero_with_a_graph(loss):
    case = random_case((3,), 6, 5)
    student = case.student.requires_grad_()
    total = masked_sum(loss.function(student, case.teacher), torch.zeros(3, dtype=torch.bool))
    total.backward()
    assert total == 0
    assert torch.equal(student.grad, torch.zeros(3, 6))


@variants(lambda spec: spec.name not in NOT_A_DERIVATIVE, options=False)
@pytest.mark.parametrize("temperature", [*TEMPERATURES, "tensor"])
def test_gradcheck_in_float64(loss, temperature):
    assert_derivative(loss, temperature)


@variants(lambda spec: spec.name not in NOT_A_DERIVATIVE)
def test_gradcheck_in_float64_with_every_option_and_a_temperature_per_item(loss):
    assert_derivative(loss, "per item")


def assert_derivative(loss, temperature):
    case = random_case((5,), 5, 6, temperature=temperature)
    keywords = loss.keywords(case)
    student, teacher = case.student.double().requires_grad_(), case.teacher.double()
    assert torch.autograd.gradcheck(lambda logits: loss.function(logits, teacher, **keywords), student)


@variants(lambda spec: is_softened(spec) and spec.name not in NOT_SCALED_BY_TEMPERATURE)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_scales_with_temperature_squared_and_gradient_with_temperature(loss, temperature):
    case = random_case((4,), 12, 7)
    values, gradient = value_and_gradient(loss.function, case, temperature=1.0)
    case.student, case.teacher = case.student * temperature, case.teacher * temperature
    scaled, scaled_gradient = value_and_gradient(loss.function, case, temperature=temperature)
    torch.testing.assert_close(scaled, values * temperature**2, rtol=1e-5, atol=1e-6 * temperature**2)
    torch.testing.assert_close(scaled_gradient, gradient * temperature, rtol=1e-5, atol=1e-6 * temperature)


@every_softened_loss
def test_a_temperature_per_item_is_that_of_each_item_alone(loss):
    case = random_case((2, 3), 12, 8, temperature="per item")
    values = loss.function(case.student, case.teacher, temperature=case.temperature)
    for index in [(0, 0), (1, 2)]:
        alone = loss.function(case.student[index], case.teacher[index], temperature=case.temperature[index].item())
        torch.testing.assert_close(values[index], alone)


@every_loss_of_one_item
def test_strided_views_give_what_their_copies_give(loss):
    base = torch.randn(2, 3, 6, 20, generator=torch.Generator().manual_seed(9))
    for view in (
        base[..., 2:13],
        base[:, :, 1:],
        base[:, ::2, :-1],
        base.transpose(0, 2),
        base[:1].expand(4, 3, 6, 20),
    ):
        teacher = view.roll(1, -1)
        results = []
        for student in (view.detach(), view.detach().contiguous()):
            student.requires_grad_()
            values = loss.function(student, teacher)
            results.append((values.detach(), *torch.autograd.grad(values.sum(), student)))
        torch.testing.assert_close(results[0], results[1])


@every_loss_of_one_item
def test_a_retained_graph_gives_the_right_gradient_each_time(loss):
    case = random_case((4,), 10, 10, temperature=2.0)
    student = case.student.requires_grad_()
    values = loss.function(student, case.teacher, **loss.keywords(case))
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 3.0, 1.0, 0.5]])
    first, second = (torch.autograd.grad(values, student, row, retain_graph=True)[0] for row in weights)
    kept = first.clone()
    last = torch.autograd.grad(values, student, torch.ones(4))[0]
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, last * weights[0, :, None])
    torch.testing.assert_close(second, last * weights[1, :, None])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(values, student, torch.ones(4))


@every_loss
def test_values_may_be_changed_in_place(loss):
    case = random_case((4,), 10, 10)
    student = case.student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss.function(student, case.teacher).sum(), student)
    (doubled,) = torch.autograd.grad(loss.function(student, case.teacher).mul_(2).sum(), student)
    torch.testing.assert_close(doubled, 2 * gradient)


@every_loss
def test_only_the_student_gets_a_gradient(loss):
    case = random_case((4,), 10, 11)
    teacher = case.teacher.requires_grad_()
    loss.function(case.student.requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None
    assert not loss.function(case.student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not loss.function(case.student, teacher).requires_grad


@every_loss
def test_logits_of_other_shapes_are_refused(loss):
    other = (3, 5) if loss.spec.any_classes else (2, 7)
    with pytest.raises(ValueError, match=rf"\(2, 5\), teacher_logits {re.escape(str(other))}.*Align"):
        loss.function(torch.zeros(2, 5), torch.zeros(other))
    for shape in ((2, 0), ()):
        with pytest.raises(ValueError, match="at least one class"):
            loss.function(torch.zeros(shape), torch.zeros(shape))


@every_softened_loss
def test_impossible_temperatures_are_refused(loss):
    logits = torch.zeros(2, 5)
    for number in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature is {number}; expected"):
            loss.function(logits, logits, temperature=number)
    with pytest.raises(ValueError, match=r"temperature has shape \(5,\)"):
        loss.function(logits, logits, temperature=torch.ones(5))
    with pytest.raises(ValueError, match=r"Pass temperature\.detach\(\)"):
        loss.function(logits, logits, temperature=torch.tensor(2.0, requires_grad=True))
