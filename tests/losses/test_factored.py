"""The sums formed from factors are those of the dense losses."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses import attention_kl, attention_mse, factored
from hf_distill.losses.factored import scores_kl_rows, scores_mse_rows
from hf_distill.signals import Scores
from tests.losses.layer_cases import cases, random_case, variants
from tests.losses.observing import LargeAllocations, Operations

FUSED = [scores_mse_rows, scores_kl_rows]
both_losses = pytest.mark.parametrize("fused", FUSED)
BLOCKS = {"one map": 1, "two maps": 2 * 4 * 25, "everything": 2**20}


def dense(fused):
    """What the fused loss sums: (batch,) from whole maps."""
    if fused is scores_mse_rows:
        loss = attention_mse
    else:
        loss = attention_kl

    def summed(student, teacher, *, queries, keys):
        values = loss(student, teacher, keys=keys)
        return torch.where(queries if values.dim() == 2 else queries.unsqueeze(-1), values, 0.0).flatten(1).sum(1)

    return summed


def run(function, case, *, queries=None, incoming=None):
    """The sums, and the gradients of the student's factors where `incoming` arrives at the sums."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in case.student)
    case = replace(case, student=leaves)
    queries = case.real if queries is None else queries
    sums = case.values(lambda student, teacher, keys: function(student, teacher, queries=queries, keys=keys))
    incoming = torch.linspace(0.5, 2, len(sums)) if incoming is None else incoming
    return sums.detach(), *torch.autograd.grad(sums, leaves, incoming.to(sums.dtype))


def assert_agree(fused, case, tolerance=2e-5, **options):
    expected = run(dense(fused), case.to(torch.float64), **options)
    results = run(fused, case, **options)
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=BLOCKS, name="block")
def _block(request, monkeypatch):
    monkeypatch.setattr(factored, "_CPU_BLOCK_BYTES", BLOCKS[request.param])


@both_losses
@pytest.mark.parametrize("variant", variants())
@pytest.mark.usefixtures("block")
def test_the_sums_and_gradients_are_those_of_the_dense_loss(fused, variant):
    case = random_case("attention", 1, **variants()[variant])
    assert_agree(fused, case)


@both_losses
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_sizes_agree_with_the_dense_loss(fused, data):
    case = data.draw(cases("attention"))
    size = max(1.0, *(tensor.abs().max().item() ** 4 for tensor in (*case.student, *case.teacher)))
    assert_agree(fused, case, 5e-6 * size)


@both_losses
@pytest.mark.usefixtures("block")
def test_relations_of_one_tensor_to_itself_get_the_gradients_of_both_factors(fused):
    assert_agree(fused, random_case("relation", 2, heads=3))


@both_losses
@pytest.mark.parametrize("variant", ["plain", "bias"])
def test_fewer_queries_may_be_real_than_keys(fused, variant):
    case = random_case("attention", 3, **variants()[variant])
    queries = case.real.clone()
    queries[:, ::2] = False
    assert_agree(fused, case, queries=queries)


