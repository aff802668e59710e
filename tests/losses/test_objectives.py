"""Losses with a target, on candidates, on plain logits, with the teacher's entropy: what not every loss does."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import (
    LOSSES,
    binary_forward_kl,
    centered_logit_mse,
    dkd,
    forward_kl,
    hidden_kl,
    listnet,
    logit_cosine,
    logit_mse,
    margin_mse,
    nkd,
    pairwise_ranking,
    row_gradient,
    soft_bce,
    soft_cross_entropy,
)
from tests import references
from tests.losses.cases import cases, random_case
from tests.losses.observing import LargeAllocations

INF = math.inf
BY_ROWS = [dkd, nkd, pairwise_ranking, margin_mse, logit_cosine, centered_logit_mse]
WITH_TARGETS = [dkd, nkd, margin_mse]


def options_of(function, temperature):
    return {"temperature": temperature} if LOSSES.get(function.__name__).takes_temperature else {}


def gradient_of(function, student, *args, **options):
    student = student.detach().requires_grad_()
    values = function(student, *args, **options)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


@pytest.mark.parametrize("function", [soft_cross_entropy, soft_bce, dkd, nkd, listnet, pairwise_ranking])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0, "per item"])
def test_gradcheck_at_every_temperature(function, temperature):
    case = random_case((2, 3), 5, 6, padding=1, temperature=temperature)
    options = {"temperature": case.temperature}
    if function in WITH_TARGETS:
        options["targets"] = torch.tensor([[0, 1, 2], [3, -100, 0]])
    student, teacher = case.student[..., :4].double().requires_grad_(), case.teacher[..., :4].double()
    padding = torch.full((2, 3, 1), -INF, dtype=torch.float64)

    def padded(logits):
        return function(torch.cat([logits, padding], -1), torch.cat([teacher, padding], -1), **options)

    assert torch.autograd.gradcheck(padded, student)


@pytest.mark.parametrize("function", WITH_TARGETS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_with_targets_values_and_gradients_are_those_of_the_twin(function, case, seed):
    options = options_of(function, case.temperature)
    possible = (case.teacher != -INF).sum(-1)  # they are the first ones
    choice = torch.rand(possible.shape, generator=torch.Generator().manual_seed(seed))
    options["targets"] = torch.where(choice < 0.2, -100, (choice * possible).long())
    values, gradient = gradient_of(function, case.student, case.teacher, **options)
    twin = getattr(references, function.__name__)
    expected, expected_gradient = gradient_of(twin, case.student, case.teacher, **options)
    largest = torch.as_tensor(case.temperature).max().item() if values.numel() else 1.0
    # Margins of logits of 1e4 cancel down to their rounding.
    margin = case.student.clamp(min=-1e5).abs().max().item() if function is margin_mse and values.numel() else 0.0
    value_error = 5e-6 * largest**2 + 1e-6 * margin**2
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=value_error)
    gradient_error = 5e-6 * largest + 1e-6 * margin
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=2e-5, atol=gradient_error)


@pytest.mark.parametrize("function", WITH_TARGETS)
def test_without_a_label_the_teachers_best_class_stands_in(function):
    case = random_case((4,), 6, 1)
    best = case.teacher.argmax(-1)
    expected = function(case.student, case.teacher, targets=best)
    assert torch.equal(function(case.student, case.teacher), expected)
    assert torch.equal(function(case.student, case.teacher, targets=torch.full((4,), -100)), expected)
    mixed = torch.tensor([2, -100, 0, -100])
    values = function(case.student, case.teacher, targets=mixed)
    assert torch.equal(values == expected, (mixed == -100) | (mixed == best))


@pytest.mark.parametrize("function", WITH_TARGETS)
def test_targets_of_another_shape_or_dtype_are_refused(function):
    logits = torch.zeros(2, 5)
    for targets in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"targets have shape .* expected one class per item, \(2,\)"):
            function(logits, logits, targets=targets)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (dkd, {"alpha": -1.0}, "alpha is -1.0"),
        (dkd, {"beta": INF}, "beta is inf"),
        (dkd, {"alpha": 0.0, "beta": 0.0}, "alpha and beta of dkd are 0"),
        (nkd, {"gamma": math.nan}, "gamma is nan"),
    ],
)
def test_weights_that_make_no_sense_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 5), torch.zeros(2, 5), **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dkd_with_the_teachers_doubt_as_beta_is_forward_kl(temperature):
    case = random_case((5,), 9, 2, scale=2.0, padding=2)
    targets = torch.tensor([0, 3, 5, 1, 2])
    doubt = 1 - (case.teacher / temperature).softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    for item, beta in enumerate(doubt.tolist()):
        pair = case.student[item], case.teacher[item]
        values = gradient_of(dkd, *pair, temperature=temperature, targets=targets[item], beta=beta)
        torch.testing.assert_close(values, gradient_of(forward_kl, *pair, temperature=temperature))
        twin = references.dkd(*pair, temperature, targets[item], beta=doubt[item].double().item())
        torch.testing.assert_close(twin, references.forward_kl(*pair, temperature), rtol=1e-6, atol=1e-6)


def test_dkd_is_what_the_authors_code_computes():
    case = random_case((6,), 8, 3, scale=2.0)
    targets, temperature = torch.tensor([0, 1, 2, 3, 4, 7]), 4.0
    chosen = F.one_hot(targets, 8).double()
    student, teacher = (logits.double() / temperature for logits in (case.student, case.teacher))
    pairs = [
        torch.stack([(p * chosen).sum(-1), (p * (1 - chosen)).sum(-1)], -1)
        for p in (student.softmax(-1), teacher.softmax(-1))
    ]
    tckd = F.kl_div(pairs[0].log(), pairs[1], reduction="none").sum(-1)
    rest = [logits - 1000 * chosen for logits in (student, teacher)]
    nckd = F.kl_div(rest[0].log_softmax(-1), rest[1].softmax(-1), reduction="none").sum(-1)
    values = dkd(case.student, case.teacher, temperature=temperature, targets=targets, alpha=0.5, beta=3.0)
    torch.testing.assert_close(values.double(), 16 * (0.5 * tckd + 3 * nckd), rtol=1e-5, atol=1e-5)


def test_nkd_is_what_the_authors_code_computes():
    case = random_case((6,), 8, 4, scale=2.0)
    targets, temperature = torch.tensor([0, 1, 2, 3, 4, 7]), 3.0
    student, teacher = case.student.double(), case.teacher.double()
    column = targets[:, None]
    first = -(teacher.softmax(-1) * student.log_softmax(-1)).gather(-1, column).squeeze(-1)
    others = torch.ones(6, 8, dtype=torch.bool).scatter(-1, column, False)
    student, teacher = (logits[others].view(6, 7) / temperature for logits in (student, teacher))
    second = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1) * temperature**2
    values = nkd(case.student, case.teacher, temperature=temperature, targets=targets, gamma=1.5)
    torch.testing.assert_close(values.double(), first + 1.5 * second)
    values = nkd(case.student, case.teacher, temperature=temperature, targets=targets, gamma=0.0)
    torch.testing.assert_close(values.double(), first)


def test_the_temperature_of_nkd_is_that_of_the_other_classes_alone():
    case = random_case((4,), 9, 5)

    def others(student, teacher, temperature):
        first = nkd(student, teacher, gamma=0.0)
        return nkd(student, teacher, temperature=temperature, gamma=1.0) - first

    expected = others(case.student, case.teacher, 1.0) * 16
    torch.testing.assert_close(others(case.student * 4, case.teacher * 4, 4.0), expected, rtol=1e-5, atol=1e-4)
    first = nkd(case.student, case.teacher, temperature=10.0, gamma=0.0)
    assert torch.equal(first, nkd(case.student, case.teacher, gamma=0.0))


@pytest.mark.parametrize(
    ("student", "teacher", "target", "expected"),
    [
        pytest.param([0.0, 0.0, -INF], [0.0, 0.0, -INF], 0, 0.0, id="padding"),
        pytest.param([0.0, 0.0, 0.0], [0.0, -INF, -INF], 0, math.log(3), id="others impossible to the teacher"),
        pytest.param([0.0, 0.0, 0.0], [-INF, 0.0, 0.0], 0, math.log(3 / 2), id="target impossible to the teacher"),
        pytest.param([0.0, -INF, 0.0], [0.0, 0.0, 0.0], 0, INF, id="another impossible to the student"),
        pytest.param([0.0, -INF, -INF], [0.0, 0.0, 0.0], 0, INF, id="all others impossible to the student"),
        pytest.param([5.0], [-3.0], 0, 0.0, id="one class"),
        pytest.param([1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], 0, 1e4, id="opposite certainties"),
        pytest.param([0.0, 1e4, -1e4], [0.0, -1e4, 1e4], 0, 8 * 2e4, id="opposite certainties of the others"),
    ],
)
def test_dkd_where_probabilities_are_0(student, teacher, target, expected):
    values, gradient = gradient_of(
        dkd, torch.tensor([student]), torch.tensor([teacher]), targets=torch.tensor([target])
    )
    torch.testing.assert_close(values, torch.tensor([expected]), rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param([0.0, 0.0, -INF], [0.0, 0.0, -INF], math.log(2) / 2, id="padding"),
        pytest.param([0.0, 0.0, 0.0], [0.0, -INF, -INF], math.log(3), id="others impossible to the teacher"),
        pytest.param([0.0, -INF, -INF], [0.0, 0.0, 0.0], INF, id="all others impossible to the student"),
        pytest.param([-INF, 0.0, 0.0], [0.0, 0.0, 0.0], INF, id="target impossible to the student"),
        pytest.param([-INF, 0.0, 0.0], [-INF, 0.0, 0.0], 1.5 * math.log(2), id="target impossible to both"),
        pytest.param([5.0], [-3.0], 0.0, id="one class"),
    ],
)
def test_nkd_where_probabilities_are_0(student, teacher, expected):
    targets = torch.tensor([0])
    values, gradient = gradient_of(nkd, torch.tensor([student]), torch.tensor([teacher]), targets=targets)
    torch.testing.assert_close(values, torch.tensor([expected]))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_is_torchs_with_the_gradient_of_forward_kl(temperature):
    case = random_case((6,), 7, 7, scale=2.0, temperature=temperature)
    target = (case.teacher / temperature).softmax(-1)
    expected = F.cross_entropy(case.student / temperature, target, reduction="none") * temperature**2
    values, gradient = gradient_of(soft_cross_entropy, case.student, case.teacher, temperature=temperature)
    torch.testing.assert_close(values, expected)
    kl_gradient = gradient_of(forward_kl, case.student, case.teacher, temperature=temperature)[1]
    assert torch.equal(gradient, kl_gradient)
    mean, mean_gradient = gradient_of(
        soft_cross_entropy, case.student, case.teacher, temperature=temperature, class_mean=True
    )
    torch.testing.assert_close(mean, expected / 7)
    torch.testing.assert_close(mean_gradient, kl_gradient / 7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_bce_is_torchs_with_the_gradient_of_binary_forward_kl(temperature):
    case = random_case((6,), 5, 8, scale=2.0)
    target = torch.sigmoid(case.teacher / temperature)
    loss = F.binary_cross_entropy_with_logits(case.student / temperature, target, reduction="none")
    values, gradient = gradient_of(soft_bce, case.student, case.teacher, temperature=temperature)
    torch.testing.assert_close(values, loss.sum(-1) * temperature**2)
    assert torch.equal(
        gradient, gradient_of(binary_forward_kl, case.student, case.teacher, temperature=temperature)[1]
    )


def test_soft_bce_of_certain_labels_is_0():
    logits = torch.tensor([[INF, -INF, 1e4, -1e4]])
    assert soft_bce(logits, logits).item() == 0
    assert soft_cross_entropy(torch.tensor([0.0, -INF, -1e4]), torch.tensor([0.0, -INF, -1e4])).item() == 0


def test_listnet_is_forward_kl_over_the_candidates():
    case = random_case((4,), 6, 9, padding=2, temperature="per item")
    options = {"temperature": case.temperature}
    assert torch.equal(
        listnet(case.student, case.teacher, **options), forward_kl(case.student, case.teacher, **options)
    )


def test_pairwise_ranking_is_the_mean_over_pairs_of_ranknets_cross_entropy_less_entropy():
    case = random_case((3,), 4, 10)
    expected = torch.zeros(3)
    for i in range(4):
        for j in range(4):
            if i != j:
                target = torch.sigmoid((case.teacher[:, i] - case.teacher[:, j]) / 2)
                odds = (case.student[:, i] - case.student[:, j]) / 2
                loss = F.binary_cross_entropy_with_logits(odds, target, reduction="none")
                entropy = F.binary_cross_entropy(target, target, reduction="none")
                expected += 4 * (loss - entropy) / 12
    torch.testing.assert_close(pairwise_ranking(case.student, case.teacher, temperature=2.0), expected)


@pytest.mark.parametrize("function", [pairwise_ranking, margin_mse, centered_logit_mse, logit_cosine])
def test_candidates_at_minus_infinity_in_the_teacher_change_nothing(function):
    case = random_case((3,), 6, 11)
    expected = gradient_of(function, case.student[:, :4], case.teacher[:, :4])
    case.teacher[:, 4:] = -INF
    for padding in (-INF, 3.0):
        case.student[:, 4:] = padding
        values, gradient = gradient_of(function, case.student, case.teacher)
        torch.testing.assert_close((values, gradient[:, :4]), expected)
        assert not gradient[:, 4:].any()
    case.teacher[:] = -INF
    assert not gradient_of(centered_logit_mse, case.student, case.teacher)[1].any()
    assert pairwise_ranking(case.student, case.teacher).tolist() == [0.0] * 3


@pytest.mark.parametrize("function", [listnet, pairwise_ranking, margin_mse, centered_logit_mse])
def test_a_constant_added_to_all_scores_changes_nothing(function):
    case = random_case((3,), 9, 12)
    student, teacher = (torch.round(logits * 64) / 64 for logits in (case.student, case.teacher))
    expected = function(student, teacher)
    torch.testing.assert_close(function(student + 1024, teacher), expected)
    torch.testing.assert_close(function(student, teacher - 1024), expected)
    assert not torch.allclose(logit_mse(student + 1024, teacher), logit_mse(student, teacher))


@pytest.mark.parametrize("candidates", [3, 10])
@pytest.mark.parametrize("items", [1, 4, 7])
def test_block_boundaries_do_not_show_in_pairs(items, candidates, three_rows_a_block):
    case = random_case((2, items), candidates, items, padding=1, temperature="per item")
    options = {"temperature": case.temperature}
    whole = gradient_of(pairwise_ranking, case.student, case.teacher, **options)
    # Three rows of pairs hold one item of three candidates, and a part of one of ten.
    three_rows_a_block(candidates, buffers=10)
    torch.testing.assert_close(gradient_of(pairwise_ranking, case.student, case.teacher, **options), whole)


@pytest.mark.parametrize("function", BY_ROWS)
def test_block_boundaries_do_not_show(function, monkeypatch):
    case = random_case((2, 4), 11, 13, temperature="per item")
    options = options_of(function, case.temperature)
    whole = gradient_of(function, case.student, case.teacher, **options)
    monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 1)
    torch.testing.assert_close(gradient_of(function, case.student, case.teacher, **options), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", BY_ROWS)
def test_nothing_of_the_logits_size_is_allocated_but_the_gradient(function, dtype, monkeypatch):
    student, teacher = torch.randn(2, 40, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 4 * 20 * 30)
    nbytes = student.numel() * student.element_size()
    with LargeAllocations(nbytes // 2, [student, teacher]) as allocations:
        function(student, teacher)
    assert allocations.count == 0
    student.requires_grad_()
    with LargeAllocations(nbytes // 2, [student, teacher]) as allocations:
        (gradient,) = torch.autograd.grad(function(student, teacher).sum(), student)
    assert allocations.count == 1
    assert gradient.untyped_storage().nbytes() == nbytes


@pytest.mark.parametrize("function", [dkd, nkd, centered_logit_mse])
def test_half_precision_gradients_neither_underflow_nor_overflow(function):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 50_000, generator=generator).half() for _ in range(2))
    student.requires_grad_()
    loss_scale = 2.0**12
    (function(student, teacher).sum() * loss_scale).backward()
    expected = gradient_of(function, student.float(), teacher.float())[1] * loss_scale
    torch.testing.assert_close(student.grad.float(), expected, rtol=2e-3, atol=1e-6)
    far = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16)
    assert gradient_of(function, far, -far)[1].isfinite().all() or function is centered_logit_mse


def test_half_precision_items_of_nan_or_infinity_leave_no_trace_where_they_do_not_count():
    for function in BY_ROWS:
        student = torch.tensor([[math.nan, 1.0, 2.0], [INF, 0.0, 1.0], [0.5, 1.0, 2.0]]).half().requires_grad_()
        values = function(student, torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]).half())
        torch.where(torch.tensor([False, False, True]), values, 0.0).sum().backward()
        assert torch.equal(student.grad[:2], torch.zeros(2, 3).half()), function
        assert student.grad[2].isfinite().all()
        assert student.grad[2].any()


def test_margin_mse_is_the_papers_for_one_negative_and_a_mean_over_several():
    student, teacher = torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    assert margin_mse(student, teacher, targets=torch.tensor([0, 0])).tolist() == [1.0, 4.0]
    three = margin_mse(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 0.0]), targets=torch.tensor(2))
    assert three.item() == (4 + 1) / 2


def test_margin_mse_of_an_impossible_positive_is_not_finite():
    values = margin_mse(torch.zeros(1, 3), torch.tensor([[-INF, 0.0, 1.0]]), targets=torch.tensor([0]))
    assert not values.isfinite().any()


def test_logit_cosine_ignores_the_size_of_the_logits_and_of_no_logits_it_is_1():
    case = random_case((3,), 5, 14)
    expected = 1 - F.cosine_similarity(case.student, case.teacher, dim=-1)
    for factor in (1e-3, 1.0, 1e4):
        torch.testing.assert_close(logit_cosine(case.student * factor, case.teacher), expected)
    values, gradient = gradient_of(logit_cosine, torch.zeros(1, 5), case.teacher[:1])
    assert values.item() == 1
    assert not gradient.any()


def test_centered_logit_mse_is_the_variance_of_the_differences():
    case = random_case((3,), 5, 15)
    expected = (case.student - case.teacher).var(-1, correction=0)
    torch.testing.assert_close(centered_logit_mse(case.student, case.teacher), expected)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_hidden_kl_is_forward_kl_over_the_features(temperature):
    case = random_case((2, 3), 8, 16)
    results = [
        gradient_of(function, case.student, case.teacher, temperature=temperature)
        for function in (hidden_kl, forward_kl)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    student, teacher = case.student.double().requires_grad_(), case.teacher.double()
    assert torch.autograd.gradcheck(lambda vectors: hidden_kl(vectors, teacher, temperature=temperature), student)
    with pytest.raises(ValueError, match="temperature is 0; expected"):
        hidden_kl(case.student, case.teacher, temperature=0)
