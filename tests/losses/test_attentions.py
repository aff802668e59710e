"""What the losses between attention maps do beyond what every loss does."""

import math
from dataclasses import replace

import pytest
import torch

from hf_distill.losses import attention_kl, attention_mse, attention_probs_mse
from hf_distill.losses.attentions import visible_pairs
from hf_distill.signals import Scores
from tests.losses.layer_cases import random_case

ROWS = [attention_kl, attention_probs_mse]


def scores_of(rows, **options):
    """Scores (1, 1, queries, keys) as given."""
    rows = torch.tensor(rows)
    return Scores(rows[None, None], torch.eye(rows.shape[1])[None, None], 1.0, **options)


def everything(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_a_row_by_hand():
    student, teacher = scores_of([[0.0, 0.0]]), scores_of([[math.log(3), 0.0]])
    keys = everything(1, 2)
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(attention_kl(student, teacher, keys=keys), torch.tensor([[kl]]))
    torch.testing.assert_close(attention_probs_mse(student, teacher, keys=keys), torch.tensor([[2 * 0.25**2]]))
    expected = torch.tensor([[[math.log(3) ** 2, 0.0]]])
    torch.testing.assert_close(attention_mse(student, teacher, keys=keys), expected)


def test_a_sink_of_both_is_one_more_key():
    student = scores_of([[1.0, 2.0]], sinks=torch.tensor([0.5]))
    teacher = scores_of([[0.0, -1.0]], sinks=torch.tensor([1.5]))
    wider = scores_of([[1.0, 2.0, 0.5]]), scores_of([[0.0, -1.0, 1.5]])
    for loss in ROWS:
        value = loss(student, teacher, keys=everything(1, 2))
        torch.testing.assert_close(value, loss(*wider, keys=everything(1, 3)))
        alone = loss(student, replace(teacher, sinks=None), keys=everything(1, 2))
        torch.testing.assert_close(
            alone, loss(replace(student, sinks=None), replace(teacher, sinks=None), keys=everything(1, 2))
        )


def test_sinks_of_the_student_are_trained():
    sinks = torch.tensor([0.5], requires_grad=True)
    student = scores_of([[1.0, 2.0]], sinks=sinks)
    attention_kl(student, scores_of([[1.0, 2.0]], sinks=torch.tensor([1.5])), keys=everything(1, 2)).sum().backward()
    assert sinks.grad < 0


@pytest.mark.parametrize("loss", ROWS)
def test_a_constant_added_to_a_row_changes_no_probability(loss):
    case = random_case("attention", 1)
    student, teacher = case.build(*case.student, own=True), case.build(*case.teacher, own=False)
    shifted = replace(student, bias=torch.randn(3, 2, 5, 1) * 10)
    expected = loss(student, teacher, keys=case.real)
    torch.testing.assert_close(loss(shifted, teacher, keys=case.real), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ROWS)
def test_a_query_that_sees_no_key_has_the_value_0_and_no_gradient(loss):
    case = random_case("attention", 2)
    student = case.build(*(tensor.requires_grad_() for tensor in case.student), own=True)
    student = replace(student, allowed=everything(5, 5).index_fill(0, torch.tensor(1), False))
    values = loss(student, case.build(*case.teacher, own=False), keys=everything(3, 5))
    assert torch.equal(values[:, 1], torch.zeros(3))
    assert (values[:, [0, 2, 3, 4]] > 0).all()
    values.sum().backward()
    assert torch.equal(student.left.grad[:, :, 1], torch.zeros(3, 2, 4))


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_certainties_at_opposite_ends_stay_finite(size):
    student = scores_of([[size, -size]])
    student = replace(student, left=student.left.requires_grad_())
    value = attention_kl(student, scores_of([[-size, size]]), keys=everything(1, 2))
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.tensor([[2 * size]]))
    torch.testing.assert_close(student.left.grad.flatten(), torch.tensor([1.0, -1.0]))


def test_a_key_is_visible_where_both_sides_see_it():
    window = (torch.arange(4).unsqueeze(-1) - torch.arange(4)).abs() <= 1
    student, teacher = scores_of(torch.zeros(4, 4).tolist(), allowed=window), scores_of(torch.zeros(4, 4).tolist())
    keys = torch.tensor([[True, True, True, False]])
    rows = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    assert visible_pairs(student, teacher, keys)[0, 0].int().tolist() == rows
    causal = visible_pairs(student, replace(teacher, causal=True), keys)
    assert causal[0, 0].int().tolist() == torch.tensor(rows).tril().tolist()


def test_pairs_of_other_positions_are_not_masked_by_the_keys():
    case = random_case("attention", 3)
    student, teacher = case.build(*case.student, own=True), case.build(*case.teacher, own=False)
    values = attention_mse(student, teacher, keys=case.real)
    three, four = (replace(side, left=side.left[:, :, :3]) for side in (student, teacher))
    fewer = attention_mse(three, four, keys=case.real)
    real = case.real[:, :3]
    torch.testing.assert_close(fewer[real], values[:, :3][real])
    assert (fewer[:, :, 0] > 0).all()