@both_losses
def test_more_keys_than_queries_and_repeated_heads(fused):
    generator = torch.Generator().manual_seed(4)
    left, right = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 2, 6, 5, generator=generator)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    queries = torch.tensor([[True] * 3, [True, True, False]])

    def sums(function, dtype):
        leaf = right.to(dtype).requires_grad_()
        repeated = leaf[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
        student = Scores(left.to(dtype), repeated, 0.5)
        teacher = Scores(left.flip(0).to(dtype), repeated.detach().roll(1, 2), 0.3)
        total = function(student, teacher, queries=queries, keys=keys)
        return total.detach().double(), torch.autograd.grad(total.sum(), leaf)[0].double()

    torch.testing.assert_close(sums(fused, torch.float32), sums(dense(fused), torch.float64), rtol=1e-5, atol=1e-5)


@both_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(fused, dtype):
    case = random_case("attention", 5, scale=3.0).to(dtype)
    sums, *gradients = run(fused, case)
    expected, *expected_gradients = run(dense(fused), case.to(torch.float64))
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@both_losses
def test_autocast_changes_nothing(fused):
    case = random_case("attention", 6, causal=(True, True))
    plain = run(fused, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = run(fused, case)
    torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


@both_losses
def test_gradcheck_in_float64(fused):
    case = random_case("attention", 7, batch=2, length=4).to(torch.float64)

    def sums(*student):
        case.student = student
        return case.values(lambda own, other, keys: fused(own, other, queries=case.real, keys=keys))

    assert torch.autograd.gradcheck(sums, tuple(tensor.requires_grad_() for tensor in case.student))


@both_losses
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_gradients_of_near_equal_scores_are_as_exact_as_their_difference(fused, noise):
    case = random_case("attention", 8, batch=2, length=40, widths=(32, 32))
    case.teacher = tuple(own + noise * torch.randn_like(own) for own in case.student)
    sums, *gradients = run(fused, case)
    expected, *expected_gradients = run(dense(fused), case.to(torch.float64))
    # Scores are of size 1 and exact to 1e-7 each; a divergence is the square of the noise, from terms of its size.
    torch.testing.assert_close(sums.double(), expected, rtol=3e-4, atol=1e-6 * 80 if fused is scores_kl_rows else 0.0)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).norm() <= 3e-6 / noise * exact.norm()


@pytest.mark.parametrize("block", [1, 2**20])
@pytest.mark.parametrize("noise", [None, 1.0, 1e-2, 1e-5])
def test_long_maps_are_compared_by_the_grams_of_their_factors(noise, block, monkeypatch):
    monkeypatch.setattr(factored, "_CPU_BLOCK_BYTES", block)
    case = random_case("attention", 19, length=48, widths=(8, 8), heads=3)
    if noise is not None:
        case.teacher = tuple(own + noise * torch.randn_like(own) for own in case.student)
    with Operations() as operations:
        sums, *gradients = run(scores_mse_rows, case)
    assert operations.counts["aten::linalg_vector_norm"] == 0
    expected, *expected_gradients = run(dense(scores_mse_rows), case.to(torch.float64))
    # The rounding of the factors, beside their difference; that of the Grams would enter with its square.
    tolerance = 2e-6 if noise is None else max(2e-6, 1e-7 / noise)
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=0)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).norm() <= tolerance * exact.norm()


def test_long_equal_maps_give_exactly_zero():
    case = random_case("attention", 20, length=48, widths=(8, 8))
    case.teacher = case.student
    for result in run(scores_mse_rows, case):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("variant", ["causal", "bias", "sliding window", "keys not allowed", "one key head"])
def test_long_maps_of_every_kind_agree(variant):
    case = random_case("attention", 21, length=48, widths=(8, 8), **variants(length=48)[variant])
    assert_agree(scores_mse_rows, case)
    alone = replace(case, student=(case.student[0].requires_grad_(), case.student[1]))
    sums = alone.values(lambda own, other, keys: scores_mse_rows(own, other, queries=case.real, keys=keys))
    sums.sum().backward()
    torch.testing.assert_close(alone.student[0].grad, run(scores_mse_rows, case, incoming=torch.ones(3))[1])


