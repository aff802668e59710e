"""Two processes with 4 rows each against one with 8."""

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration

from hf_distill.gathering import gather_rows
from hf_distill.losses.batch_relations import cka, contrastive, rkd_angle, rkd_distance, similarity_preserving
from hf_distill.losses.domain import coral, mmd
from tests.processes import run_twice

LOSSES = (contrastive, rkd_distance, rkd_angle, similarity_preserving, cka)
DOMAIN_LOSSES = (mmd, coral)
VALID = torch.tensor([True, True, True, False, True, True, True, True])
TARGET_ROWS = torch.tensor([True, False, True, True, True, False, False, False])


def all_rows():
    generator = torch.Generator().manual_seed(0)
    inputs, teacher = (torch.randn(8, 5, generator=generator) for _ in range(2))
    return inputs, torch.randn(5, 5, generator=generator), teacher


def losses_of(accelerator):
    """Sum over this process's rows and the gradient of its weight, of every loss; all rows for one process."""
    inputs, weight, teacher = all_rows()
    own = slice(accelerator.process_index * 8 // accelerator.num_processes, None)
    own = slice(own.start, own.start + 8 // accelerator.num_processes)
    valid = gather_rows(VALID[own], accelerator)
    assert torch.equal(valid, VALID)
    weight.requires_grad_()
    results = {}
    for loss in (*LOSSES, *DOMAIN_LOSSES):
        student = gather_rows(inputs[own] @ weight, accelerator)
        if loss in LOSSES:
            values = loss(student, gather_rows(teacher[own], accelerator), valid=valid)
        else:
            values = loss(student, target_rows=gather_rows(TARGET_ROWS[own], accelerator), valid=valid)
        total = values[own].sum()
        (gradient,) = torch.autograd.grad(total, weight)
        results[loss.__name__] = (total.detach(), gradient)
    return results


def rows_after_a_round_trip(accelerator):
    """What each dtype and layout becomes, and the gradient that rank r's row gets of the ranks' weights."""
    rank = accelerator.process_index
    strided = torch.arange(12.0).reshape(3, 4).t()[:, 1:] + 100 * rank
    rows = strided.clone().requires_grad_()
    gathered = gather_rows(rows * 1, accelerator)
    weights = torch.arange(8.0).unsqueeze(-1) * (1 + rank)
    (gathered * weights).sum().backward()
    dtypes = {
        str(dtype): gather_rows((strided + 1).to(dtype), accelerator).double()
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
    }
    return {
        "gathered": gathered.detach(),
        "strided": gather_rows(strided, accelerator),
        "gradient": rows.grad,
    } | dtypes


def refusal():
    uneven = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    try:
        gather_rows(torch.ones(2, 3), uneven)
    except ValueError as error:
        return str(error)
    return ""


def save_results(path):
    accelerator = Accelerator(cpu=True)
    results = {
        "losses": losses_of(accelerator),
        "rows": rows_after_a_round_trip(accelerator),
        "processes": accelerator.num_processes,
        "refusal": refusal(),
    }
    torch.save(results, f"{path}.{accelerator.process_index}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("gathering") / "results.pt"
    run_twice(save_results, path)
    results = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]
    assert [result["processes"] for result in results] == [2, 2]
    return results


@pytest.mark.parametrize("name", [loss.__name__ for loss in (*LOSSES, *DOMAIN_LOSSES)])
def test_the_sum_over_two_processes_is_the_loss_and_gradient_of_one(ranks, name):
    expected, expected_gradient = losses_of(Accelerator(cpu=True))[name]
    totals, gradients = zip(*(result["losses"][name] for result in ranks), strict=True)
    torch.testing.assert_close(sum(totals), expected)
    torch.testing.assert_close(sum(gradients), expected_gradient, rtol=1e-4, atol=1e-6)
    assert expected.abs() > 0.01
    assert not torch.allclose(gradients[0], expected_gradient / 2, rtol=1e-2)


def test_rows_come_in_the_order_of_the_ranks_and_their_gradient_is_summed_over_them(ranks):
    block = torch.arange(12.0).reshape(3, 4).t()[:, 1:]
    expected = torch.cat([block, block + 100])
    for rank, result in enumerate(ranks):
        rows = result["rows"]
        assert torch.equal(rows["gathered"], expected)
        assert torch.equal(rows["strided"], expected)
        own = torch.arange(8.0)[4 * rank : 4 * rank + 4].unsqueeze(-1)
        assert torch.equal(rows["gradient"], (3 * own).expand(4, 2))
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
            assert torch.equal(rows[str(dtype)], (expected + 1).to(dtype).double())


def test_batches_that_may_be_uneven_are_refused_before_anybody_waits(ranks):
    for result in ranks:
        assert "even_batches is False. Set accelerator_config" in result["refusal"]


def test_one_process_has_all_rows_already():
    rows = torch.randn(3, 4, requires_grad=True)
    assert gather_rows(rows, Accelerator(cpu=True)) is rows
