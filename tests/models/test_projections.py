"""Projections: their shapes and dtypes, and that their weights are a function of the arguments alone."""

import pytest
import torch

from hf_distill.models.projections import KINDS, Projection, make_projection


def projection(student_width=6, teacher_width=10, **changes):
    options = {"kind": "linear", "init": "default", "bias": True, "dtype": torch.float32, "device": "cpu", "seed": 3}
    return make_projection(student_width, teacher_width, **options | changes)


@pytest.mark.parametrize("init", ["default", "orthogonal"])
@pytest.mark.parametrize(
    ("kind", "bias", "shapes"),
    [
        ("linear", True, [(10, 6), (10,)]),
        ("linear", False, [(10, 6)]),
        ("mlp", True, [(10, 6), (10,), (10, 10), (10,)]),
        ("mlp", False, [(10, 6), (10, 10)]),
    ],
)
def test_a_projection_has_the_weights_that_its_kind_says(kind, bias, init, shapes):
    made = projection(kind=kind, bias=bias, init=init)
    assert [tuple(value.shape) for value in made.parameters()] == shapes
    assert all(value.requires_grad for value in made.parameters())
    assert made(torch.randn(2, 5, 6)).shape == (2, 5, 10)


def test_an_mlp_is_two_layers_around_a_gelu():
    made, features = projection(kind="mlp").double(), torch.randn(4, 6, dtype=torch.float64)
    first, first_bias, second, second_bias = (value.detach() for value in made.parameters())
    inner = features @ first.T + first_bias
    expected = inner * 0.5 * (1 + torch.special.erf(inner / 2**0.5)) @ second.T + second_bias
    torch.testing.assert_close(made(features), expected)


def test_an_identity_gives_back_what_it_gets_and_trains_nothing():
    made, features = projection(6, 6, kind="identity"), torch.randn(2, 6, dtype=torch.bfloat16)
    assert made(features) is features
    assert list(made.parameters()) == []


def test_an_identity_between_unequal_widths_is_refused_with_both_and_the_remedy():
    with pytest.raises(ValueError, match=r"student's 6 .* teacher's 10\. Use projection kind 'linear' or 'mlp'"):
        projection(kind="identity")


@pytest.mark.parametrize("wrong", [{"kind": "conv"}, {"init": "zeros"}])
def test_an_unknown_word_is_refused_with_the_known_ones(wrong):
    with pytest.raises(ValueError, match=r"conv.*Known: linear, mlp, identity|zeros.*Known: default, orthogonal"):
        projection(**wrong)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_the_weights_depend_on_the_seed_and_not_on_the_random_state_which_stays(kind, init):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = projection(kind=kind, init=init)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    same, other = projection(kind=kind, init=init), projection(kind=kind, init=init, seed=4)
    for value, again, different in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(value, again)
        assert not torch.equal(value, different) or not value.any()  # orthogonal starts with biases of zero


def test_the_default_init_is_that_of_a_linear_layer():
    """`nn.Linear` draws weight and bias uniformly within 1 / sqrt(inputs)."""
    weight, bias = projection(64, 400).parameters()
    for value in (weight, bias):
        assert value.abs().max() <= 1 / 8
        assert value.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(("student_width", "teacher_width"), [(6, 10), (10, 6)])
def test_an_orthogonal_init_has_orthonormal_rows_or_columns(student_width, teacher_width):
    weight, bias = projection(student_width, teacher_width, init="orthogonal").double().parameters()
    gram = weight @ weight.T if teacher_width < student_width else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not bias.any()


@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_weights_in_half_precision_are_the_rounded_ones(init):
    for value, exact in zip(
        projection(init=init, dtype=torch.bfloat16).parameters(), projection(init=init).parameters(), strict=True
    ):
        assert torch.equal(value, exact.bfloat16())


def test_features_of_another_dtype_are_projected_in_that_of_the_weights():
    made = projection()
    assert isinstance(made, Projection)
    features = torch.randn(2, 6).bfloat16().requires_grad_()
    made(features).sum().backward()
    assert made(features).dtype == torch.float32
    assert features.grad.dtype == torch.bfloat16
