import math

import pytest
import torch
from hypothesis import given, settings

from hf_distill.losses import forward_kl, standardize
from tests import references
from tests.losses.cases import cases, random_case

INF = math.inf


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_standardized_logits_and_their_gradients_are_those_of_the_float64_twin(case):
    weights = torch.randn(case.teacher.shape, generator=torch.Generator().manual_seed(0))
    counted = case.teacher != -INF
    results = []
    for function in (standardize, references.standardize):
        logits = case.teacher.detach().requires_grad_()
        scores = function(logits)
        total = torch.where(counted, scores * weights, 0.0).sum()
        results.append((scores.detach().double(), torch.autograd.grad(total, logits)[0].double()))
    (scores, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    # A score moves by the movement over the spread; where those of few classes cannot move, that is what cancels.
    spreads = [row[row != -INF].std(correction=0).item() for row in case.teacher.reshape(-1, case.teacher.shape[-1])]
    narrowest = min((spread for spread in spreads if spread), default=1.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=5e-6 * max(1.0, 1 / narrowest))


def test_the_mean_is_0_and_the_sample_variance_1_over_the_classes_that_are_possible():
    scores = standardize(random_case((4, 3), 9, 0, scale=5.0, padding=3).student)
    assert torch.equal(scores[..., 6:], torch.full((4, 3, 3), -INF))
    torch.testing.assert_close(scores[..., :6].mean(-1), torch.zeros(4, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[..., :6].var(-1), torch.ones(4, 3))


@pytest.mark.parametrize("shift", [0.0, 1024.0, -1024.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 64.0])
def test_shift_and_scale_of_an_items_logits_do_not_matter(shift, factor):
    logits = torch.round(random_case((3,), 6, 1).student * 64) / 64
    torch.testing.assert_close(standardize(logits * factor + shift), standardize(logits), rtol=1e-4, atol=1e-5)


def test_of_two_classes_nothing_is_left_but_which_is_larger():
    scores = standardize(torch.tensor([[0.1, 0.2], [50.0, -50.0]]))
    torch.testing.assert_close(scores.abs(), torch.full((2, 2), 0.5**0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("logits", [[1000.1] * 7, [-3.0], [2.0, -INF], [0.1, 0.1, 0.1, -INF]])
def test_logits_without_spread_become_0_without_a_gradient(logits):
    logits = torch.tensor(logits, requires_grad=True)
    scores = standardize(logits)
    possible = logits != -INF
    assert not scores[possible].any()
    scores[possible].sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_gradcheck_of_a_loss_of_standardized_logits(temperature):
    case = random_case((2, 3), 5, 2, scale=3.0)
    student, teacher = case.student.double().requires_grad_(), case.teacher.double()

    def loss(logits):
        return forward_kl(standardize(logits), standardize(teacher), temperature=temperature)

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradcheck(standardize, student)


def test_a_padded_vocabulary_gets_no_gradient():
    case = random_case((3,), 7, 3, padding=2)
    student = case.student.requires_grad_()
    forward_kl(standardize(student), standardize(case.teacher)).sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad[:, :5].any()
    assert not student.grad[:, 5:].any()


def test_nan_stays_in_its_item():
    logits = random_case((3,), 4, 4).student
    logits[1, 2] = math.nan
    assert standardize(logits).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_computed_in_float32_or_better(dtype):
    logits = random_case((3,), 20, 5, scale=30.0).student.to(dtype).requires_grad_()
    scores = standardize(logits)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), references.standardize(logits), rtol=1e-5, atol=1e-6)
    scores[..., 0].sum().backward()
    assert logits.grad.dtype == dtype
