import dataclasses

import pytest
import torch

from hf_distill.losses import LOSSES, masked_sum, register_loss
from hf_distill.losses.base import LossSpec
from hf_distill.registry import Registry


def test_masked_sum_adds_what_the_mask_keeps_even_beside_nan():
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 4.0]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[True, False], [False, True]]))
    total.backward()
    assert total == 5
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_masked_sum_without_a_mask_adds_all():
    assert masked_sum(torch.tensor([1.0, 2.0])) == 3


@pytest.mark.parametrize("items", [0, 3])
def test_masked_sum_of_nothing_is_zero_with_a_graph(items):
    values = torch.full((items,), float("nan"), requires_grad=True)
    total = masked_sum(values, torch.zeros(items, dtype=torch.bool))
    total.backward()
    assert total == 0
    assert torch.equal(values.grad, torch.zeros(items))


def test_masked_sum_of_low_precision_is_taken_in_float32_and_float64_stays():
    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert masked_sum(ones, torch.ones(4096, dtype=torch.bool)).dtype == torch.float32
    assert masked_sum(ones) == 4096
    assert masked_sum(ones.double()).dtype == torch.float64


def test_masks_of_another_shape_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), values have \(2, 3\)"):
        masked_sum(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64.*mask\.bool\(\)"):
        masked_sum(torch.zeros(2), torch.ones(2, dtype=torch.int64))


@pytest.fixture
def empty_losses(monkeypatch):
    registry = Registry("loss")
    monkeypatch.setattr("hf_distill.losses.base.LOSSES", registry)
    return registry


def test_register_loss_returns_the_function_and_describes_it(empty_losses):
    def hidden_distance(student, teacher):
        return (student - teacher).sum(-1)

    assert (
        register_loss("distance", feature="hidden_states", item="token", paper="p")(hidden_distance) is hidden_distance
    )
    spec = empty_losses.get("distance")
    assert spec == LossSpec("distance", hidden_distance, feature="hidden_states", item="token", paper="p")
    assert not spec.takes_temperature
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.item = "row"


def test_a_loss_with_a_temperature_keyword_says_so(empty_losses):
    @register_loss("softened", feature="logits", item="position", paper="p")
    def softened(student, teacher, *, temperature=1.0):
        return (student - teacher).sum(-1) * temperature

    assert empty_losses.get("softened").takes_temperature


def test_the_registered_names_are_the_public_ones():
    assert {"forward_kl", "binary_forward_kl", "logit_mse"} <= {*LOSSES.names()}
    with pytest.raises(ValueError, match="Did you mean 'forward_kl'"):
        LOSSES.get("foward_kl")
