"""What the divergences say of each other, at the ends of their options and of classes without probability."""

import math

import pytest
import torch

from hf_distill.losses import (
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    jsd,
    reverse_kl,
    row_gradient,
    skewed_kl,
    skewed_reverse_kl,
    squared_hellinger,
    symmetric_kl,
    top_k_kl,
    tvd,
)
from tests import references
from tests.losses.cases import random_case
from tests.losses.observing import LargeAllocations

INF = math.inf
# Of (1, 0) and (1/2, 1/2), whose middle is (3/4, 1/4).
JSD_OF_SURE_AND_OPEN = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2
DIVERGENCES = [
    reverse_kl,
    symmetric_kl,
    jsd,
    generalized_jsd,
    skewed_kl,
    skewed_reverse_kl,
    adaptive_kl,
    tvd,
    squared_hellinger,
    top_k_kl,
]
every_divergence = pytest.mark.parametrize("function", DIVERGENCES, ids=lambda function: function.__name__)


def value_and_gradient(function, student, teacher, **options):
    student = torch.as_tensor(student).detach().clone().requires_grad_()
    values = function(student, torch.as_tensor(teacher), **options)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def distributions(seed, classes=50, scale=2.0):
    case = random_case((4,), classes, seed, scale=scale)
    return case.student, case.teacher


def options_of(function, *, k):
    return {"k": k} if function is top_k_kl else {}


def test_hand_worked_values_of_two_classes():
    student, teacher = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    log = math.log
    middle = [0.375, 0.625]
    halves = sum(p * log(p / m) for p, m in zip([0.5, 0.5], middle, strict=True)) / 2
    halves += sum(p * log(p / m) for p, m in zip([0.25, 0.75], middle, strict=True)) / 2
    backward, onward = 0.25 * log(0.5) + 0.75 * log(1.5), 0.5 * log(2) + 0.5 * log(2 / 3)
    expected = {
        reverse_kl: backward,
        symmetric_kl: (onward + backward) / 2,
        jsd: 4 * halves,
        generalized_jsd: halves,
        adaptive_kl: (onward + backward) / 2,  # each of the two classes is off by a quarter
        tvd: 0.25,
        squared_hellinger: 1 - math.sqrt(0.125) - math.sqrt(0.375),
        top_k_kl: onward,
    }
    for function, value in expected.items():
        assert function(student, teacher).item() == pytest.approx(value, abs=1e-6), function.__name__


@pytest.mark.parametrize(
    ("function", "option", "end", "near", "limit"),
    [
        (jsd, "beta", 0, 1e-6, forward_kl),
        (jsd, "beta", 1, 1 - 1e-6, reverse_kl),
        (jsd, "beta", 0, 1e-30, forward_kl),
        (jsd, "beta", 0, 1e-31, forward_kl),
        (skewed_kl, "skew", 0, 1e-6, forward_kl),
        (skewed_kl, "skew", 0, 1e-30, forward_kl),
        (skewed_reverse_kl, "skew", 0, 1e-6, reverse_kl),
        (skewed_reverse_kl, "skew", 0, 1e-30, reverse_kl),
        (symmetric_kl, "share", 0, 1e-6, reverse_kl),
        (symmetric_kl, "share", 1, 1 - 1e-6, forward_kl),
    ],
)
def test_an_end_of_an_option_is_the_kl_to_which_the_loss_tends(function, option, end, near, limit):
    student, teacher = distributions(0)
    expected = value_and_gradient(limit, student, teacher, temperature=2.0)
    at_end = value_and_gradient(function, student, teacher, temperature=2.0, **{option: end})
    torch.testing.assert_close(at_end, expected, rtol=0, atol=0)
    close = value_and_gradient(function, student, teacher, temperature=2.0, **{option: near})
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-5)