@both_losses
@pytest.mark.parametrize("variant", ["plain", "causal", "bias", "keys not allowed"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_at_padding_changes_nothing(fused, variant, side):
    case = random_case("attention", 9, **variants()[variant])
    expected = run(fused, case)
    for tensor in getattr(case, side):
        tensor.transpose(1, 2)[~case.real] = math.nan
    torch.testing.assert_close(run(fused, case), expected)


@both_losses
def test_nan_in_one_sequence_stays_there(fused):
    case = random_case("attention", 10)
    case.student[0][1, 0, 0, 0] = math.nan
    for result in run(fused, case):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()


@both_losses
def test_sequences_that_are_not_asked_for_get_no_gradient_even_beside_nan(fused):
    case = random_case("attention", 11)
    case.student[0][1] = math.nan
    _, *gradients = run(fused, case, incoming=torch.tensor([1.0, 0.0, 1.0]))
    for gradient in gradients:
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@both_losses
@pytest.mark.parametrize("variant", ["plain", "bias", "causal"])
def test_nothing_real_gives_zero_with_a_graph(fused, variant):
    case = random_case("attention", 12, **variants()[variant])
    nothing = torch.zeros_like(case.real)
    for result in run(fused, replace(case, options={"keys": nothing}), queries=nothing):
        assert torch.equal(result, torch.zeros_like(result))


@both_losses
@pytest.mark.parametrize("factor", [0, 1])
def test_one_factor_alone_may_want_a_gradient(fused, factor):
    case = random_case("attention", 13)
    expected = run(fused, case, incoming=torch.ones(3))[1 + factor]
    case.student[factor].requires_grad_()
    with Operations() as operations:
        sums = case.values(lambda own, other, keys: fused(own, other, queries=case.real, keys=keys))
    sums.sum().backward()
    torch.testing.assert_close(case.student[factor].grad, expected)
    assert case.student[1 - factor].grad is None
    assert operations.counts["aten::baddbmm_"] == len(case.real)


@both_losses
def test_without_a_gradient_none_is_formed(fused):
    case = random_case("attention", 14)
    expected, *_ = run(fused, case)
    for tensor in case.student:
        tensor.requires_grad_()
    with torch.no_grad(), Operations() as operations:
        sums = case.values(lambda own, other, keys: fused(own, other, queries=case.real, keys=keys))
    assert not sums.requires_grad
    assert operations.counts["aten::baddbmm_"] == 0
    torch.testing.assert_close(sums, expected)


@both_losses
def test_a_trained_bias_gets_its_gradient(fused):
    case = random_case("attention", 15, **variants()["bias"])
    gradients = []
    for function in (fused, dense(fused)):
        bias = torch.ones(1, 2, 5, 5, requires_grad=True)
        build = case.build
        student = replace(build(*case.student, own=True), bias=bias)
        teacher = build(*case.teacher, own=False)
        function(student, teacher, queries=case.real, keys=case.real).sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].any()


@both_losses
@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_all_maps_appears(fused, causal, monkeypatch):
    monkeypatch.setattr(factored, "_CPU_BLOCK_BYTES", 4 * 64 * 64)
    case = random_case("attention", 16, batch=4, heads=4, length=64, causal=(causal, causal))
    case.student = tuple(tensor.requires_grad_() for tensor in case.student)
    known = [*case.student, *case.teacher]
    with LargeAllocations(4 * 4 * 64 * 64, known) as allocations:
        sums = case.values(lambda own, other, keys: fused(own, other, queries=case.real, keys=keys))
        sums.sum().backward()
    assert allocations.count == 0


@both_losses
def test_a_second_derivative_is_refused(fused):
    case = random_case("attention", 17)
    case.student = tuple(tensor.requires_grad_() for tensor in case.student)
    sums = case.values(lambda own, other, keys: fused(own, other, queries=case.real, keys=keys))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sums.square().sum(), case.student, create_graph=True)


@both_losses
def test_other_numbers_of_heads_are_refused_with_the_remedy(fused):
    student, teacher = (random_case("attention", 18, heads=heads) for heads in (2, 3))
    with pytest.raises(
        ValueError, match=r"student's .*\(3, 2, 5, 5\), the teacher's \(3, 3, 5, 5\).*minilmv2_relations"
    ):
        fused(
            student.build(*student.student, own=True),
            teacher.build(*teacher.teacher, own=False),
            queries=student.real,
            keys=student.real,
        )
    own = student.build(*student.student, own=True)
    with pytest.raises(ValueError, match=r"keys has dtype torch\.float32"):
        fused(own, own, queries=student.real, keys=student.real.float())
