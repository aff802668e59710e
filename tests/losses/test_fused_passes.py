"""How cross_entropy_and_forward_kl gets there: which blocks, buffers and passes it takes, and that it never waits."""

import copy

import pytest
import torch

from hf_distill.losses import row_gradient
from tests.losses.observing import LargeAllocations, Operations
from tests.losses.weighted_cases import poison, random_terms


@pytest.mark.parametrize(("extra", "temperature"), [(0, 1.0), (0, 2.0), (4, 1.0)])
def test_block_boundaries_do_not_show(extra, temperature, three_rows_a_block):
    terms = random_terms((2, 7), 11, extra=extra, temperature=temperature, zeros=0.4)
    whole = terms.run()
    three_rows_a_block(11 + extra, buffers=5)
    torch.testing.assert_close(terms.run(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_without_weight_are_skipped_on_a_cpu(dtype, three_rows_a_block):
    terms = random_terms((12,), 11, zeros=1.0)
    terms.student = terms.student.to(dtype)
    terms.task_weights[4], terms.kd_weights[9] = 1.0, 1.0
    three_rows_a_block(11)
    with Operations() as operations:
        gradient = terms.run()[-1]
    assert operations.counts["aten::softmax"] == 2 * 2  # two of the four blocks, student and teacher
    assert gradient.any(-1).nonzero().flatten().tolist() == [4, 9]


def test_at_temperature_1_both_terms_share_one_softmax():
    counts = []
    for temperature in (1, 2.0, torch.tensor(1.0)):
        terms = random_terms((3,), 11, temperature=temperature)
        with Operations() as operations:
            terms()
        counts.append(operations.counts["aten::softmax"])
    assert counts == [2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", ["whole", "classes", "positions"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_given_up_holds_the_gradient(dtype, view, temperature, three_rows_a_block):
    terms = random_terms((2, 40), 300, temperature=temperature, zeros=0.3)
    cut = {"whole": (..., slice(None)), "classes": (..., slice(200)), "positions": (slice(None), slice(1, None))}[view]
    terms.student, terms.teacher = terms.student.to(dtype)[cut], terms.teacher.to(dtype)[cut]
    terms.targets = terms.targets.clamp(max=terms.student.shape[-1] - 1)
    for name in ("targets", "task_weights", "kd_weights"):
        setattr(terms, name, getattr(terms, name)[:, : terms.student.shape[1]])
    expected = terms.run()
    kept = copy.deepcopy(terms.teacher)
    three_rows_a_block(terms.student.shape[-1])
    logits_bytes = terms.student.numel() * dtype.itemsize

    with LargeAllocations(logits_bytes // 2, [terms.student, terms.teacher]) as allocations:
        results = terms.run(overwrite_teacher=True)
    assert allocations.count == 0
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    assert results[-1].untyped_storage().data_ptr() == terms.teacher.untyped_storage().data_ptr()

    terms.teacher = kept
    with LargeAllocations(logits_bytes // 2, [terms.student, terms.teacher]) as allocations:
        terms.run()
    assert allocations.count == 1
    with LargeAllocations(logits_bytes // 2, [terms.student, terms.teacher]) as allocations, torch.no_grad():
        terms()
        terms(overwrite_teacher=True)
    assert allocations.count == 0
    assert torch.equal(terms.teacher, kept)


def test_a_leaf_takes_the_teachers_memory_over():
    terms = random_terms((5,), 300)
    terms.student.requires_grad_()
    terms(overwrite_teacher=True)[0].backward()
    assert terms.student.grad.data_ptr() == terms.teacher.data_ptr()


def test_a_teacher_that_cannot_hold_the_gradient_is_left_alone():
    terms = random_terms((4,), 10)
    with torch.inference_mode():
        inference = terms.teacher.clone()
    for teacher in (
        terms.teacher[:1].expand(4, 10),
        terms.teacher.double(),
        terms.teacher[:, :9],
        terms.teacher.clone().requires_grad_(),
        inference,
    ):
        kept = teacher.detach().clone()
        terms.teacher = teacher
        results = terms.run(overwrite_teacher=True)
        assert torch.equal(teacher.detach(), kept)
        torch.testing.assert_close(results, terms.run(), rtol=0, atol=0)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_retained_graph_gives_the_right_gradient_each_time(overwrite, dtype):
    terms = random_terms((4,), 10, zeros=0.3)
    terms.student, terms.teacher = terms.student.to(dtype).requires_grad_(), terms.teacher.to(dtype)
    loss = terms(overwrite_teacher=overwrite)[0]
    first, doubled = (torch.autograd.grad(loss * factor, terms.student, retain_graph=True)[0] for factor in (1.0, 2.0))
    kept = first.clone()
    (last,) = torch.autograd.grad(loss, terms.student)
    assert torch.equal(first, kept)
    assert torch.equal(first, last)
    assert torch.equal(doubled, 2 * last)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_an_incoming_gradient_of_1_costs_no_pass_on_a_cpu():
    passes = []
    for factor in (1.0, 2.0):
        terms = random_terms((4,), 10)
        terms.student.requires_grad_()
        loss = terms()[0] * factor
        with Operations() as operations:
            loss.backward()
        passes.append(operations.counts["aten::mul_"])
    assert passes == [0, 1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_read_back_from_a_device(overwrite):
    terms = random_terms((2, 5), 9, extra=0 if overwrite else 3, temperature="per item", zeros=0.5)
    for name in ("student", "teacher", "targets", "task_weights", "kd_weights", "temperature"):
        setattr(terms, name, getattr(terms, name).to("meta"))  # whose values nobody can read
    terms.student.requires_grad_()
    (terms(overwrite_teacher=overwrite)[0] * 2).backward()
    assert terms.student.grad.shape == terms.student.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_gpu_gives_what_a_cpu_gives_and_the_host_does_not_wait(overwrite):
    terms = random_terms((4, 50), 999, temperature="per item", zeros=0.4)
    poison(terms)
    expected = terms.run()
    for name in ("student", "teacher", "targets", "task_weights", "kd_weights", "temperature"):
        setattr(terms, name, getattr(terms, name).to("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = terms.run(overwrite_teacher=overwrite)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([result.cpu() for result in results], list(expected), rtol=1e-5, atol=1e-5)


def test_a_row_wider_than_the_scratch_is_a_block_of_its_own(monkeypatch):
    terms = random_terms((5,), 11, temperature=2.0)
    whole = terms.run()
    monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 1)
    torch.testing.assert_close(terms.run(), whole, rtol=0, atol=0)
