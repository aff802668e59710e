"""What every loss on the relations between rows must do, and what each of them does not look at."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import batch_relations
from hf_distill.losses.base import LOSSES
from hf_distill.losses.batch_relations import cka, contrastive, rkd_angle, rkd_distance, similarity_preserving
from tests import references
from tests.losses.observing import Operations

SPECS = [LOSSES.get(name) for name in LOSSES if LOSSES.get(name).feature == "batch"]
every_loss = pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in SPECS])
NAN = math.nan


def random_rows(rows, width, seed, *, scale=1.0, teacher_width=None):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, width, generator=generator) * scale
    teacher = torch.randn(rows, teacher_width or width, generator=generator) * scale
    return student, teacher + (student if student.shape == teacher.shape else 0)


def other_width(spec, width):
    return width if spec.name == "contrastive" else width + 2


def random_valid(rows, seed):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.7


def value_and_gradient(function, student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    values = function(student, teacher, **options)
    weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype)
    (gradient,) = torch.autograd.grad(values, student, weights)
    return values.detach(), gradient


def rotation(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].float()


@every_loss
def test_every_loss_has_a_float64_twin_and_a_paper(spec):
    assert callable(getattr(references, spec.name))
    assert spec.function.__name__ == spec.name
    assert spec.item == "sequence"
    assert not spec.takes_temperature  # contrast_temperature is none of logits
    for identifier in re.findall(r"arXiv:\d{4}\.\d{4,5}", spec.paper):
        assert identifier in inspect.getdoc(spec.function)
    assert "arXiv:" in spec.paper


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-2, 1.0, 100.0]),
    masked=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_float64_twin(spec, rows, width, seed, scale, masked):
    student, teacher = random_rows(rows, width, seed, scale=scale, teacher_width=other_width(spec, width))
    valid = random_valid(rows, seed) if masked else None
    values, gradient = value_and_gradient(spec.function, student, teacher, valid=valid)
    expected, expected_gradient = value_and_gradient(getattr(references, spec.name), student, teacher, valid=valid)
    assert values.shape == (rows,)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=2e-6)
    # A gradient is as large as the reciprocal of the shortest length that a loss divides by.
    shortest = min(1.0, torch.cat([student.norm(dim=-1), torch.pdist(student)]).min().item())
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=1e-3, atol=2e-5 / shortest)


@every_loss
def test_gradcheck_in_float64(spec):
    student, teacher = random_rows(5, 4, 1, teacher_width=other_width(spec, 4))
    valid = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda rows: spec.function(rows, teacher.double(), valid=valid), student.double().requires_grad_()
    )


@every_loss
def test_float64_stays_and_lower_precision_is_computed_in_float32(spec):
    student, teacher = random_rows(6, 8, 2)
    expected = spec.function(student.bfloat16().float(), teacher.half().float())
    values, gradient = value_and_gradient(spec.function, student.bfloat16(), teacher.half())
    assert values.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(values, expected)
    assert spec.function(student, teacher.double()).dtype == torch.float64


@every_loss
def test_autocast_changes_nothing(spec):
    student, teacher = random_rows(6, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = spec.function(student, teacher)
    assert torch.equal(under_autocast, spec.function(student, teacher))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name != "contrastive"], ids=lambda spec: spec.name)
@pytest.mark.parametrize("valid", [None, torch.tensor([True, False, True, True])])
def test_equal_rows_give_zero_value_and_gradient(spec, valid):
    student, _ = random_rows(4, 5, 4)
    values, gradient = value_and_gradient(spec.function, student, student, valid=valid)
    assert torch.equal(values, torch.zeros(4))
    assert torch.equal(gradient, torch.zeros(4, 5))


@every_loss
def test_different_rows_give_more_than_zero(spec):
    student, teacher = random_rows(5, 4, 5)
    assert spec.function(student, teacher).mean() > 1e-3


@every_loss
def test_permuted_rows_give_permuted_values(spec):
    student, teacher = random_rows(7, 5, 6)
    valid, order = random_valid(7, 1), torch.tensor([3, 1, 6, 0, 5, 2, 4])
    values = spec.function(student, teacher, valid=valid)
    permuted = spec.function(student[order], teacher[order], valid=valid[order])
    torch.testing.assert_close(permuted, values[order])


@every_loss
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_rows_that_are_not_valid_change_neither_value_nor_gradient(spec, poison):
    student, teacher = random_rows(6, 4, 7)
    valid = torch.tensor([True, False, True, True, False, True])
    student[~valid], teacher[~valid] = poison, poison
    rows = student.clone().requires_grad_()
    values = spec.function(rows, teacher, valid=valid)
    values.sum().backward()
    kept = student[valid].requires_grad_()
    expected = spec.function(kept, teacher[valid])
    expected.sum().backward()
    torch.testing.assert_close(values[valid], expected)
    assert torch.equal(values[~valid], torch.zeros(2))
    torch.testing.assert_close(rows.grad[valid], kept.grad)
    assert torch.equal(rows.grad[~valid], torch.zeros(2, 4))


@every_loss
@pytest.mark.parametrize(("rows", "valid_rows"), [(0, 0), (1, 1), (3, 0), (3, 1)])
def test_too_few_rows_give_zero_with_a_graph(spec, rows, valid_rows):
    student, teacher = random_rows(rows, 4, 8)
    valid = torch.arange(rows) < valid_rows
    student[~valid] = NAN
    values, gradient = value_and_gradient(spec.function, student, teacher, valid=valid)
    assert torch.equal(values, torch.zeros(rows))
    assert torch.equal(gradient, torch.zeros(rows, 4))


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("which", [[0, 1], [0, 1, 2, 3]])
def test_equal_rows_within_a_batch_and_rows_of_zeros_have_finite_gradients(spec, side, which):
    student, teacher = random_rows(4, 5, 9)
    for rows in (student, teacher) if side == "both" else ({"student": student, "teacher": teacher}[side],):
        rows[which] = 0.0
    values, gradient = value_and_gradient(spec.function, student, teacher)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100


@every_loss
def test_nan_in_a_valid_row_reaches_the_value(spec):
    student, teacher = random_rows(4, 5, 10)
    student[1, 2] = NAN
    assert spec.function(student, teacher).isnan().any()


@every_loss
def test_only_the_student_gets_a_gradient(spec):
    student, teacher = random_rows(4, 5, 11)
    spec.function(student.requires_grad_(), teacher.requires_grad_()).sum().backward()
    assert teacher.grad is None
    assert student.grad.any()


@every_loss
def test_nothing_is_read_back(spec):
    student, teacher = random_rows(4, 5, 12)
    with Operations() as operations:
        spec.function(
            student.requires_grad_(), teacher, valid=torch.tensor([True, False, True, True])
        ).sum().backward()
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"} & {*operations.counts}


@every_loss
def test_rows_that_do_not_belong_together_are_refused(spec):
    with pytest.raises(ValueError, match=r"\(2, 3, 5\); expected \(rows, width\).*pooled"):
        spec.function(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"\(2, 5\), the teacher's \(3, 5\)"):
        spec.function(torch.zeros(2, 5), torch.zeros(3, 5))
    for valid in (torch.ones(2), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected \(2,\) and torch\.bool"):
            spec.function(torch.zeros(2, 5), torch.zeros(2, 5), valid=valid)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, cka, similarity_preserving])
@pytest.mark.parametrize("side", [0, 1])
def test_a_rotation_and_a_scale_of_either_side_change_nothing(loss, side):
    pair = [*random_rows(6, 5, 13)]
    expected = loss(*pair)
    pair[side] = pair[side] @ rotation(5) * 7.0
    torch.testing.assert_close(loss(*pair), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, cka])
@pytest.mark.parametrize("side", [0, 1])
def test_moving_all_rows_of_either_side_changes_nothing(loss, side):
    pair = [*random_rows(6, 5, 14)]
    expected = loss(*pair)
    pair[side] = pair[side] + 3.0
    torch.testing.assert_close(loss(*pair), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_distances_and_angles_stay_exact_far_from_the_origin(loss):
    student, teacher = random_rows(40, 8, 15)
    moved = student * 2.0**-6 + 64.0  # 40 rows: torch's own choice would be matrix products
    exact = loss(moved.double(), teacher.double())
    torch.testing.assert_close(loss(moved, teacher).double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_angles_need_three_rows(rows):
    student, teacher = random_rows(rows, 5, 16)
    student[:] = student[:1]  # equal rows: the directions between them are 0 and not 1
    assert torch.equal(rkd_angle(student, teacher), torch.zeros(rows))


@pytest.mark.parametrize("numbers", [1, 2 * 7 * 7])
def test_angles_in_blocks_of_anchors_are_those_in_one_block(numbers, monkeypatch):
    student, teacher = random_rows(7, 5, 17)
    valid = random_valid(7, 2)
    expected = value_and_gradient(rkd_angle, student, teacher, valid=valid)
    monkeypatch.setattr(batch_relations, "_ANGLE_BLOCK_NUMBERS", numbers)
    torch.testing.assert_close(value_and_gradient(rkd_angle, student, teacher, valid=valid), expected)
    with torch.no_grad():
        torch.testing.assert_close(rkd_angle(student, teacher, valid=valid), rkd_angle(student, teacher, valid=valid))


def test_student_rows_that_are_all_equal_have_half_a_cka_and_teacher_rows_nothing_to_teach():
    student, teacher = random_rows(4, 5, 18)
    assert torch.equal(cka(torch.zeros(4, 5), teacher), torch.full((4,), 0.5))
    assert torch.equal(cka(student, torch.zeros(4, 5)), torch.zeros(4))


def test_rows_that_tell_nothing_cost_the_logarithm_of_their_number_to_pick_from():
    values = contrastive(torch.ones(8, 4), torch.ones(8, 4))
    torch.testing.assert_close(values, torch.full((8,), math.log(8)))


def test_a_student_that_picks_the_right_row_costs_less_the_lower_the_contrast_temperature():
    rows = torch.eye(4)
    cold, warm = (contrastive(rows, rows, contrast_temperature=value).mean() for value in (0.05, 1.0))
    assert cold < 1e-6 < warm
    torch.testing.assert_close(warm, torch.tensor(math.log(math.e + 3) - 1))
    assert contrastive(rows, rows.roll(1, 0), contrast_temperature=0.05).mean() > 10


def test_contrastive_is_blind_to_the_length_of_each_row():
    student, teacher = random_rows(5, 4, 19)
    lengths = torch.tensor([0.1, 1.0, 3.0, 10.0, 50.0]).unsqueeze(-1)
    torch.testing.assert_close(contrastive(student * lengths, teacher), contrastive(student, teacher))


def test_contrastive_refuses_other_widths_and_temperatures():
    with pytest.raises(ValueError, match=r"width 4, the teacher's 5.*projection"):
        contrastive(torch.ones(2, 4), torch.ones(2, 5))
    for temperature in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="contrast_temperature is"):
            contrastive(torch.ones(2, 4), torch.ones(2, 4), contrast_temperature=temperature)
