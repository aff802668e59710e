"""The chunked head on logits that are given: how high they are, and what both sides have in common."""

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import LOSSES
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_rows import Divergence
from hf_distill.signals import LogitFactors


def of_logits(logits):
    """Hidden states and a head whose products are exactly these logits, (items, classes)."""
    return LogitFactors(torch.eye(len(logits), dtype=logits.dtype), logits.t().contiguous().requires_grad_())


def offset_logits(offset, *, near=None, classes=300):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, classes, generator=draw) * 2
    other = torch.randn(6, classes, generator=draw) * 2 if near is None else logits + near * logits.flip(-1)
    return logits, other + offset


def of_both(student, teacher, name, *, temperature, labelled, kd=1.0):
    task = torch.zeros(len(student)).index_fill(0, torch.tensor(labelled, dtype=torch.int64), 1.0)
    sides = of_logits(student), of_logits(teacher)
    terms = chunked_head_loss(
        *sides,
        torch.arange(len(student)),
        task_weights=task,
        kd_weights=torch.full((len(student),), kd),
        temperature=temperature,
        divergence=Divergence(LOSSES.get(name)),
    )
    return terms, torch.autograd.grad(terms.loss, sides[0].weight)[0].t()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("offset", [-150.0, -34.0, 0.0, 25.0, 60.0])
@pytest.mark.parametrize(
    ("temperature", "labelled"), [(1.0, []), (3.0, []), (1.0, [2]), (3.0, [2]), (2.0, [2]), (2.0, [0, 1, 2, 3, 4, 5])]
)
def test_an_offset_of_one_side_costs_no_more_than_its_own_rounding(name, offset, temperature, labelled):
    student, teacher = offset_logits(offset, near=1e-2)
    terms, gradient = of_both(student, teacher, name, temperature=temperature, labelled=labelled)
    leaf = student.double().requires_grad_()
    values = LOSSES.get(name).function(leaf, teacher.double(), temperature=temperature)
    cross_entropy = F.cross_entropy(leaf, torch.arange(len(leaf)), reduction="none")
    loss = values.sum() + cross_entropy[labelled].sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(terms.divergence.double(), values.detach(), rtol=1e-5, atol=1e-6 * temperature**2)
    # Beside an offset of 150 logits are rounded to 1e-5.
    assert (gradient.double() - expected).norm() <= 2e-5 * expected.norm() + 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [-100.0, 0.0, 60.0])
@pytest.mark.parametrize("labelled", [[], [1], list(range(6))], ids=len)
def test_equal_logits_are_0_apart_at_any_height(dtype, offset, labelled):
    logits = offset_logits(offset)[1].to(dtype)
    terms, _ = of_both(logits, logits.clone(), "forward_kl", temperature=3.0, labelled=labelled)
    assert not terms.divergence.any()


@pytest.mark.parametrize("offset", [-150.0, -34.0, -20.0, 25.0, 60.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
def test_the_height_of_both_sides_reaches_neither_term(offset, temperature):
    student, teacher = (logits + offset for logits in offset_logits(0.0))
    terms, gradient = of_both(student, teacher, "forward_kl", temperature=temperature, labelled=list(range(6)))
    leaf = student.double().requires_grad_()
    cross_entropy = F.cross_entropy(leaf, torch.arange(6), reduction="none")
    values = LOSSES.get("forward_kl").function(leaf, teacher.double(), temperature=temperature)
    (expected,) = torch.autograd.grad((values + cross_entropy).sum(), leaf)
    torch.testing.assert_close(terms.cross_entropy.double(), cross_entropy.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(terms.divergence.double(), values.detach(), rtol=1e-5, atol=2e-5)
    assert (gradient.double() - expected).norm() <= 5e-5 * expected.norm()


def test_a_divergence_that_weighs_next_to_nothing_leaves_high_logits_their_cross_entropy():
    student, teacher = (logits + 18 for logits in offset_logits(0.0))
    _, gradient = of_both(student, teacher, "forward_kl", temperature=1.0, labelled=list(range(6)), kd=1e-30)
    leaf = student.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, torch.arange(6), reduction="sum"), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_temperature_made_of_the_logits_stands_beside_labels_of_every_item():
    student, teacher = offset_logits(0.0)

    def adaptive(logits, others):
        return 1 + logits.var(-1).sqrt() / 4

    terms, gradient = of_both(student, teacher, "forward_kl", temperature=adaptive, labelled=list(range(6)))
    leaf, temperature = student.double().requires_grad_(), adaptive(student, teacher).double()
    values = LOSSES.get("forward_kl").function(leaf, teacher.double(), temperature=temperature)
    loss = values.sum() + F.cross_entropy(leaf, torch.arange(6), reduction="sum")
    torch.testing.assert_close(terms.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-5)


def test_where_nobody_may_look_a_part_of_the_classes_has_a_maximum_of_its_own(monkeypatch):
    student, teacher = offset_logits(0.0, classes=20)
    student[:, -1] += 100
    expected, gradient = of_both(student, teacher[:, :-1], "forward_kl", temperature=0.5, labelled=[0, 3])
    for module in ("head_blocks", "head_rows", "chunked_head", "divergence", "row_gradient"):
        monkeypatch.setattr(f"hf_distill.losses.{module}.may_read", lambda tensor: False)
    monkeypatch.setattr("hf_distill.losses.head_rows.has_kernel", lambda device: True)
    found, found_gradient = of_both(student, teacher[:, :-1], "forward_kl", temperature=0.5, labelled=[0, 3])
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-5)
