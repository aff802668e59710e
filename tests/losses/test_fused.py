"""What cross_entropy_and_forward_kl computes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_distill.losses import forward_kl
from tests import references
from tests.losses.cases import random_case
from tests.losses.weighted_cases import random_terms, weigh, weighted_terms

NAN = math.nan
DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-12}


@settings(max_examples=400, deadline=None)
@given(terms=weighted_terms(), overwrite=st.booleans())
def test_values_and_gradient_are_those_of_the_float64_twin(terms, overwrite):
    *expected, expected_gradient = terms.run(references.cross_entropy_and_forward_kl)
    *values, gradient = terms.run(overwrite_teacher=overwrite)
    largest = torch.as_tensor(terms.temperature).max().item() if terms.targets.numel() else 1.0
    items = max(1, terms.targets.numel())
    for value, reference, count in zip(values, expected, (items, 1, 1), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=2e-6 * max(1, largest**2) * count)
    assert values[0].shape == ()
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=2e-5, atol=4e-6 * max(1, largest))
    unweighted = (terms.task_weights == 0) & (terms.kd_weights == 0)
    assert torch.equal(gradient[unweighted], torch.zeros_like(gradient[unweighted]))
    assert (values[1][terms.task_weights == 0] == 0).all()
    assert (values[2][terms.kd_weights == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, "tensor", "per item"])
def test_they_are_torchs_cross_entropy_and_forward_kl(temperature):
    terms = random_terms((3, 4), 50, temperature=temperature, scale=4.0)
    student = terms.student.detach().requires_grad_()
    cross_entropy = F.cross_entropy(student.flatten(0, 1), terms.targets.flatten(), reduction="none").view(3, 4)
    kl = forward_kl(student, terms.teacher, temperature=terms.temperature)
    loss = (terms.task_weights * cross_entropy + terms.kd_weights * kl).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(terms.run(), (loss.detach(), cross_entropy.detach(), kl.detach(), gradient))


def test_the_teachers_classes_are_the_leading_ones():
    terms = random_terms((5,), 20, extra=7, temperature=2.0)
    _, cross_entropy, kl = terms()
    torch.testing.assert_close(cross_entropy, F.cross_entropy(terms.student, terms.targets, reduction="none"))
    torch.testing.assert_close(kl, forward_kl(terms.student[:, :20], terms.teacher, temperature=2.0))


def test_a_target_that_the_student_holds_impossible_costs_inf_with_a_finite_gradient():
    terms = random_terms((2,), 6, padding=1)
    terms.targets[0] = 5
    loss, cross_entropy, _, gradient = terms.run()
    assert loss == math.inf
    assert cross_entropy.isinf().tolist() == [True, False]
    assert gradient[0, 5] == -terms.task_weights[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_an_item_that_counts_reaches_value_and_gradient(side):
    terms = random_terms((3,), 6, temperature=2.0)
    getattr(terms, side)[1, 2] = NAN
    loss, cross_entropy, kl, gradient = terms.run()
    assert loss.isnan()
    assert kl.isnan().tolist() == [False, True, False]
    assert cross_entropy.isnan().tolist() == [False, side == "student", False]
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("items", [0, 4])
@pytest.mark.parametrize("incoming", [1.0, 3.0])
def test_no_weight_at_all_gives_zero_with_a_graph(items, incoming):
    terms = random_terms((items,), 6, zeros=1.0)
    terms.student[:] = NAN
    loss, _, _, gradient = terms.run(incoming=incoming)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(items, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_every_dtype_is_computed_in_float32_or_better(dtype, temperature):
    terms = random_terms((6,), 40, scale=3.0, temperature=temperature, zeros=0.2)
    terms.student, terms.teacher = terms.student.to(dtype), terms.teacher.to(dtype)
    *expected, expected_gradient = terms.run(references.cross_entropy_and_forward_kl)
    *values, gradient = terms.run()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert [value.dtype for value in values] == [exact] * 3
    assert gradient.dtype == dtype
    # The twin forms the loss with the float32 weights in float64.
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=min(DTYPES[dtype], 3e-6), atol=3e-6)
    torch.testing.assert_close(
        gradient.double(), expected_gradient.double(), rtol=DTYPES[dtype], atol=max(DTYPES[dtype] / 100, 5e-7)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_small_weights_over_a_large_vocabulary_do_not_underflow(dtype, temperature):
    terms = random_terms((3,), 50_000, temperature=temperature)
    terms.student, terms.teacher = terms.student.to(dtype), terms.teacher.to(dtype)
    # Shares of 4096 items; one of them counts a thousandth of the others.
    terms.task_weights, terms.kd_weights = (torch.tensor([0.5, 0.5, 5e-4]) / 4096).expand(2, 3).unbind()
    loss_scale = 2.0**28
    gradient = terms.run(incoming=loss_scale)[-1].double()
    terms.student, terms.teacher = terms.student.double(), terms.teacher.double()
    expected = terms.run(references.cross_entropy_and_forward_kl, incoming=loss_scale)[-1]
    # The light item's entries are about 6e-4.
    torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=3e-5)


def test_an_item_of_great_weight_and_certain_error_does_not_overflow_in_half_precision():
    terms = random_terms((2,), 4, temperature=10.0)
    terms.student = torch.tensor([[200.0, 0, 0, 0], [0, 200.0, 0, 0]]).half()
    terms.teacher, terms.targets = terms.student.flip(0), torch.tensor([1, 0])
    terms.task_weights, terms.kd_weights = torch.tensor([1.0, 100.0]), torch.tensor([1.0, 100.0])
    expected = terms.run(references.cross_entropy_and_forward_kl)[-1]
    torch.testing.assert_close(terms.run()[-1], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0, "tensor", "per item"])
@pytest.mark.parametrize("extra", [0, 2])
def test_gradcheck_in_float64(temperature, extra):
    terms = random_terms((2, 3), 5, extra=extra, temperature=temperature, zeros=0.3)
    terms.teacher = terms.teacher.double()

    def loss(student):
        terms.student = student
        return terms()[0]

    assert torch.autograd.gradcheck(loss, terms.student.double().requires_grad_())


def test_half_precision_keeps_unweighted_items_at_zero():
    terms = random_terms((4,), 9, zeros=1.0)
    terms.task_weights[0] = 1.0
    terms.student, terms.teacher = terms.student.half(), terms.teacher.half()
    gradient = terms.run(incoming=2.0)[-1]
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))
    assert gradient[0].all()


def test_autocast_changes_nothing():
    terms = random_terms((4,), 9, temperature=2.0, extra=2)
    plain = terms.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(terms.run(), plain, rtol=0, atol=0)


def test_strided_views_give_what_their_copies_give():
    base = torch.randn(2, 3, 6, 20, generator=torch.Generator().manual_seed(9))
    for view in (base[..., 2:13], base[:, :, 1:], base[:, ::2, :-1], base.transpose(0, 2)):
        terms = weigh(random_case(view.shape[:-1], view.shape[-1], 0, temperature="per item"), 0, zeros=0.3)
        terms.student, terms.teacher = view, view.roll(1, -1)
        terms.task_weights = terms.task_weights[:1].expand_as(terms.task_weights)
        strided = terms.run()
        terms.student, terms.task_weights = view.contiguous(), terms.task_weights.contiguous()
        torch.testing.assert_close(terms.run(), strided)


def test_only_the_loss_has_a_graph_and_only_to_the_student():
    terms = random_terms((4,), 9)
    teacher = terms.teacher.requires_grad_()
    assert not any(result.requires_grad for result in terms())
    terms.student.requires_grad_()
    assert [result.requires_grad for result in terms()] == [True, False, False]
    terms()[0].backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not any(result.requires_grad for result in terms())


@pytest.mark.parametrize("target", [-100, 6])
def test_a_target_that_counts_and_does_not_exist_is_an_error(target):
    terms = random_terms((3,), 6)
    terms.targets[1] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        terms()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(4, 6)}, r"\(3, 6\), teacher_logits \(4, 6\).*Align"),
        ({"teacher": torch.zeros(3, 7)}, r"no class beyond the student's"),
        ({"teacher": torch.zeros(3, 0)}, r"at least one class"),
        ({"student": torch.zeros(())}, r"at least one class"),
        ({"targets": torch.zeros(3, 6, dtype=torch.int64)}, r"targets has shape \(3, 6\).*expected .*\(3,\)"),
        ({"task_weights": torch.ones(())}, r"task_weights has shape \(\)"),
        ({"kd_weights": torch.ones(2)}, r"kd_weights has shape \(2,\)"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    terms = random_terms((3,), 6)
    for name, value in change.items():
        setattr(terms, name, value)
    with pytest.raises(ValueError, match=message):
        terms()


def test_targets_that_are_no_indices_are_refused():
    terms = random_terms((3,), 6)
    terms.targets = terms.targets.int()
    with pytest.raises(TypeError, match=r"targets have dtype torch\.int32.*targets\.long\(\)"):
        terms()
