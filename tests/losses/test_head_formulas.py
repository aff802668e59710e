"""The divergences of a chunked head's rows, formed in place, against their float64 twins."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings

from hf_distill.losses.base import item_temperature
from hf_distill.losses.head_formulas import closed_form
from hf_distill.losses.head_rows import Divergence, HeadItems, RowLosses
from hf_distill.signals import LogitFactors
from tests.losses.cases import cases, random_case
from tests.losses.kernels import kernel_of_heads
from tests.losses.test_registered_losses import gradient_tolerance, tolerance, value_and_gradient
from tests.losses.variants import decided, variants, variants_of


def has_a_formula(spec):
    return closed_form(spec.name, {}) is not None


# The kernel's interpreter takes its time.
by_either_way = pytest.mark.parametrize(
    ("walk", "loss"),
    [("torch", loss) for loss in variants_of(has_a_formula)]
    + [("kernel", loss) for loss in variants_of(has_a_formula, options=False)],
    indirect=["walk"],
    ids=str,
)
variants_of_formulas = pytest.mark.parametrize("loss", variants_of(has_a_formula), ids=str)
_PLAIN = LogitFactors(torch.zeros(1, 1), torch.zeros(1, 1))


def formed(loss, case, *, one_softmax=False, needs_gradient=True, device="cpu", in_product=False, **around):
    """Values and gradient of a case's rows, of weight `case.weights`, without a cross-entropy.

    With `in_product` the logits come multiplied as a head's products can multiply them.
    """
    classes, items = case.student.shape[-1], case.student.shape[:-1]
    student, teacher = (logits.reshape(-1, classes).clone().to(device) for logits in (case.student, case.teacher))
    temperature = item_temperature(case.temperature, case.student, torch.float32).reshape(-1, 1).clone().to(device)
    zeros = torch.zeros_like(temperature)
    weights = case.weights.reshape(-1, 1).to(device)
    values = HeadItems(zeros.long(), zeros, weights, temperature, zeros.clone(), zeros.clone(), zeros.bool())
    direction = student if needs_gradient else None
    divergence = Divergence(loss.spec, loss.options, **around)
    block = RowLosses(divergence, _PLAIN, _PLAIN, temperature=1.0 if one_softmax else temperature)
    with torch.no_grad():
        given = block.factors([torch.float32], student.device) if in_product else None
        if given is not None:
            student.mul_(given.student)
            teacher.mul_(given.teacher)
        share = block.walk(student, teacher, values, direction, has_labels=False, given=given)
    if share is not None:
        student *= share
    return values.divergence.view(items).cpu(), student.view(*items, classes).cpu()


@pytest.fixture(scope="module")
def walk(request):
    """`formed`, by either way."""
    if request.param == "torch":
        yield formed
        return
    with kernel_of_heads() as device:
        yield partial(formed, device=device)


@variants(has_a_formula)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_float64_twin(loss, case):
    if not case.weights.numel():
        return
    rows = decided(loss.spec, case)
    values, gradient = formed(loss, case)
    expected, expected_gradient = value_and_gradient(loss.reference, case, temperature=case.temperature)
    torch.testing.assert_close(values[rows].double(), expected[rows], rtol=2e-5, atol=2 * tolerance(loss, case, 2))
    torch.testing.assert_close(
        gradient[rows].double(), expected_gradient[rows].double(), rtol=5e-5, atol=2 * gradient_tolerance(loss, case)
    )


@by_either_way
@pytest.mark.parametrize("near", [False, True])
def test_one_softmax_serves_both_terms_at_temperature_1(loss, near, walk):
    case = random_case((7,), 300, 1, scale=3.0, padding=5, impossible=0, near=near)
    alone, together = walk(loss, case), walk(loss, case, one_softmax=True)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(walk(loss, case, needs_gradient=False)[0], alone[0], rtol=0, atol=0)


@by_either_way
def test_equal_logits_have_the_value_0_and_no_gradient(loss, walk):
    case = random_case((5,), 300, 2, scale=3.0, padding=5, temperature=2.0)
    case.teacher = case.student
    values, gradient = walk(loss, case)
    assert values.abs().max() <= 2e-6
    assert gradient.abs().max() <= 1e-7


@by_either_way
def test_without_its_square_the_temperature_divides_value_and_gradient(loss, walk):
    case = random_case((5,), 50, 3, scale=3.0, temperature="per item")
    squares = case.temperature.square()
    values, gradient = walk(loss, case)
    plain, plain_gradient = walk(loss, case, temperature_squared=False)
    torch.testing.assert_close(plain * squares, values)
    torch.testing.assert_close(plain_gradient * squares.unsqueeze(-1), gradient)


@by_either_way
def test_a_row_that_weighs_nothing_may_hold_nan(loss, walk):
    case = random_case((4,), 20, 4, temperature=2.0)
    case.weights[1] = 0
    clean = walk(loss, case)
    case.student[1], case.teacher[1, 3] = torch.nan, torch.inf
    for found, expected in zip(walk(loss, case), clean, strict=True):
        assert torch.equal(found, expected)
    assert not clean[1][1].any()


@by_either_way
def test_a_row_that_counts_and_holds_nan_is_nan(loss, walk):
    case = random_case((4,), 20, 5, temperature=2.0)
    case.teacher[1, 3] = torch.nan
    values, gradient = walk(loss, case)
    assert values[1].isnan()
    assert gradient[1].isnan().any()
    assert values[[0, 2, 3]].isfinite().all()


@by_either_way
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_class_that_one_side_thinks_impossible(loss, side, walk):
    case = random_case((6,), 30, 6, scale=3.0, temperature=2.0)
    getattr(case, side)[:3, 4] = -torch.inf
    values, gradient = walk(loss, case)
    own, own_gradient = value_and_gradient(loss.function, case, temperature=case.temperature)
    torch.testing.assert_close(values, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-5, atol=1e-5)


@variants_of_formulas
@pytest.mark.parametrize("temperature", [1.0, "per item"])
@pytest.mark.parametrize("near", [False, True])
def test_logits_may_come_as_powers_of_two_from_the_product(loss, temperature, near):
    case = random_case((7,), 300, 7, scale=3.0, padding=5, impossible=0, near=near, temperature=temperature)
    options = {"one_softmax": temperature == 1.0}
    alone, from_product = formed(loss, case, **options), formed(loss, case, in_product=True, **options)
    for found, expected in zip(from_product, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


@variants_of_formulas
def test_rows_whose_exponentials_have_no_sum_are_formed_relative_to_their_largest(loss):
    case = random_case((8,), 300, 8, scale=3.0, temperature="per item")
    expected = formed(loss, case, in_product=True)
    for logits, rows, offset in (
        (case.student, 0, 150.0),
        (case.student, 1, -150.0),
        (case.teacher, 2, 1500.0),
        (case.teacher, 3, -90.0),
    ):
        logits[rows] += offset
    case.student[4], case.teacher[4] = case.student[4] + 300, case.teacher[4] - 300
    found = formed(loss, case, in_product=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:5], other[:5], rtol=1e-3, atol=1e-3)  # what the offset leaves of the logits
        assert torch.equal(one[5:], other[5:])  # a row does not notice its neighbours
