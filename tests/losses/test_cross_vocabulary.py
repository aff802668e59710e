"""The loss that compares ranks of probabilities, on vocabularies of different sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import uld
from tests import references

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def logits(items, classes, seed):
    return torch.randn(items, classes, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None)
@given(SIZES, st.integers(0, 999), st.sampled_from([0.5, 1.0, 4.0]))
def test_other_sizes_give_the_values_and_gradients_of_the_float64_twin(sizes, seed, temperature):
    student, teacher = (logits(3, size, seed + side) for side, size in enumerate(sizes))
    found = []
    for function in (uld, references.uld):
        leaf = student.clone().requires_grad_()
        values = function(leaf, teacher, temperature=temperature)
        found.append((values.double(), torch.autograd.grad(values.sum(), leaf)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5 * temperature**2)


@settings(deadline=None)
@given(SIZES, st.integers(0, 999))
def test_gradcheck_between_other_sizes(sizes, seed):
    student, teacher = (logits(2, size, seed + side).double() for side, size in enumerate(sizes))
    if sizes == (1, 1):
        return
    assert torch.autograd.gradcheck(lambda own: uld(own, teacher, temperature=2.0), student.requires_grad_())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 999))
def test_the_order_of_the_classes_and_impossible_ones_do_not_matter(classes, impossible, seed):
    student, teacher = logits(4, classes, seed), logits(4, classes, seed + 1)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(teacher[:, order], (0, impossible), value=-torch.inf)
    torch.testing.assert_close(uld(student, padded), uld(student, teacher), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uld(student, student[:, order]), torch.zeros(4), rtol=0, atol=1e-6)


def test_a_worked_example():
    student, teacher = torch.tensor([0.7, 0.1, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    assert uld(student, teacher).item() == pytest.approx(0.2 + 0.3 + 0.1)
    certain = torch.tensor([-torch.inf, 0.0])
    assert uld(certain, torch.zeros(4), temperature=3.0).item() == pytest.approx(9 * (0.75 + 3 * 0.25))


@pytest.mark.parametrize(("student", "teacher"), [((2, 0), (2, 3)), ((2, 3), (2, 0)), ((), (3,))])
def test_a_side_without_a_class_is_refused(student, teacher):
    with pytest.raises(ValueError, match="at least one class each"):
        uld(torch.zeros(student), torch.zeros(teacher))
