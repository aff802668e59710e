"""Divergences over a teacher's most likely classes and one bucket of the rest, of logits and of a head."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import LOSSES, chunked_head, forward_kl, top_k_kl
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_rows import Divergence
from hf_distill.losses.sparse import SPARSE_LOSSES, sparse_divergence
from hf_distill.losses.sparse_head import sparse_head_loss
from hf_distill.signals import LogitFactors, SparseLogits
from tests.invariants.test_no_host_sync import _Reads
from tests.losses.variants import variants

ITEMS, WIDTH, CLASSES = (5, 11), 6, 23
sparse_losses = variants(lambda spec: spec.name in SPARSE_LOSSES and spec.name != "top_k_kl")


def most_likely(logits, k, temperature=1.0, dtype=torch.float32):
    """What a cache would keep of (..., classes) logits."""
    log_probs, indices = (logits.double() / temperature).log_softmax(-1).topk(k)
    return SparseLogits(indices, log_probs.to(dtype), temperature)


def draw(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def merged(probs, sparse):
    """(..., k + 1) probabilities: those of the named classes, and of all others together."""
    classes = torch.arange(probs.shape[-1])
    named = sparse.indices.unsqueeze(-1) == classes  # (..., k, classes)
    rest = ~named.any(-2, keepdim=True)
    return torch.cat([named, rest], -2).double() @ probs.unsqueeze(-1)


def reference(loss, student, sparse):
    """Values from probabilities in float64, merged by a matrix of zeros and ones."""
    temperature = sparse.temperature
    student_probs = merged((student.double() / temperature).softmax(-1), sparse).squeeze(-1)
    named = sparse.log_probs.double().exp()
    teacher_probs = torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)
    logs = (temperature * student_probs.log(), temperature * teacher_probs.log())
    return loss.reference(*logs, temperature=temperature)


class Case:
    """A random student head, a teacher's most likely classes, and the two terms of the items."""

    def __init__(self, *, masked=0.4, k=5, temperature=2.0, dtype=torch.float32, bias=True, **post):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        self.student = LogitFactors(
            normal(*ITEMS, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES) if bias else None, **post
        )
        self.teacher_logits = torch.randn(*ITEMS, CLASSES, generator=generator) * 2
        self.sparse = most_likely(self.teacher_logits, k, temperature)
        self.targets = torch.randint(CLASSES, ITEMS, generator=generator)
        weights = torch.rand(2, *ITEMS, generator=generator) + 0.1
        self.task, self.kd = weights * (torch.rand(2, *ITEMS, generator=generator) >= masked)

    @property
    def leaves(self):
        return [each for each in (self.student.hidden, self.student.weight, self.student.bias) if each is not None]

    def chunked(self, divergence=None, **options):
        return sparse_head_loss(
            self.student,
            self.sparse,
            self.targets,
            task_weights=self.task,
            kd_weights=self.kd,
            divergence=divergence,
            **options,
        )

    def dense(self, value):
        """The same from all logits in float64, with the divergence that `value` makes of them."""
        names = [name for name in ("hidden", "weight", "bias") if getattr(self.student, name) is not None]
        logits = replace(self.student, **{name: getattr(self.student, name).double() for name in names}).dense()
        targets = self.targets.masked_fill(self.task == 0, 0)
        cross_entropy = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(ITEMS)
        cross_entropy, values = cross_entropy * (self.task > 0), value(logits) * (self.kd > 0)
        return (self.task * cross_entropy + self.kd * values).sum(), cross_entropy, values

    def assert_equal(self, value, divergence=None, tolerance=1e-5, incoming=1.0, **options):
        results, expected = self.chunked(divergence, **options)[:3], self.dense(value)
        pairs = list(zip(results, expected, strict=True))
        gradients = (torch.autograd.grad(loss * incoming, self.leaves) for loss in (results[0], expected[0]))
        for found, wanted in [*pairs, *zip(*gradients, strict=True)]:
            difference = (found.double() - wanted.double()).norm()
            assert difference <= tolerance * wanted.double().norm().clamp(min=1e-30), difference / wanted.norm()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few items, and row blocks of fewer."""
    monkeypatch.setattr(chunked_head, "_SMALLEST_CHUNK", 7)
    monkeypatch.setattr("hf_distill.losses.row_gradient._CPU_SCRATCH_BYTES", 3 * 4 * CLASSES * 3)
    monkeypatch.setattr(chunked_head, "_CPU_CHUNK_BYTES", 1)


@sparse_losses
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4])
def test_a_divergence_is_that_of_merged_probabilities(loss, temperature, k):
    student, sparse = draw(40, CLASSES).requires_grad_(), most_likely(draw(40, CLASSES, seed=1), k, temperature)
    values = sparse_divergence(student, sparse, Divergence(loss.spec, loss.options))
    expected = reference(loss, student, sparse)
    torch.testing.assert_close(values.double(), expected, rtol=2e-4, atol=2e-5)
    (found,), (wanted,) = (torch.autograd.grad(each.sum(), student) for each in (values, expected))
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", SPARSE_LOSSES)
def test_the_gradient_is_what_finite_differences_find(name):
    student = draw(3, 9).double().requires_grad_()
    sparse = most_likely(draw(3, 9, seed=1), 4, 2.0, torch.float64)
    assert torch.autograd.gradcheck(
        lambda logits: sparse_divergence(logits, sparse, Divergence(LOSSES.get(name))), student
    )


@sparse_losses
def test_with_all_classes_it_is_the_loss_itself(loss):
    student, teacher = draw(40, CLASSES), draw(40, CLASSES, seed=1)
    found = sparse_divergence(student, most_likely(teacher, CLASSES, 2.0), Divergence(loss.spec, loss.options))
    wanted = loss.function(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_temperature_squared_may_be_left_out():
    case, plain = Case(temperature=3.0), Divergence(LOSSES.get("jsd"), temperature_squared=False)
    whole, part = (case.chunked(each) for each in (Divergence(LOSSES.get("jsd")), plain))
    torch.testing.assert_close(part.divergence, whole.divergence / 9)
    case.assert_equal(lambda logits: sparse_divergence(logits, case.sparse, plain), plain, 1e-4)


@pytest.mark.parametrize("name", SPARSE_LOSSES)
def test_merging_classes_never_says_more_than_all_of_them(name):
    student, teacher, spec = draw(200, CLASSES), draw(200, CLASSES, seed=1), LOSSES.get(name)
    whole = forward_kl(student, teacher) if name == "top_k_kl" else spec.function(student, teacher)
    few, more = (sparse_divergence(student, most_likely(teacher, k), Divergence(spec)) for k in (3, 9))
    assert (few <= more + 1e-5).all()
    assert (more <= whole + 1e-5).all()


@pytest.mark.parametrize("k", [3, 8])
def test_top_k_kl_takes_as_many_classes_as_it_is_asked_for(k):
    student, teacher = draw(40, CLASSES), draw(40, CLASSES, seed=1)
    divergence = Divergence(LOSSES.get("top_k_kl"), {"k": k})
    for kept in (8, 12):
        found = sparse_divergence(student, most_likely(teacher, kept, 2.0), divergence)
        torch.testing.assert_close(found, top_k_kl(student, teacher, temperature=2.0, k=min(k, kept)))


@sparse_losses
@pytest.mark.parametrize("post", [{}, {"scale": 0.3}, {"softcap": 3.0, "bias": False}], ids=str)
def test_the_head_equals_the_dense_logits(loss, post, small_chunks):
    case = Case(**post)
    tolerance = 1e-4 if loss.spec.name in ("jsd", "generalized_jsd", "skewed_reverse_kl") else 1e-5
    divergence = Divergence(loss.spec, loss.options)
    case.assert_equal(lambda logits: sparse_divergence(logits, case.sparse, divergence), divergence, tolerance, 1.7)


@pytest.mark.parametrize("masked", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [None, 17])
@pytest.mark.parametrize("k", [1, 6, CLASSES])
def test_masks_temperatures_and_vocabularies(masked, temperature, classes, k, small_chunks):
    case = Case(masked=masked, temperature=temperature, k=k)
    case.assert_equal(lambda logits: sparse_divergence(logits[..., :classes], case.sparse), classes=classes)


@pytest.mark.parametrize("teacher_classes", [CLASSES, 31, 17])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_with_all_classes_of_the_teacher_it_is_the_chunked_head_with_its_head(teacher_classes, name, small_chunks):
    case = Case()
    teacher = LogitFactors(draw(*ITEMS, 9, scale=1.0), draw(teacher_classes, 9, seed=1))
    case.sparse = most_likely(teacher.dense(), teacher_classes, 2.0)
    divergence, weights = Divergence(LOSSES.get(name)), {"task_weights": case.task, "kd_weights": case.kd}
    expected = chunked_head_loss(
        case.student, teacher, case.targets, **weights, temperature=2.0, divergence=divergence
    )
    found = case.chunked(divergence, classes=min(CLASSES, teacher_classes))
    pairs = list(zip(found[:3], expected[:3], strict=True))
    pairs += zip(*(torch.autograd.grad(loss, case.leaves) for loss in (found[0], expected[0])), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_bfloat16_agrees_to_its_rounding(small_chunks):
    case = Case(dtype=torch.bfloat16)
    case.sparse = replace(case.sparse, log_probs=case.sparse.log_probs.bfloat16())
    case.assert_equal(lambda logits: sparse_divergence(logits, case.sparse), tolerance=1e-2)
    assert all(gradient.dtype == torch.bfloat16 for gradient in torch.autograd.grad(case.chunked()[0], case.leaves))


@pytest.mark.parametrize("name", SPARSE_LOSSES)
def test_an_item_that_counts_in_neither_term_may_hold_anything(name, small_chunks):
    case, divergence = Case(masked=0.7), Divergence(LOSSES.get(name))
    unused = (case.task == 0) & (case.kd == 0)
    clean = case.chunked(divergence)
    with torch.no_grad():
        case.student.hidden[unused] = math.nan
        case.sparse.log_probs[case.kd == 0] = math.nan
        case.sparse.indices[case.kd == 0] = 10**6
        case.targets[case.task == 0] = -100
    poisoned = case.chunked(divergence)
    torch.testing.assert_close(clean.loss, poisoned.loss)
    gradients = torch.autograd.grad(poisoned[0], case.leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][unused].any()


def test_nothing_is_read_back_from_the_device(monkeypatch):
    case = Case(temperature=2.0)
    kept = ((case.task > 0) | (case.kd > 0)).flatten().nonzero().squeeze(-1)
    for module in [module for name, module in sys.modules.items() if name.startswith("hf_distill.losses")]:
        if hasattr(module, "may_read"):
            monkeypatch.setattr(module, "may_read", lambda tensor: False)  # as on a device
    with _Reads() as reads:
        case.chunked(kept=kept).loss.backward()
        sparse_divergence(case.student.dense(), case.sparse).sum().backward()
    assert reads.counts == {}


def test_a_batch_in_which_nothing_counts_is_0_and_has_a_graph():
    case = Case(masked=2.0)
    loss, *values = case.chunked()[:3]
    assert loss == 0
    assert not any(value.any() for value in values)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, case.leaves))


@pytest.mark.parametrize("classes", [None, 9])
def test_it_says_where_both_choose_the_same_class(classes, small_chunks):
    case = Case(masked=0.4)
    case.sparse = most_likely(case.student.dense().detach() + draw(*ITEMS, CLASSES), 5, 2.0)
    found = case.chunked(agreement=True, classes=classes)
    expected = case.student.dense()[..., :classes].argmax(-1) == case.sparse.likeliest(classes or CLASSES)
    counted = (case.task > 0) | (case.kd > 0)
    assert found.agreement.any()
    assert torch.equal(found.agreement, expected & counted)
    assert case.chunked().agreement is None
    assert (found.temperature == 2).all()


def test_only_the_students_head_is_projected_on_and_only_where_items_count(small_chunks, monkeypatch):
    case, projected = Case(masked=0.5), []
    whole = chunked_head.ChunkedHead.logits
    monkeypatch.setattr(
        chunked_head.ChunkedHead, "logits", lambda self, hidden: projected.append(len(hidden)) or whole(self, hidden)
    )
    case.chunked()
    assert sum(projected) == ((case.task > 0) | (case.kd > 0)).sum()


@pytest.mark.parametrize("name", SPARSE_LOSSES)
@pytest.mark.parametrize("empty", [(-1, 0.0), (0, -math.inf)])
def test_an_empty_entry_is_none(name, empty):
    case, divergence, results = Case(k=4), Divergence(LOSSES.get(name)), []
    indices, log_probs = (
        F.pad(each, (2, 0), value=value)
        for each, value in zip((case.sparse.indices, case.sparse.log_probs), empty, strict=True)
    )
    for sparse in (case.sparse, SparseLogits(indices, log_probs, 2.0)):
        case.sparse = sparse
        losses = (case.chunked(divergence).loss, sparse_divergence(case.student.dense(), sparse, divergence).sum())
        results.append([each for loss in losses for each in (loss, *torch.autograd.grad(loss, case.leaves))])
    torch.testing.assert_close(*results)


def test_a_teacher_that_names_nothing_teaches_nothing():
    student = draw(4, CLASSES).requires_grad_()
    sparse = SparseLogits(torch.full((4, 2), -1), torch.zeros(4, 2))
    values = sparse_divergence(student, sparse)
    torch.testing.assert_close(values, torch.zeros(4))
    assert torch.autograd.grad(values.sum(), student)[0].abs().max() < 1e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_probabilities_that_sum_to_more_than_1_leave_a_tail(name):
    student, sparse = draw(4, CLASSES).requires_grad_(), most_likely(draw(4, CLASSES, seed=1), 8)
    over = replace(sparse, log_probs=sparse.log_probs.log_softmax(-1) + 0.01)
    values = sparse_divergence(student, over, Divergence(LOSSES.get(name)))
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), student)[0].abs().sum(-1).min() > 0


def test_a_student_that_holds_the_tail_all_but_impossible_is_told_by_how_much():
    case = Case(k=1, temperature=1.0)
    with torch.no_grad():
        case.student.weight.zero_()
        case.student.bias.zero_()
        case.student.bias[0] = 300.0
    case.sparse = replace(
        case.sparse, indices=torch.zeros(*ITEMS, 1).long(), log_probs=torch.full((*ITEMS, 1), math.log(0.5))
    )
    values = case.chunked().divergence
    expected = 0.5 * (300 - math.log(CLASSES - 1)) + math.log(0.5)
    torch.testing.assert_close(values[case.kd > 0], torch.full_like(values[case.kd > 0], expected))


def test_classes_that_the_student_does_not_have_are_left_out_and_the_others_sum_to_1():
    student = draw(4, 5)
    log_probs = torch.tensor([0.5, 0.2, 0.1]).log().expand(4, 3)
    sparse = SparseLogits(torch.tensor([7, 1, 2]).expand(4, 3), log_probs)
    remaining = SparseLogits(torch.tensor([1, 2]).expand(4, 2), torch.tensor([0.4, 0.2]).log().expand(4, 2))
    torch.testing.assert_close(sparse_divergence(student, sparse), sparse_divergence(student, remaining))


@pytest.mark.parametrize("name", ["dkd", "logit_mse", "adaptive_kl", "soft_cross_entropy"])
def test_a_loss_that_needs_every_class_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs every class.*forward_kl"):
        sparse_divergence(draw(4, CLASSES), most_likely(draw(4, CLASSES), 3), Divergence(LOSSES.get(name)))


def test_other_positions_are_refused():
    case = Case()
    case.sparse = most_likely(draw(5, 12, CLASSES), 3)
    with pytest.raises(ValueError, match=r"\(5, 12, 3\).*\(5, 11\)"):
        case.chunked()
    with pytest.raises(ValueError, match="Align positions"):
        sparse_divergence(draw(*ITEMS, CLASSES), case.sparse)


def test_a_sparse_teacher_that_makes_no_sense_is_refused():
    indices, log_probs = torch.zeros(2, 3).long(), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="int64"):
        SparseLogits(indices.int(), log_probs)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        SparseLogits(indices, log_probs[:, :2])
    with pytest.raises(ValueError, match="temperature is 0"):
        SparseLogits(indices, log_probs, 0)


def test_what_a_sparse_teacher_knows_can_be_read_in_other_forms():
    sparse = SparseLogits(
        torch.tensor([[2, -1, 0], [4, 3, -1]]), torch.tensor([[0.5, 0.0, 0.3], [0.2, 0.6, 0.0]]).log()
    )
    assert sparse.k == 3
    assert sparse.likeliest(5).tolist() == [2, 3]
    assert sparse.likeliest(3).tolist() == [2, -1]
    torch.testing.assert_close(sparse.dense(4).exp(), torch.tensor([[0.3, 0, 0.5, 0], [0, 0, 0, 0.6]]))
    assert sparse.narrowed(1).indices.tolist() == [[2], [3]]
    assert sparse.ordered(torch.tensor([1, 2, 0, 4, 3])).indices.tolist() == [[1, -1, 2], [3, 4, -1]]
