"""What every registered loss must do; a new entry is tested here without being named."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings

from hf_distill.losses import LOSSES, masked_sum
from tests import references
from tests.losses.cases import TEMPERATURES, cases, random_case

SPECS = [pytest.param(LOSSES.get(name), id=name) for name in LOSSES if LOSSES.get(name).feature == "logits"]
WITH_TEMPERATURE = [spec for spec in SPECS if spec.values[0].takes_temperature]
DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-12}

every_loss = pytest.mark.parametrize("spec", SPECS)
every_loss_with_temperature = pytest.mark.parametrize("spec", WITH_TEMPERATURE)


def value_and_gradient(function, case, **options):
    student = case.student.detach().clone().requires_grad_()
    values = function(student, case.teacher, **options)
    (gradient,) = torch.autograd.grad(values, student, case.weights.to(values.dtype))
    return values.detach(), gradient


def reference(spec):
    return getattr(references, spec.name)


def tolerance(spec, case, power):
    """Rounding of a softmax is about 1e-6; T enters a value squared and a gradient once."""
    largest = (
        torch.as_tensor(case.temperature).max().item() if case.student.numel() and spec.takes_temperature else 1.0
    )
    return 2e-6 * largest**power


@every_loss
def test_every_loss_has_a_float64_twin_and_a_paper(spec):
    assert callable(reference(spec))
    assert spec.function.__name__ == spec.name
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", spec.paper)
    for identifier in re.findall(r"arXiv:\S+\d", spec.paper):
        assert identifier in inspect.getdoc(spec.function)


@every_loss
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_float64_twin(spec, case):
    options = case.options(spec)
    values, gradient = value_and_gradient(spec.function, case, **options)
    expected, expected_gradient = value_and_gradient(reference(spec), case, **options)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=tolerance(spec, case, 2))
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=2e-5, atol=tolerance(spec, case, 1))


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_in_float32_or_better(spec, dtype):
    case = random_case((6,), 40, 0, scale=3.0, temperature=4.0)
    case.student, case.teacher = case.student.to(dtype), case.teacher.to(dtype)
    values, gradient = value_and_gradient(spec.function, case, **case.options(spec))
    expected, expected_gradient = value_and_gradient(reference(spec), case, **case.options(spec))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    exact = min(DTYPES[dtype], 3e-6)
    torch.testing.assert_close(values.double(), expected, rtol=exact, atol=exact)
    torch.testing.assert_close(
        gradient.double(), expected_gradient.double(), rtol=DTYPES[dtype], atol=max(DTYPES[dtype] / 100, 5e-7)
    )


@every_loss
def test_student_and_teacher_may_differ_in_dtype(spec):
    case = random_case((4,), 9, 1)
    expected = spec.function(case.student.bfloat16().float(), case.teacher)
    torch.testing.assert_close(spec.function(case.student.bfloat16(), case.teacher), expected)
    assert spec.function(case.student, case.teacher.double()).dtype == torch.float64


@every_loss
def test_autocast_changes_nothing(spec):
    case = random_case((4,), 9, 1, temperature=2.0)
    plain = value_and_gradient(spec.function, case, **case.options(spec))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = value_and_gradient(spec.function, case, **case.options(spec))
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@every_loss
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_equal_logits_give_zero_value_and_gradient(spec, case):
    case.teacher = case.student
    values, gradient = value_and_gradient(spec.function, case, **case.options(spec))
    assert torch.equal(values, torch.zeros_like(values))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_loss
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_values_are_not_negative_beyond_rounding(spec, case):
    values = spec.function(case.student, case.teacher, **case.options(spec))
    assert (values >= -tolerance(spec, case, 2)).all()


@every_loss
def test_permuted_items_give_permuted_values(spec):
    case = random_case((7,), 33, 2, temperature="per item")
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    options, permuted = {}, {}
    if spec.takes_temperature:
        options, permuted = {"temperature": case.temperature}, {"temperature": case.temperature[order]}
    values = spec.function(case.student, case.teacher, **options)
    assert torch.equal(spec.function(case.student[order], case.teacher[order], **permuted), values[order])


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_masked_items_change_neither_value_nor_gradient(spec, poison, side):
    case = random_case((2, 5), 8, 3, temperature=2.0)
    mask = torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    getattr(case, side)[~mask] = poison
    student = case.student.requires_grad_()
    total = masked_sum(spec.function(student, case.teacher, **case.options(spec)), mask)
    total.backward()

    kept = case.student.detach()[mask].requires_grad_()
    expected = spec.function(kept, case.teacher[mask], **case.options(spec)).sum()
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(student.grad[mask], kept.grad)
    assert torch.equal(student.grad[~mask], torch.zeros_like(student.grad[~mask]))


@every_loss
def test_nan_in_an_item_that_counts_reaches_value_and_gradient(spec):
    for side in ("student", "teacher"):
        case = random_case((3,), 6, 4)
        getattr(case, side)[1, 2] = float("nan")
        values, gradient = value_and_gradient(spec.function, case)
        assert values.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().any()
        assert gradient[[0, 2]].isfinite().all()


@every_loss
def test_a_batch_without_counting_items_gives_zero_with_a_graph(spec):
    case = random_case((3,), 6, 5)
    student = case.student.requires_grad_()
    total = masked_sum(spec.function(student, case.teacher), torch.zeros(3, dtype=torch.bool))
    total.backward()
    assert total == 0
    assert torch.equal(student.grad, torch.zeros(3, 6))


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 4.0, "tensor", "per item"])
def test_gradcheck_in_float64(spec, temperature):
    case = random_case((2, 3), 5, 6, temperature=temperature)
    options = case.options(spec)
    student, teacher = case.student.double().requires_grad_(), case.teacher.double()
    assert torch.autograd.gradcheck(lambda logits: spec.function(logits, teacher, **options), student)


@every_loss_with_temperature
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_scales_with_temperature_squared_and_gradient_with_temperature(spec, temperature):
    case = random_case((4,), 12, 7)
    values, gradient = value_and_gradient(spec.function, case, temperature=1.0)
    case.student, case.teacher = case.student * temperature, case.teacher * temperature
    scaled, scaled_gradient = value_and_gradient(spec.function, case, temperature=temperature)
    torch.testing.assert_close(scaled, values * temperature**2, rtol=1e-5, atol=1e-6 * temperature**2)
    torch.testing.assert_close(scaled_gradient, gradient * temperature, rtol=1e-5, atol=1e-6 * temperature)


@every_loss_with_temperature
def test_a_temperature_per_item_is_that_of_each_item_alone(spec):
    case = random_case((2, 3), 12, 8, temperature="per item")
    values = spec.function(case.student, case.teacher, temperature=case.temperature)
    for index in [(0, 0), (1, 2)]:
        alone = spec.function(case.student[index], case.teacher[index], temperature=case.temperature[index].item())
        torch.testing.assert_close(values[index], alone)


@every_loss
def test_strided_views_give_what_their_copies_give(spec):
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
            values = spec.function(student, teacher)
            results.append((values.detach(), *torch.autograd.grad(values.sum(), student)))
        torch.testing.assert_close(results[0], results[1])


@every_loss
def test_a_retained_graph_gives_the_right_gradient_each_time(spec):
    case = random_case((4,), 10, 10, temperature=2.0)
    student = case.student.requires_grad_()
    values = spec.function(student, case.teacher, **case.options(spec))
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
def test_values_may_be_changed_in_place(spec):
    case = random_case((4,), 10, 10)
    student = case.student.requires_grad_()
    (gradient,) = torch.autograd.grad(spec.function(student, case.teacher).sum(), student)
    (doubled,) = torch.autograd.grad(spec.function(student, case.teacher).mul_(2).sum(), student)
    torch.testing.assert_close(doubled, 2 * gradient)


@every_loss
def test_only_the_student_gets_a_gradient(spec):
    case = random_case((4,), 10, 11)
    teacher = case.teacher.requires_grad_()
    spec.function(case.student.requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None
    assert not spec.function(case.student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not spec.function(case.student, teacher).requires_grad


@every_loss
def test_logits_of_other_shapes_are_refused(spec):
    with pytest.raises(ValueError, match=r"\(2, 5\), teacher_logits \(2, 7\).*Align"):
        spec.function(torch.zeros(2, 5), torch.zeros(2, 7))
    for shape in ((2, 0), ()):
        with pytest.raises(ValueError, match="at least one class"):
            spec.function(torch.zeros(shape), torch.zeros(shape))


@every_loss_with_temperature
def test_impossible_temperatures_are_refused(spec):
    logits = torch.zeros(2, 5)
    for number in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature is {number}; expected"):
            spec.function(logits, logits, temperature=number)
    with pytest.raises(ValueError, match=r"temperature has shape \(5,\)"):
        spec.function(logits, logits, temperature=torch.ones(5))
    with pytest.raises(ValueError, match=r"Pass temperature\.detach\(\)"):
        spec.function(logits, logits, temperature=torch.tensor(2.0, requires_grad=True))