def test_jsd_has_no_cliff_anywhere_and_generalized_jsd_has_the_documented_one():
    student, teacher = distributions(1, scale=1.0)
    betas = [0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-3, *(step / 50 for step in range(1, 50)), 0.999, 1 - 1e-6, 1 - 1e-15, 1]
    values = torch.stack([jsd(student, teacher, beta=beta) for beta in betas])
    assert (values[1:] / values[:-1] - 1).abs().max() < 0.1
    cliff = generalized_jsd(student, teacher, beta=0.01) / generalized_jsd(student, teacher, beta=0)
    torch.testing.assert_close(cliff, torch.full((4,), 0.01), rtol=0.2, atol=0)


@pytest.mark.parametrize("beta", [1e-3, 0.25, 0.5, 0.9])
def test_jsd_is_generalized_jsd_over_the_product_of_its_shares(beta):
    student, teacher = distributions(2)
    values, gradient = value_and_gradient(jsd, student, teacher, beta=beta)
    plain, plain_gradient = value_and_gradient(generalized_jsd, student, teacher, beta=beta)
    torch.testing.assert_close(plain, beta * (1 - beta) * values)
    torch.testing.assert_close(plain_gradient, beta * (1 - beta) * gradient)


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1e-3, 0.5, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 8.0])
def test_jsd_is_as_exact_near_its_ends_as_in_the_middle(beta, distance):
    case = random_case((3,), 1000, 3, scale=3.0)
    teacher = case.student + distance * case.teacher / 3
    values, gradient = value_and_gradient(jsd, case.student, teacher, beta=beta)
    exact, exact_gradient = value_and_gradient(references.jsd, case.student, teacher, beta=beta)
    torch.testing.assert_close(values.double(), exact, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-5, atol=3e-6)


def test_what_is_equal_by_symmetry():
    student, teacher = distributions(4)
    torch.testing.assert_close(reverse_kl(student, teacher), forward_kl(teacher, student))
    torch.testing.assert_close(jsd(student, teacher, beta=0.2), jsd(teacher, student, beta=0.8))
    for function in (tvd, squared_hellinger, symmetric_kl):
        torch.testing.assert_close(function(student, teacher), function(teacher, student))
    swapped = skewed_kl(teacher, student, skew=0.3)
    torch.testing.assert_close(skewed_reverse_kl(student, teacher, skew=0.3), swapped)


def test_pinskers_and_hellingers_inequalities():
    for seed in range(20):
        student, teacher = distributions(seed)
        distance, hellinger = tvd(student, teacher), squared_hellinger(student, teacher)
        assert (2 * distance**2 <= forward_kl(student, teacher) + 1e-6).all()
        assert (hellinger <= distance + 1e-6).all()
        assert (distance <= (2 * hellinger).sqrt() + 1e-6).all()


@pytest.mark.parametrize("classes", [1, 2, 7, 64])
def test_top_k_of_all_classes_is_forward_kl_and_of_all_but_one_too(classes):
    case = random_case((5,), classes, classes, scale=3.0, temperature="per item")
    expected = value_and_gradient(forward_kl, case.student, case.teacher, temperature=case.temperature)
    for k in (classes, classes + 1, 10**6):
        found = value_and_gradient(top_k_kl, case.student, case.teacher, temperature=case.temperature, k=k)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if classes > 1:
        found = value_and_gradient(top_k_kl, case.student, case.teacher, temperature=case.temperature, k=classes - 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_top_k_grows_with_k_and_leaves_the_order_of_the_rest_to_the_student():
    student, teacher = distributions(5)
    values = torch.stack([top_k_kl(student, teacher, k=k) for k in (1, 2, 5, 20, 50)])
    assert (values[1:] >= values[:-1] - 1e-6).all()
    _, gradient = value_and_gradient(top_k_kl, student, teacher, k=5)
    rest = teacher.argsort(-1)[:, :-5]
    # One factor for the whole rest: the student's distribution within it stays as it is.
    factors = (gradient / student.softmax(-1)).gather(-1, rest)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-6)


