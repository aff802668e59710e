"""What every registered loss on the inside of layers must do; a new entry is tested here without being named."""

import inspect
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import LOSSES
from tests import references
from tests.losses.layer_cases import FEATURES, cases, random_case

SPECS = [pytest.param(LOSSES.get(name), id=name) for name in LOSSES if LOSSES.get(name).feature in FEATURES]
DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-6, torch.float64: 1e-11}

every_loss = pytest.mark.parametrize("spec", SPECS)


def twin(spec):
    return getattr(references, spec.name)


def assert_close(actual, expected, tolerance=5e-6):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * tolerance, atol=tolerance)


@every_loss
def test_every_loss_has_a_float64_twin_and_a_paper(spec):
    assert callable(twin(spec))
    assert spec.function.__name__ == spec.name
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", spec.paper)
    for identifier in re.findall(r"arXiv:\S+\d", spec.paper):
        assert identifier in inspect.getdoc(spec.function)


@every_loss
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_and_gradients_are_those_of_the_float64_twin(spec, data):
    case = data.draw(cases(spec.feature))
    values, *gradients = case.run(spec.function)
    expected, *expected_gradients = case.to(torch.float64).run(twin(spec))
    assert values.dtype == torch.float32
    assert (values >= -1e-6).all()
    size = max(1.0, *(tensor.abs().max().item() ** 4 for tensor in (*case.student, *case.teacher)))
    assert_close([values], [expected], 2e-6 * size)
    # An angle turns by the movement over the distance, of a vector from 0 and of vectors from each other.
    vectors = case.student[0].flatten(0, -2)
    nearest = torch.cat([vectors.norm(dim=-1), torch.pdist(vectors)]).min().item()
    assert_close(gradients, expected_gradients, 2e-6 * size / min(1.0, nearest))


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_computed_in_float32_or_better(spec, dtype):
    case = random_case(spec.feature, 1).to(dtype)
    values, *gradients = case.run(spec.function)
    expected, *expected_gradients = case.to(torch.float64).run(twin(spec))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype for gradient in gradients)
    assert_close([values], [expected], min(DTYPES[dtype], 5e-6))
    assert_close(gradients, expected_gradients, DTYPES[dtype])


@every_loss
def test_student_and_teacher_may_differ_in_dtype(spec):
    case = random_case(spec.feature, 2)
    case.student = tuple(tensor.bfloat16().float() for tensor in case.student)
    expected = case.run(spec.function)[0]
    case.student = tuple(tensor.bfloat16() for tensor in case.student)
    assert_close([case.run(spec.function)[0]], [expected], 1e-6)
    case.teacher = tuple(tensor.double() for tensor in case.teacher)
    assert case.run(spec.function)[0].dtype == torch.float64


@every_loss
def test_autocast_changes_nothing(spec):
    case = random_case(spec.feature, 3)
    plain = case.run(spec.function)
    under_autocast = case.run(spec.function, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@every_loss
def test_equal_inputs_give_zero_value_and_gradient(spec):
    case = random_case(spec.feature, 4)
    case.teacher = case.student
    values, *gradients = case.run(spec.function)
    assert_close([values, *gradients], [torch.zeros_like(x) for x in (values, *gradients)], 2e-7)


@every_loss
def test_permuted_sequences_give_permuted_values(spec):
    case = random_case(spec.feature, 5)
    order = torch.tensor([2, 0, 1])
    assert_close([case.map(lambda x, _: x[order]).run(spec.function)[0]], [case.run(spec.function)[0][order]], 1e-6)


@every_loss
def test_the_order_of_the_positions_does_not_matter_when_it_is_reversed(spec):
    case = random_case(spec.feature, 6)
    values, *gradients = case.map(lambda x, dim: x.flip(dim)).run(spec.function, seed=0)
    expected = case.run(spec.function)[0]
    assert_close([values], [expected.flip(1) if expected.dim() == 2 else expected.flip(1, 2)], 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.values[0].feature in ("attention", "relation")])
def test_permuted_heads_give_the_same_values(spec):
    case = random_case(spec.feature, 7, heads=3)
    expected = case.run(spec.function)[0]
    order = torch.tensor([1, 2, 0])
    case.student, case.teacher = (tuple(x[:, order] for x in side) for side in (case.student, case.teacher))
    assert_close([case.run(spec.function)[0]], [expected], 1e-6)


@every_loss
@pytest.mark.parametrize("before", [0, 2])
def test_padding_changes_nothing(spec, before):
    case = random_case(spec.feature, 8)

    def pad(tensor, dim):
        parts = [torch.full_like(tensor.narrow(dim, 0, 1), 0 if tensor.dtype == torch.bool else 7)] * 3
        return torch.cat([*parts[:before], tensor, *parts[before:]], dim)

    values, *gradients = case.map(pad).run(spec.function)
    place = slice(before, before + case.real.shape[1])
    values = values[:, place] if values.dim() == 2 else values[:, place, place]
    assert_close([values], [case.run(spec.function)[0]], 1e-6)
    for gradient in gradients:
        outside = torch.ones(gradient.shape[-2], dtype=torch.bool)
        outside[place] = False
        assert torch.equal(gradient[..., outside, :], torch.zeros_like(gradient[..., outside, :]))


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_masked_items_change_neither_value_nor_gradient(spec, poison, side):
    case = random_case(spec.feature, 9)
    expected = case.run(spec.function)
    for tensor in getattr(case, side):
        (tensor.transpose(1, 2) if tensor.dim() == 4 else tensor)[~case.real] = poison
    torch.testing.assert_close(case.run(spec.function), expected)


@every_loss
def test_nan_in_an_item_that_counts_reaches_value_and_gradient(spec):
    for side in ("student", "teacher"):
        case = random_case(spec.feature, 10)
        for tensor in getattr(case, side):
            tensor.select(-2, 0)[1] = float("nan")
        values, *gradients = case.run(spec.function)
        assert values[1].isnan().any()
        assert values[[0, 2]].isfinite().all()
        for gradient in gradients:
            assert gradient[1].isnan().any()
            assert gradient[[0, 2]].isfinite().all()


@every_loss
def test_a_batch_without_real_items_gives_zero_with_a_graph(spec):
    case = random_case(spec.feature, 11)
    values, *gradients = case.map(lambda x, _: torch.zeros_like(x) if x.dtype == torch.bool else x).run(spec.function)
    assert torch.equal(values, torch.zeros_like(values))
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_loss
def test_gradcheck_in_float64(spec):
    case = random_case(spec.feature, 12, batch=2, length=4).to(torch.float64)

    def total(*student):
        case.student = student
        values = case.values(spec.function)
        return torch.where(case.counted(values), values, 0.0)

    assert torch.autograd.gradcheck(total, tuple(tensor.requires_grad_() for tensor in case.student))


@every_loss
def test_only_the_student_gets_a_gradient(spec):
    case = random_case(spec.feature, 13)
    for tensor in case.teacher:
        tensor.requires_grad_()
    assert not case.values(spec.function).requires_grad
    for tensor in case.student:
        tensor.requires_grad_()
    case.values(spec.function).sum().backward()
    assert all(tensor.grad is None for tensor in case.teacher)
    assert all(tensor.grad is not None for tensor in case.student)
    with torch.no_grad():
        assert not case.values(spec.function).requires_grad


@every_loss
def test_inputs_of_other_shapes_are_refused(spec):
    case = random_case(spec.feature, 14)
    case.teacher = tuple(tensor[..., :-1, :] for tensor in case.teacher)
    with pytest.raises(ValueError, match=r"student's .*teacher's"):
        case.values(spec.function)
