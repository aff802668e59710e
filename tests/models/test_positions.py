"""Positions resampled, heads regrouped and sequences pooled, against loops and NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from hf_distill.models.positions import pool, regroup_heads, resample_positions


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centres(length, new_length):
    """Where the centres of new cells lie, in indices of the old ones; beyond the outer centres the outer value."""
    return np.clip((np.arange(new_length) + 0.5) * length / new_length - 0.5, 0, length - 1)


def interpolated(values, new_length):
    """(length, width) NumPy values, at the centres of `new_length` equal parts of the same stretch."""
    at = centres(len(values), new_length)
    return np.stack([np.interp(at, np.arange(len(values)), column) for column in values.T], axis=1)


@pytest.mark.parametrize(("length", "new_length"), [(7, 13), (13, 7), (50, 25), (1, 4), (6, 1)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_frames_are_interpolated_linearly_and_special_positions_kept(length, new_length, prefix):
    features = normal(2, prefix + length, 3)
    actual = resample_positions(features, prefix + new_length, prefix=prefix, grid=False)
    assert actual.shape == (2, prefix + new_length, 3)
    assert torch.equal(actual[:, :prefix], features[:, :prefix])
    for row, expected in zip(actual, features.numpy(), strict=True):
        np.testing.assert_allclose(row[prefix:].numpy(), interpolated(expected[prefix:], new_length), atol=1e-12)


@pytest.mark.parametrize(("side", "new_side"), [(3, 5), (7, 4), (14, 16), (1, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patches_are_interpolated_along_both_sides_of_their_square(side, new_side, prefix):
    features = normal(2, prefix + side**2, 3)
    actual = resample_positions(features, prefix + new_side**2, prefix=prefix, grid=True)
    assert torch.equal(actual[:, :prefix], features[:, :prefix])
    for row, values in zip(actual, features.numpy(), strict=True):
        square = values[prefix:].reshape(side, side, 3)
        rows = np.stack([interpolated(line, new_side) for line in square])  # (side, new_side, 3)
        both = np.stack([interpolated(rows[:, j], new_side) for j in range(new_side)], axis=1)
        np.testing.assert_allclose(row[prefix:].numpy(), both.reshape(-1, 3), atol=1e-12)


@pytest.mark.parametrize("grid", [True, False])
def test_features_of_the_right_length_are_returned_as_they_are(grid):
    features = normal(2, 6, 3)
    assert resample_positions(features, 6, prefix=1, grid=grid) is features


@pytest.mark.parametrize(
    ("length", "new_length", "prefix", "words"),
    [
        (10, 17, 0, "10 positions there are; without 0 special ones .* 10 patches are left, which are no square"),
        (
            17,
            18,
            1,
            "18 positions are wanted; without 1 special ones .* 17 patches",
        ),  # a teacher with two special tokens
        (17, 1, 1, "1 positions are wanted, of which 1 special"),
    ],
)
def test_patches_that_are_no_square_are_refused_with_their_numbers(length, new_length, prefix, words):
    with pytest.raises(ValueError, match=words):
        resample_positions(normal(1, length, 2), new_length, prefix=prefix, grid=True)


def test_resampled_features_have_the_gradient_of_the_interpolation():
    features = normal(2, 10, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_positions(x, 17, prefix=1, grid=True), features)
    assert torch.autograd.gradcheck(lambda x: resample_positions(x, 4, prefix=1, grid=False), features)


@pytest.mark.parametrize("relation_heads", [1, 2, 3, 4, 6, 12, 24])
def test_regrouped_heads_share_the_concatenated_features_of_each_position(relation_heads):
    features = normal(2, 4, 5, 6)
    actual = regroup_heads(features, relation_heads)
    width = 24 // relation_heads
    assert actual.shape == (2, relation_heads, 5, width)
    for row in range(2):
        for position in range(5):
            joined = np.concatenate([features[row, head, position].numpy() for head in range(4)])
            for head in range(relation_heads):
                expected = joined[head * width : (head + 1) * width]
                np.testing.assert_array_equal(actual[row, head, position].numpy(), expected)


@pytest.mark.parametrize("relation_heads", [5, 0, 48])
def test_heads_that_cannot_share_are_refused_with_the_numbers_that_can(relation_heads):
    with pytest.raises(ValueError, match=r"4 heads of 6.*Valid numbers: 1, 2, 3, 4, 6, 8, 12, 24\."):
        regroup_heads(normal(1, 4, 5, 6), relation_heads)


TOKENS = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_a_pooled_sequence_is_that_of_its_real_positions_alone(how):
    features = normal(5, 5, 3) - 4  # negative, so that a padded 0 would win a maximum
    expected = []
    for values, tokens in zip(features.numpy(), TOKENS.numpy(), strict=True):
        real = values[tokens]
        if len(real) == 0:
            expected.append(np.zeros(3))
        else:
            expected.append({"cls": real[0], "mean": np.mean(real, axis=0), "max": np.max(real, axis=0)}[how])
    for padding in (0.0, 1e6, math.inf, math.nan):
        padded = torch.where(TOKENS.unsqueeze(-1), features, padding)
        np.testing.assert_allclose(pool(padded, TOKENS, how).numpy(), np.stack(expected), rtol=1e-12)


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_without_a_mask_every_position_is_real(how):
    features = normal(2, 5, 3)
    assert torch.equal(pool(features, None, how), pool(features, torch.ones(2, 5, dtype=torch.bool), how))


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_masked_positions_get_no_gradient_and_nothing_is_nan(how):
    features = torch.where(TOKENS.unsqueeze(-1), normal(5, 5, 3), math.nan).requires_grad_()
    pooled = pool(features, TOKENS, how)
    pooled.sum().backward()
    assert pooled[-1].eq(0).all()  # no real position, and still a part of the graph
    assert features.grad[~TOKENS].eq(0).all()
    torch.testing.assert_close(features.grad[:-1].sum(1), torch.ones(4, 3, dtype=torch.float64))


def test_a_mean_in_half_precision_is_rounded_once():
    features = (normal(4, 37, 64) + 3).bfloat16()
    pooled = pool(features, None, "mean")
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, features.double().mean(1).bfloat16())


def test_an_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'last'. Known: cls, mean, max"):
        pool(normal(1, 2, 3), None, "last")