def test_adaptive_kl_follows_the_side_on_which_the_student_is_wrong():
    teacher = torch.tensor([0.6, 0.2, 0.1, 0.1]).log()
    in_the_tail = torch.tensor([0.6, 0.05, 0.05, 0.3]).log()
    in_both = torch.tensor([0.3, 0.5, 0.1, 0.1]).log()
    torch.testing.assert_close(adaptive_kl(in_the_tail, teacher), reverse_kl(in_the_tail, teacher))
    torch.testing.assert_close(adaptive_kl(in_both, teacher), symmetric_kl(in_both, teacher))
    # A head that holds the first two classes is where all of the error lies.
    torch.testing.assert_close(adaptive_kl(in_both, teacher, head=0.85), forward_kl(in_both, teacher))


def test_the_gradient_of_adaptive_kl_takes_its_weights_for_constants():
    student, teacher = distributions(6)
    _, gradient = value_and_gradient(adaptive_kl, student, teacher, temperature=2.0)
    value, onward, backward = (
        value_and_gradient(function, student.double(), teacher.double(), temperature=2.0)
        for function in (references.adaptive_kl, forward_kl, reverse_kl)
    )
    share = ((value[0] - backward[0]) / (onward[0] - backward[0])).unsqueeze(-1)
    expected = share * onward[1] + (1 - share) * backward[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@every_divergence
def test_a_class_impossible_to_both_sides_changes_nothing(function):
    student, teacher = distributions(7, classes=9)
    padding = torch.full((4, 5), -INF)
    values, gradient = value_and_gradient(function, student, teacher, temperature=2.0)
    padded = [torch.cat([logits, padding], -1) for logits in (student, teacher)]
    padded_values, padded_gradient = value_and_gradient(function, *padded, temperature=2.0)
    torch.testing.assert_close(padded_values, values)
    torch.testing.assert_close(padded_gradient[:, :9], gradient)
    assert torch.equal(padded_gradient[:, 9:], torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("function", "to_teacher", "to_student"),
    [
        (reverse_kl, INF, math.log(2)),
        (symmetric_kl, INF, INF),
        (adaptive_kl, INF, INF),
        (jsd, 4 * JSD_OF_SURE_AND_OPEN, 4 * JSD_OF_SURE_AND_OPEN),
        (generalized_jsd, JSD_OF_SURE_AND_OPEN, JSD_OF_SURE_AND_OPEN),
        (skewed_kl, -math.log(0.55), math.log(0.5 / 0.95) / 2 + math.log(0.5 / 0.05) / 2),
        (skewed_reverse_kl, math.log(0.5 / 0.95) / 2 + math.log(0.5 / 0.05) / 2, -math.log(0.55)),
        (tvd, 0.5, 0.5),
        (squared_hellinger, 1 - math.sqrt(0.5), 1 - math.sqrt(0.5)),
        (top_k_kl, math.log(2), INF),
    ],
)
def test_classes_impossible_to_one_side_give_no_nan(function, to_teacher, to_student):
    sure, open_ = [0.0, -INF], [0.0, 0.0]
    for pair, expected in (((open_, sure), to_teacher), ((sure, open_), to_student)):
        value, gradient = value_and_gradient(function, *map(torch.tensor, pair), **options_of(function, k=1))
        assert value.item() == pytest.approx(expected)
        assert gradient.isfinite().all()


def test_an_infinite_reverse_kl_gives_its_item_no_gradient_and_others_theirs():
    student, teacher = distributions(8)
    teacher[1, 3] = -INF
    values, gradient = value_and_gradient(reverse_kl, student, teacher)
    assert values.isinf().tolist() == [False, True, False, False]
    assert torch.equal(gradient[1], torch.zeros(50))
    torch.testing.assert_close(gradient[2:], value_and_gradient(reverse_kl, student[2:], teacher[2:])[1])
    _, both = value_and_gradient(symmetric_kl, student, teacher, share=0.25)
    torch.testing.assert_close(both[1], 0.25 * value_and_gradient(forward_kl, student, teacher)[1][1])


def test_a_tie_has_the_slope_zero_in_tvd():
    student, teacher = torch.tensor([0.25, 0.25, 0.5]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    _, gradient = value_and_gradient(tvd, student, teacher)
    probs, signs = student.exp(), torch.tensor([0.0, -1.0, 1.0])
    torch.testing.assert_close(gradient, probs * (signs - (probs * signs).sum()) / 2)


@every_divergence
@pytest.mark.parametrize("items", [1, 3, 4, 7])
def test_block_boundaries_do_not_show(function, items, three_rows_a_block):
    case = random_case((2, items), 11, items, temperature="per item")
    options = {"temperature": case.temperature} | options_of(function, k=3)
    whole = value_and_gradient(function, case.student, case.teacher, **options)
    three_rows_a_block(11)
    assert row_gradient.rows_per_block(case.student, buffers=4, dtype=torch.float32) == min(3, 2 * items)
    blocks = value_and_gradient(function, case.student, case.teacher, **options)
    torch.testing.assert_close(blocks, whole, rtol=2e-6, atol=2e-7)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_the_logits_size_is_allocated_but_the_gradient(function, dtype, three_rows_a_block):
    # The order of the classes that adaptive_kl sorts is int64, and so is twice as large as a block in float32.
    student, teacher = torch.randn(2, 60, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    three_rows_a_block(300)
    logits_bytes = student.numel() * student.element_size()
    with LargeAllocations(logits_bytes // 2, [student, teacher]) as allocations:
        function(student, teacher, temperature=2.0)
    assert allocations.count == 0
    student.requires_grad_()
    with LargeAllocations(logits_bytes // 2, [student, teacher]) as allocations:
        torch.autograd.grad(function(student, teacher, temperature=2.0).sum(), student)
    assert allocations.count == 1


@every_divergence
def test_half_precision_gradients_neither_underflow_nor_overflow(function):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 50_000, generator=generator) for _ in range(2))
    student[1, 0], teacher[1, 1] = 1e3, 1e3  # a reverse KL of 1e3, whose gradient is in classes 0 and 1
    student[1, 1] = 999.5
    student, teacher = student.half(), teacher.half()
    scale = 2.0**10
    _, gradient = value_and_gradient(lambda *pair: function(*pair) * scale, student, teacher)
    _, exact = value_and_gradient(lambda *pair: function(*pair) * scale, student.double(), teacher.double())
    assert gradient.isfinite().all() == (exact.abs().max() < 65504)
    rows = exact.abs().amax(-1) < 65504
    torch.testing.assert_close(gradient.double()[rows], exact[rows], rtol=2e-3, atol=1e-6)


@every_divergence
def test_in_half_precision_an_item_that_does_not_count_gets_exactly_zero(function):
    student, teacher = distributions(9)
    student, teacher = student.half().requires_grad_(), teacher.half()
    teacher[1] = math.nan
    values = function(student, teacher)
    torch.where(torch.tensor([True, False, True, True]), values, 0.0).sum().backward()
    assert torch.equal(student.grad[1], torch.zeros(50).half())
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (jsd, {"beta": -0.1}, r"beta is -0.1; expected a number in \[0, 1\]"),
        (generalized_jsd, {"beta": 1.5}, r"beta is 1.5; expected a number in \[0, 1\]"),
        (jsd, {"beta": math.nan}, "beta is nan"),
        (skewed_kl, {"skew": 1.0}, r"skew is 1.0; expected a number in \[0, 1\)"),
        (skewed_reverse_kl, {"skew": -1}, "skew is -1"),
        (symmetric_kl, {"share": 2}, "share is 2"),
        (adaptive_kl, {"head": 0}, "head is 0; expected a number above 0 and below 1"),
        (adaptive_kl, {"head": 1.0}, "head is 1.0"),
        (top_k_kl, {"k": 0}, "k is 0; expected a whole number of classes"),
        (top_k_kl, {"k": 2.5}, "k is 2.5"),
    ],
)
def test_options_out_of_range_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 5), torch.zeros(2, 5), **options)
