"""Memory and operations of one forward pass, against sums done by hand."""

import itertools

import pytest
import tiny
import torch
from torch import nn

from hf_distill.report.cost import forward_flops, peak_memory

ROWS = 5


class Chain(nn.Module):
    """Linear layers without bias in a row, whose outputs are dropped as soon as the next is formed."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)])

    def forward(self, features):
        return self.layers(features)


@pytest.mark.parametrize(
    ("widths", "held"),
    [
        ((40, 700, 10), 700 + 10),
        ((40, 700, 10, 900), 10 + 900),
        ((40, 300, 500, 400, 100), 500 + 400),
        ((40, 8), 8),
    ],
)
def test_the_peak_on_a_cpu_is_what_is_held_at_once(widths, held):
    with torch.no_grad():
        assert peak_memory(Chain(*widths), {"features": torch.randn(ROWS, 40)}) == 4 * ROWS * held


def test_the_peak_sees_what_lives_only_inside_an_operation():
    class Spread(nn.Module):
        def forward(self, features):
            return features.std(dim=0, correction=0), torch.linalg.qr(features)

    features = torch.randn(50, 50)
    outputs = 4 * (50 + 2 * 50 * 50)
    assert peak_memory(Spread(), {"features": features}) > outputs


def test_the_peak_is_the_same_the_second_time():
    model, batch = tiny.bert().eval(), {"input_ids": torch.full((3, 12), 5)}
    with torch.no_grad():
        assert peak_memory(model, batch) == peak_memory(model, batch) > 0


def test_the_peak_grows_with_the_rows():
    model = tiny.llama().eval()
    with torch.no_grad():
        few, many = (peak_memory(model, {"input_ids": torch.full((rows, 12), 5)}) for rows in (8, 16))
    # Of one row there is next to nothing that does not repeat in each.
    assert 1.9 * few < many <= 2 * few


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_on_a_gpu_is_what_is_held_at_once():
    model = Chain(128, 1024, 512).cuda()
    batch = {"features": torch.randn(256, 128, device="cuda")}
    with torch.no_grad():
        model(**batch)
        assert peak_memory(model, batch) == 4 * 256 * (1024 + 512)


def test_a_linear_layer_takes_two_operations_for_each_weight_and_row():
    assert forward_flops(Chain(40, 700, 10), {"features": torch.randn(ROWS, 40)}) == 2 * ROWS * (40 * 700 + 700 * 10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_takes_what_the_formula_says_whichever_attention_runs(implementation, masked):
    layers, hidden, inner, length = 3, 48, 96, 13
    model = tiny.bert(hidden=hidden, layers=layers).eval()
    model.set_attn_implementation(implementation)
    batch = {"input_ids": torch.full((1, length), 5)}
    if masked:
        batch["attention_mask"] = (torch.arange(length) < 9).long()[None]
    projections = 4 * hidden * hidden + 2 * hidden * inner
    attention = 2 * length * hidden  # of one token: its scores, and its sum of values
    products = layers * length * (projections + attention) + hidden * hidden + hidden * tiny.CLASSES
    with torch.no_grad():
        assert forward_flops(model, batch) == 2 * products
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_count_as_often_as_they_are_asked(implementation):
    layers, hidden, inner, length, chosen, experts = 2, 32, 64, 12, 2, 4
    model = tiny.mixtral(hidden=hidden, layers=layers).eval()
    model.set_experts_implementation(implementation)
    heads = 2 * hidden * hidden + 2 * hidden * (hidden // 2) + 2 * length * hidden
    mixture = hidden * experts + chosen * 3 * hidden * inner
    products = layers * length * (heads + mixture) + length * hidden * tiny.VOCABULARY
    with torch.no_grad():
        assert forward_flops(model, {"input_ids": torch.full((1, length), 5)}) == 2 * products
    assert model.config._experts_implementation == implementation


def test_a_compiled_model_counts_as_it_is_written():
    model, batch = Chain(40, 70, 10), {"features": torch.randn(ROWS, 40)}
    expected = forward_flops(model, batch)
    compiled = torch.compile(model, backend="eager")
    compiled(**batch)
    assert forward_flops(compiled, batch) == expected
    model.compile(backend="eager")
    assert forward_flops(model, batch) == expected


def test_kernels_that_cannot_be_seen_are_not_counted():
    model, batch = tiny.bert().eval(), {"input_ids": torch.full((1, 4), 5)}
    model.config._attn_implementation_internal = "flash_attention_2"
    assert model.config._attn_implementation == "flash_attention_2"
    assert forward_flops(model, batch) is None


def test_integer_weights_have_no_floating_point_operations():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert forward_flops(model, {}) is None
