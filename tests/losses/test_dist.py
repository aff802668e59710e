"""DIST compares items with each other, so what every loss does item by item is asked of it here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import dist
from tests import references
from tests.losses.cases import CLASSES, TEMPERATURES, random_case

INF = math.inf


@st.composite
def dist_cases(draw):
    """A case of items, which of them are valid, and options."""
    classes = draw(st.sampled_from(CLASSES))
    padding = draw(st.integers(0, classes - 1))
    items = draw(st.sampled_from([0, 1, 2, 3, 8]))
    case = random_case(
        (items,),
        classes,
        draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4])),
        padding=padding,
        impossible=draw(st.integers(0, classes - 1 - padding)),
        near=draw(st.booleans()),
        temperature=draw(st.sampled_from([*TEMPERATURES, "tensor", "per item"])),
    )
    chosen = draw(st.lists(st.booleans(), min_size=items, max_size=items))
    valid = draw(st.sampled_from([None, torch.tensor(chosen, dtype=torch.bool)]))
    inter, intra = draw(st.sampled_from([(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)]))
    return case, {"temperature": case.temperature, "valid": valid, "inter": inter, "intra": intra}


def value_and_gradient(function, case, **options):
    student = case.student.detach().requires_grad_()
    values = function(student, case.teacher, **options)
    return values.detach(), torch.autograd.grad(values, student, case.weights.to(values.dtype))[0]


@settings(max_examples=100, deadline=None)
@given(drawn=dist_cases())
def test_values_and_gradients_are_those_of_the_float64_twin(drawn):
    case, options = drawn
    values, gradient = value_and_gradient(dist, case, **options)
    expected, expected_gradient = value_and_gradient(references.dist, case, **options)
    largest = torch.as_tensor(case.temperature).max().item() if values.numel() else 1.0
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6 * largest**2)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * largest**2)


@settings(max_examples=50, deadline=None)
@given(drawn=dist_cases())
def test_equal_logits_give_zero_value_and_gradient(drawn):
    case, options = drawn
    case.teacher = case.student
    values, gradient = value_and_gradient(dist, case, **options)
    assert torch.equal(values, torch.zeros_like(values))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0, "per item"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_gradcheck_in_float64(weights, temperature):
    case = random_case((5,), 4, 0, temperature=temperature)
    options = {"temperature": case.temperature, "valid": torch.tensor([True, True, False, True, True])}
    student, teacher = case.student.double().requires_grad_(), case.teacher.double()
    inter, intra = weights
    assert torch.autograd.gradcheck(lambda logits: dist(logits, teacher, inter=inter, intra=intra, **options), student)


def test_it_is_what_the_authors_code_computes():
    case = random_case((6,), 5, 1)

    def decorrelation(first, second):
        first, second = (x - x.mean(1, keepdim=True) for x in (first, second))
        return 1 - ((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-8)).mean()

    own, taught = ((logits / 4).softmax(-1) for logits in (case.student, case.teacher))
    expected = 16 * (2 * decorrelation(own, taught) + 3 * decorrelation(own.T, taught.T))
    values = dist(case.student, case.teacher, temperature=4.0, inter=2.0, intra=3.0)
    torch.testing.assert_close(values.mean(), expected, rtol=1e-4, atol=1e-4)


def test_classes_that_are_all_but_impossible_still_have_a_correlation():
    student = torch.tensor([[15409.9609, -2934.2891, -21787.8945], [5684.3125, -10845.2236, -13985.9541]])
    teacher = torch.tensor([[4033.4683, 8380.2637, -7192.5762], [-4033.4353, -5966.3535, 1820.3649]])
    values, expected = (function(student, teacher, temperature=10.0) for function in (dist, references.dist))
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_less_certain_but_prefers_the_same_agrees():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]])
    student = 0.5 * probs + 0.5 / 3
    torch.testing.assert_close(dist(student.log(), probs.log()), torch.zeros(3), rtol=0, atol=1e-6)
    assert (dist(probs.flip(-1).log(), probs.log())[:2] > 1).all()


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_items_that_are_not_valid_change_nothing_and_get_no_gradient(poison, side):
    case = random_case((5,), 6, 2, temperature="per item")
    valid = torch.tensor([True, False, True, True, False])
    getattr(case, side)[~valid] = poison
    values, gradient = value_and_gradient(dist, case, temperature=case.temperature, valid=valid)
    case.student, case.teacher, case.weights = case.student[valid], case.teacher[valid], case.weights[valid]
    expected, expected_gradient = value_and_gradient(dist, case, temperature=case.temperature[valid])
    torch.testing.assert_close(values[valid], expected)
    torch.testing.assert_close(gradient[valid], expected_gradient)
    assert not values[~valid].any()
    assert not gradient[~valid].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_a_valid_item_reaches_the_others_through_the_classes_alone(side):
    case = random_case((3,), 6, 3)
    getattr(case, side)[1, 2] = math.nan
    assert dist(case.student, case.teacher).isnan().all()
    values, gradient = value_and_gradient(dist, case, intra=0.0)
    assert values.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("items", [0, 1, 2])
def test_fewer_than_two_valid_items_have_no_term_within_classes(items):
    case = random_case((2,), 5, 4)
    valid = torch.arange(2) < items
    values, gradient = value_and_gradient(dist, case, valid=valid, inter=0.0)
    assert values.any() == (items == 2)
    assert gradient.any() == (items == 2)
    assert gradient.isfinite().all()


def test_probabilities_that_are_all_equal_have_no_correlation_and_no_gradient():
    even, uneven = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for student, teacher, expected in ((even, uneven, 1.0), (uneven, even, 1.0), (even, even + 1, 0.0)):
        student = student.clone().requires_grad_()
        values = dist(student, teacher)
        values.sum().backward()
        assert values.item() == expected
        assert not student.grad.any()


def test_with_two_classes_only_the_term_within_classes_teaches():
    case = random_case((6,), 2, 5)
    values, gradient = value_and_gradient(dist, case, intra=0.0)
    same = case.student.argmax(-1) == case.teacher.argmax(-1)
    torch.testing.assert_close(values, torch.where(same, 0.0, 2.0))
    torch.testing.assert_close(gradient, torch.zeros(6, 2), rtol=0, atol=1e-6)
    assert value_and_gradient(dist, case, inter=0.0)[1].any()


def test_a_padded_vocabulary_changes_nothing():
    case = random_case((4,), 7, 6, padding=3)
    short = dist(case.student[:, :4], case.teacher[:, :4])
    torch.testing.assert_close(dist(case.student, case.teacher), short)
    case.student[0, 3] = case.teacher[0, 3] = -INF  # to one item alone
    options = {"intra": 0.0}
    torch.testing.assert_close(
        dist(case.student, case.teacher, **options)[:1], dist(case.student[:1, :3], case.teacher[:1, :3], **options)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_scales_with_temperature_squared_and_gradient_with_temperature(temperature):
    case = random_case((4,), 6, 7)
    values, gradient = value_and_gradient(dist, case)
    case.student, case.teacher = case.student * temperature, case.teacher * temperature
    scaled, scaled_gradient = value_and_gradient(dist, case, temperature=temperature)
    torch.testing.assert_close(scaled, values * temperature**2, rtol=1e-5, atol=1e-6 * temperature**2)
    torch.testing.assert_close(scaled_gradient, gradient * temperature, rtol=1e-5, atol=1e-6 * temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_gives_float32_or_better_and_a_gradient_in_its_own(dtype):
    case = random_case((4,), 6, 8)
    case.student, case.teacher = case.student.to(dtype), case.teacher.to(dtype)
    values, gradient = value_and_gradient(dist, case)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    torch.testing.assert_close(values.double(), references.dist(case.student, case.teacher), rtol=1e-6, atol=1e-6)


def test_only_the_student_gets_a_gradient_and_permuted_items_give_permuted_values():
    case = random_case((4,), 6, 9)
    teacher = case.teacher.requires_grad_()
    assert not dist(case.student, teacher).requires_grad
    order = torch.tensor([2, 0, 3, 1])
    expected = dist(case.student, teacher)[order]
    torch.testing.assert_close(dist(case.student[order], teacher[order]), expected)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 4), {}, r"expects \(items, classes\)"),
        ((3, 4), {"valid": torch.ones(3)}, "torch.bool"),
        ((3, 4), {"valid": torch.ones(4, dtype=torch.bool)}, r"\(3,\)"),
        ((3, 4), {"inter": -1.0}, "inter is -1.0"),
        ((3, 4), {"intra": math.nan}, "intra is nan"),
        ((3, 4), {"inter": 0.0, "intra": 0.0}, "leaves nothing"),
        ((3, 4), {"temperature": 0.0}, "temperature is 0.0; expected"),
    ],
)
def test_what_makes_no_sense_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        dist(torch.zeros(shape), torch.zeros(shape), **options)
