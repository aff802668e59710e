"""What the losses between the positions of one sequence do beyond what every loss does."""

import math

import pytest
import torch

from hf_distill.losses import LOSSES, ckd_angles, ckd_pairs, minilm_values, minilmv2_relations
from hf_distill.signals import Scores
from tests import references
from tests.losses.layer_cases import random_case

WORDS = [ckd_pairs, ckd_angles]


def relation(vectors, heads):
    """Relations of (batch, length, width) vectors in relation heads."""
    split = vectors.unflatten(-1, (heads, -1)).transpose(1, 2)
    return Scores(split, split, 1 / math.sqrt(split.shape[-1]))


def random_vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relations_compare_models_of_other_widths_in_as_many_relation_heads():
    student, teacher = random_vectors(2, 5, 12), random_vectors(2, 5, 32, seed=1)
    keys = torch.ones(2, 5, dtype=torch.bool)
    for heads in (1, 2, 4):
        pair = relation(student, heads), relation(teacher, heads)
        values = minilmv2_relations(*pair, keys=keys)
        expected = references.minilmv2_relations(*pair, keys=keys)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(minilm_values(*pair, keys=keys), values)
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 5\), the teacher's \(2, 4, 5, 5\)"):
        minilm_values(relation(student, 2), relation(teacher, 4), keys=keys)


def test_the_papers_average_each_sequence_first():
    assert {LOSSES.get(name).reference.items for name in ("minilm_values", "minilmv2_relations")} == {"sample_mean"}


@pytest.mark.parametrize("loss", WORDS)
def test_turning_and_stretching_all_words_of_one_side_changes_nothing(loss):
    case = random_case("tokens", 1, length=7)
    rotation = torch.linalg.qr(random_vectors(4, 4)).Q
    turned = (case.student[0] @ rotation) * 3
    if loss is ckd_angles:
        turned = turned + 1
    expected = loss(case.student[0], case.teacher[0], tokens=case.real)
    torch.testing.assert_close(loss(turned, case.teacher[0], tokens=case.real), expected, rtol=1e-4, atol=1e-6)


def test_a_right_angle_against_a_straight_line():
    student = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[-1.0], [0.0], [1.0]]])
    values = ckd_angles(student, teacher, tokens=torch.ones(1, 3, dtype=torch.bool))
    corner = (math.sqrt(0.5) - 1) ** 2
    torch.testing.assert_close(values, torch.tensor([[corner, 1.0, corner]]))


@pytest.mark.parametrize("window", [3, 5, 9])
def test_words_outside_the_window_do_not_matter(window):
    student, teacher = random_vectors(1, 9, 4), random_vectors(1, 9, 6, seed=1)
    tokens = torch.ones(1, 9, dtype=torch.bool)
    values = ckd_angles(student, teacher, tokens=tokens, window=window)
    reference = references.ckd_angles(student, teacher, tokens=tokens, window=window)
    torch.testing.assert_close(values.double(), reference, rtol=1e-5, atol=1e-6)
    student[0, 4] += 5
    changed = ckd_angles(student, teacher, tokens=tokens, window=window) != values
    assert changed.tolist() == [[abs(place - 4) <= window // 2 for place in range(9)]]


@pytest.mark.parametrize("loss", WORDS)
def test_a_word_without_enough_company_has_no_relation(loss):
    student = random_vectors(4, 4, 3).requires_grad_()
    tokens = torch.ones(4, 4, dtype=torch.bool).tril()  # the sequence i has i + 1 words
    values = loss(student, random_vectors(4, 4, 5, seed=1), tokens=tokens)
    values.sum().backward()
    # The softmax over one other word is 1 whatever the cosine; one neighbour makes no angle.
    for sequence in range(2):
        assert torch.equal(values[sequence], torch.zeros(4))
        assert torch.equal(student.grad[sequence], torch.zeros(4, 3))
    assert (values[2:][tokens[2:]] > 0).all()


@pytest.mark.parametrize("loss", WORDS)
def test_words_at_the_same_place_and_zeros_have_finite_gradients(loss):
    student = torch.zeros(1, 4, 3)
    student[0, 2:] = 1.0
    student.requires_grad_()
    values = loss(student, random_vectors(1, 4, 5), tokens=torch.ones(1, 4, dtype=torch.bool))
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


def test_windows_that_are_none_are_refused():
    vectors, tokens = torch.zeros(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)
    for window in (0, 1, 4):
        with pytest.raises(ValueError, match=f"window is {window}; expected an odd number"):
            ckd_angles(vectors, vectors, tokens=tokens, window=window)


@pytest.mark.parametrize("loss", WORDS)
def test_pooled_vectors_and_other_masks_are_refused(loss):
    vectors = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"tokens \(2, 3\)"):
        loss(vectors, vectors, tokens=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="pooled vectors have none"):
        loss(vectors[:, 0], vectors[:, 0], tokens=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"tokens\.bool\(\)"):
        loss(vectors, vectors, tokens=torch.ones(2, 4))
