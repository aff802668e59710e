import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses.difficulty import DIFFICULTIES, difficulty, logit_distance, student_doubt, top_probabilities
from tests.losses.cases import cases, random_case
from tests.losses.observing import LargeAllocations

INF = math.inf
NAN = math.nan
SIGNALS = [*DIFFICULTIES]
OF_BOTH = ("disagreement", "loss")


def by_hand(signal, student, teacher):
    """The definition for one item, with lists of numbers."""
    student, teacher = ([math.exp(z - max(logits)) for z in logits] for logits in (student, teacher))
    p, q = ([part / sum(parts) for part in parts] for parts in (teacher, student))
    possible = sum(part > 0 for part in teacher)
    if signal == "teacher_entropy":
        return -sum(a * math.log(a) for a in p if a) / math.log(possible) if possible > 1 else 0.0
    if signal == "teacher_confidence":
        return (1 - max(p)) / (1 - 1 / possible) if possible > 1 else 0.0
    kl = lambda one, other: sum(a * math.log(a / b) for a, b in zip(one, other, strict=True) if a)  # noqa: E731
    if signal == "loss":
        return 1 - math.exp(-kl(p, q))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2 / math.log(2)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("classes", [2, 3, 17])
def test_every_signal_is_its_definition(signal, classes):
    case = random_case((5,), classes, 1, scale=2.0, padding=classes // 3)
    expected = [by_hand(signal, *pair) for pair in zip(case.student.tolist(), case.teacher.tolist(), strict=True)]
    torch.testing.assert_close(difficulty(signal, case.student, case.teacher), torch.tensor(expected))
    values = difficulty(signal, case.student.double(), case.teacher.double())
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@given(cases(), st.sampled_from(SIGNALS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_difficulty_is_a_share_for_whatever_logits(case, signal, binary):
    values = difficulty(signal, case.student, case.teacher, binary=binary)
    assert values.shape == case.student.shape[:-1]
    assert values.dtype == torch.float32
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_easiest_items_have_0(signal):
    certain = torch.tensor([50.0, 0.0, -INF])
    torch.testing.assert_close(difficulty(signal, certain, certain), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("signal", "student", "teacher"),
    [
        ("teacher_entropy", [3.0, 0.0, -INF], [1.0, 1.0, -INF]),
        ("teacher_confidence", [3.0, 0.0, -INF], [1.0, 1.0, -INF]),
        ("disagreement", [0.0, 60.0, -INF], [60.0, 0.0, -INF]),
        ("loss", [0.0, 60.0, -INF], [60.0, 0.0, -INF]),
        ("loss", [0.0, -INF, -INF], [0.0, 0.0, -INF]),
    ],
)
def test_the_hardest_items_have_1_whatever_the_padding(signal, student, teacher):
    torch.testing.assert_close(difficulty(signal, torch.tensor(student), torch.tensor(teacher)), torch.tensor(1.0))


@pytest.mark.parametrize("signal", SIGNALS)
def test_an_items_difficulty_is_that_of_the_item_alone(signal, three_rows_a_block):
    case = random_case((2, 4), 11, 3, scale=3.0)
    case.teacher[0, 1] = NAN
    whole = difficulty(signal, case.student, case.teacher)
    assert whole.isnan().tolist() == [[False, True, False, False], [False] * 4]
    alone = [difficulty(signal, case.student[row], case.teacher[row]) for row in range(2)]
    torch.testing.assert_close(torch.stack(alone), whole, rtol=0, atol=0, equal_nan=True)
    three_rows_a_block(11, buffers=6)
    torch.testing.assert_close(difficulty(signal, case.student, case.teacher), whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("signal", SIGNALS)
def test_labels_that_are_choices_of_their_own_have_the_mean_of_their_difficulties(signal):
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double() * 2
    expected = [
        sum(by_hand(signal, [s, 0.0], [t, 0.0]) for s, t in zip(*pair, strict=True)) / 3
        for pair in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    values = difficulty(signal, student, teacher, binary=True)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("signal", OF_BOTH)
def test_signals_of_both_are_smooth_where_student_and_teacher_agree(signal):
    case = random_case((4,), 9, 0, scale=2.0)
    student, teacher = case.student.double(), case.teacher.double()
    near = [difficulty(signal, student + step * teacher, student) for step in (1e-2, 5e-3)]
    torch.testing.assert_close(near[0] / near[1], torch.full((4,), 4.0).double(), rtol=0.05, atol=0.0)


def test_the_distance_of_logits_is_one_minus_their_cosine():
    student = torch.tensor([[1.0, 0.0, -INF], [1.0, 1.0, 5.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0, -INF], [-3.0, 3.0, -INF], [-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(logit_distance(student, teacher), torch.tensor([0.0, 1.0, 2.0, 1.0]))


def test_the_students_doubt_is_the_inverse_of_its_confidence():
    student = torch.tensor([[50.0, 0.0, 0.0], [1.0, 1.0, -INF]])
    expected = torch.tensor([1 / 1.001, 1 / 0.501])
    torch.testing.assert_close(student_doubt(student, torch.zeros(2, 3)), expected)
    labels = torch.tensor([[50.0, 0.0]])
    torch.testing.assert_close(student_doubt(labels, labels, binary=True), expected.mean()[None])


def test_the_top_probabilities_are_the_teachers_largest_and_the_students_of_the_same_classes():
    student = torch.tensor([[0.1, 0.2, 0.7]]).log()
    teacher = torch.tensor([[0.3, 0.6, 0.1]]).log()
    expected = torch.tensor([[[0.6, 0.3], [0.2, 0.1]]])
    torch.testing.assert_close(top_probabilities(student, teacher, classes=2), expected)
    wide = top_probabilities(student, teacher, classes=5)
    torch.testing.assert_close(wide, torch.tensor([[[0.6, 0.3, 0.1, 0, 0], [0.2, 0.1, 0.7, 0, 0]]]))


@pytest.mark.parametrize("view", ["whole", "classes", "positions"])
def test_nothing_of_the_logits_size_is_allocated(view, three_rows_a_block):
    student, teacher = torch.randn(2, 2, 40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    if view == "classes":
        student, teacher = student[..., :200], teacher[..., :200]
    elif view == "positions":
        student, teacher = student[:, :-1], teacher[:, 1:]
    three_rows_a_block(student.shape[-1], buffers=6)
    size = student.numel() * student.element_size()
    with LargeAllocations(size // 2, [student, teacher]) as allocations:
        for signal in SIGNALS:
            difficulty(signal, student, teacher)
        logit_distance(student, teacher)
        student_doubt(student, teacher)
        top_probabilities(student, teacher, classes=8)
    assert allocations.count == 0


def test_difficulty_has_no_gradient_and_leaves_the_logits_alone():
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    before = student.detach().clone(), teacher.clone()
    for signal in SIGNALS:
        assert not difficulty(signal, student, teacher).requires_grad
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_an_unknown_signal_or_unequal_logits_are_refused():
    with pytest.raises(ValueError, match="Unknown signal of difficulty 'entropy'"):
        difficulty("entropy", torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="they must be equal"):
        difficulty("loss", torch.zeros(2, 3), torch.zeros(2, 4))
