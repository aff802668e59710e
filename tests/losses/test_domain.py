"""What the losses between the domains of a batch compute."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses.base import LOSSES
from hf_distill.losses.domain import coral, mmd
from tests import references
from tests.losses.observing import Operations

SPECS = [LOSSES.get(name) for name in LOSSES if LOSSES.get(name).feature == "domain"]
every_loss = pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in SPECS])
ALTERNATING = torch.tensor([True, False, True, False, False, True, True, False])
NAN = math.nan


def random_rows(rows, width, seed, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradient(function, student, **options):
    student = student.detach().clone().requires_grad_()
    values = function(student, **options)
    (gradient,) = torch.autograd.grad(values, student, torch.linspace(0.5, 2.0, len(values), dtype=values.dtype))
    return values.detach(), gradient


@every_loss
def test_every_loss_has_a_float64_twin_and_a_paper(spec):
    assert callable(getattr(references, spec.name))
    assert spec.function.__name__ == spec.name
    assert spec.item == "sequence"
    for identifier in re.findall(r"arXiv:\d{4}\.\d{4,5}", spec.paper):
        assert identifier in inspect.getdoc(spec.function)
    assert "arXiv:" in spec.paper


@every_loss
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 6), seed=st.integers(0, 2**16), masked=st.booleans())
def test_values_and_gradients_are_those_of_the_float64_twin(spec, rows, width, seed, masked):
    student, draws = random_rows(rows, width, seed), random_rows(2, rows, seed + 1)
    target_rows, valid = draws[0] < 0, (draws[1] < 1 if masked else None)
    student[target_rows] += 1.0
    options = {"target_rows": target_rows, "valid": valid}
    values, gradient = value_and_gradient(spec.function, student, **options)
    expected, expected_gradient = value_and_gradient(getattr(references, spec.name), student, **options)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("valid", [None, ALTERNATING | ALTERNATING.roll(2)])
def test_gradcheck_of_coral_in_float64(valid):
    student = random_rows(8, 3, 0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: coral(rows, target_rows=ALTERNATING, valid=valid), student)


def test_the_gradient_of_mmd_holds_its_bandwidth():
    student = random_rows(8, 3, 0, torch.float64).requires_grad_()
    # Moving a row moves the mean distance too, so finite differences see more than the gradient; the twin does not.
    (gradient,) = torch.autograd.grad(mmd(student, target_rows=ALTERNATING).mean(), student)
    (expected,) = torch.autograd.grad(references.mmd(student, target_rows=ALTERNATING).mean(), student)
    torch.testing.assert_close(gradient, expected)
    assert gradient.sum(0).abs().max() < 1e-12  # moving all rows changes nothing


@every_loss
def test_domains_of_the_same_rows_differ_less_than_moved_or_stretched_ones(spec):
    source = random_rows(40, 4, 1)
    shifted, stretched = source + 2.0, source * torch.tensor([1.0, 1.0, 1.0, 3.0])
    target_rows = torch.arange(80) >= 40
    same, moved, wider = (
        spec.function(torch.cat([source, other]), target_rows=target_rows)[0] for other in (source, shifted, stretched)
    )
    assert same.abs() < 0.05  # mmd: its pairs of different rows leave out the equal ones
    assert wider > same + 0.05
    assert moved > same + 0.1 if spec.name == "mmd" else (moved - same).abs() < 1e-5


def test_mmd_of_equal_distributions_is_zero_on_average_and_of_shifted_ones_is_not():
    target_rows = torch.arange(8) >= 4
    values = torch.stack([mmd(random_rows(8, 3, seed), target_rows=target_rows)[0] for seed in range(400)])
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / 20
    shift = target_rows.unsqueeze(-1) * 1.0
    shifted = torch.stack([mmd(random_rows(8, 3, seed) + shift, target_rows=target_rows)[0] for seed in range(400)])
    assert shifted.mean() > 10 * shifted.std() / 20


def test_a_step_along_the_gradient_brings_the_domains_together():
    student, target_rows = random_rows(20, 3, 2), torch.arange(20) >= 10
    student[target_rows] += 3.0
    for loss in (mmd, coral):
        student[target_rows] *= 2.0
        values, gradient = value_and_gradient(loss, student, target_rows=target_rows)
        assert loss(student - 0.05 * gradient, target_rows=target_rows)[0] < values[0]


@every_loss
def test_the_value_is_one_for_all_valid_rows_and_the_domains_may_swap(spec):
    student, valid = random_rows(8, 3, 3), torch.arange(8) != 4
    values = spec.function(student, target_rows=ALTERNATING, valid=valid)
    assert torch.equal(values, torch.where(valid, values[0], 0.0))
    torch.testing.assert_close(spec.function(student, target_rows=~ALTERNATING, valid=valid), values)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4, 7])
    permuted = spec.function(student[order], target_rows=ALTERNATING[order], valid=valid[order])
    torch.testing.assert_close(permuted, values[order])


@pytest.mark.parametrize("change", [lambda rows: rows * 5.0, lambda rows: rows + 2.0, lambda rows: rows.flip(-1)])
def test_mmd_does_not_see_scale_place_or_axes(change):
    student = random_rows(8, 3, 4)
    changed = mmd(change(student), target_rows=ALTERNATING)
    torch.testing.assert_close(changed, mmd(student, target_rows=ALTERNATING), rtol=1e-4, atol=1e-6)


@every_loss
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_rows_that_are_not_valid_change_neither_value_nor_gradient(spec, poison):
    student, valid = random_rows(8, 3, 5), torch.tensor([True, True, False, True, True, True, True, False])
    student[~valid] = poison
    rows = student.clone().requires_grad_()
    values = spec.function(rows, target_rows=ALTERNATING, valid=valid)
    values.sum().backward()
    kept = student[valid].requires_grad_()
    expected = spec.function(kept, target_rows=ALTERNATING[valid])
    expected.sum().backward()
    torch.testing.assert_close(values[valid], expected)
    torch.testing.assert_close(rows.grad[valid], kept.grad)
    assert torch.equal(values[~valid], torch.zeros(2))
    assert torch.equal(rows.grad[~valid], torch.zeros(2, 3))


@every_loss
@pytest.mark.parametrize(
    ("target_rows", "valid"),
    [
        ([], []),
        ([True], [True]),
        ([True] * 4, [True] * 4),
        ([False] * 4, [True] * 4),
        ([True, False, False, False], [True] * 4),
        ([True, True, False, False], [True, True, True, False]),
        ([True, True, False, False], [False] * 4),
    ],
)
def test_too_few_rows_of_a_domain_give_zero_with_a_graph(spec, target_rows, valid):
    target_rows, valid = torch.tensor(target_rows, dtype=torch.bool), torch.tensor(valid, dtype=torch.bool)
    student = random_rows(len(valid), 3, 6)
    student[~valid] = NAN
    values, gradient = value_and_gradient(spec.function, student, target_rows=target_rows, valid=valid)
    assert torch.equal(values, torch.zeros(len(valid)))
    assert torch.equal(gradient, torch.zeros(len(valid), 3))


@every_loss
def test_rows_that_are_all_equal_give_zero_with_finite_gradients(spec):
    values, gradient = value_and_gradient(spec.function, torch.ones(8, 3), target_rows=ALTERNATING)
    assert torch.equal(values, torch.zeros(8))
    assert torch.equal(gradient, torch.zeros(8, 3))


@every_loss
def test_precision_is_float32_or_better_also_under_autocast(spec):
    student = random_rows(8, 5, 7)
    expected = spec.function(student.bfloat16().float(), target_rows=ALTERNATING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, gradient = value_and_gradient(spec.function, student.bfloat16(), target_rows=ALTERNATING)
    assert values.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(values, expected)
    assert spec.function(student.double(), target_rows=ALTERNATING).dtype == torch.float64


@every_loss
def test_nothing_is_read_back(spec):
    student = random_rows(8, 3, 8).requires_grad_()
    with Operations() as operations:
        spec.function(student, target_rows=ALTERNATING, valid=~ALTERNATING | True).sum().backward()
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"} & {*operations.counts}


@every_loss
def test_rows_and_choices_of_other_shapes_are_refused(spec):
    with pytest.raises(ValueError, match=r"\(2, 3, 5\); expected \(rows, width\)"):
        spec.function(torch.zeros(2, 3, 5), target_rows=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(2,\) and torch\.bool"):
        spec.function(torch.zeros(2, 5), target_rows=torch.ones(2))
