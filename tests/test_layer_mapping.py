import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_distill.layer_mapping import (
    DYNAMIC_MAPS,
    MAPS,
    STATIC_MAPS,
    attend,
    explicit_pairs,
    layer_pairs,
    ordered_argmin,
    random_pairs,
    transport,
)
from tests.losses.observing import Operations

DEPTHS = st.integers(1, 30)
COSTS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))


def random_costs(student_layers, candidates, seed):
    return torch.rand(student_layers, candidates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_of(strategy, student_depth, teacher_depth, with_embeddings=False):
    return layer_pairs(
        strategy, student_depth=student_depth, teacher_depth=teacher_depth, with_embeddings=with_embeddings
    )


@pytest.mark.parametrize(
    ("strategy", "student_depth", "teacher_depth", "teacher_layers"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 5, 12, (2, 5, 7, 10, 12)),
        ("uniform", 4, 6, (2, 3, 5, 6)),
        ("uniform_last", 4, 12, (3, 6, 9, 12)),
        ("uniform_last", 5, 12, (2, 4, 7, 9, 12)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ("first", 4, 12, (1, 2, 3, 4)),
        ("skip", 6, 12, (2, 4, 6, 8, 10)),
        ("skip", 5, 12, (2, 4, 6, 8)),
        ("uniform", 4, 2, (1, 1, 2, 2)),
        ("uniform_last", 4, 2, (1, 1, 1, 2)),
        ("uniform", 6, 1, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_the_maps_are_those_of_the_papers(strategy, student_depth, teacher_depth, teacher_layers):
    expected = tuple(enumerate(teacher_layers, start=1))
    assert pairs_of(strategy, student_depth, teacher_depth) == expected
    embeddings = ((0, 0),) if strategy == "uniform" else ()
    assert pairs_of(strategy, student_depth, teacher_depth, with_embeddings=True) == embeddings + expected


@pytest.mark.parametrize("strategy", STATIC_MAPS)
@settings(max_examples=80, deadline=None)
@given(student_depth=DEPTHS, teacher_depth=DEPTHS, with_embeddings=st.booleans())
def test_every_static_map_is_monotone_in_range_and_explicit_pairs_give_it_back(
    strategy, student_depth, teacher_depth, with_embeddings
):
    assume(strategy.startswith("uniform") or student_depth <= teacher_depth)
    assume(strategy != "skip" or student_depth > 1)
    pairs = pairs_of(strategy, student_depth, teacher_depth, with_embeddings)
    depths = {"student_depth": student_depth, "teacher_depth": teacher_depth}
    students, teachers = zip(*pairs, strict=True)
    first = 0 if with_embeddings and strategy == "uniform" else 1
    assert students == tuple(range(first, student_depth + (strategy != "skip")))
    assert all(1 <= teacher <= teacher_depth for student, teacher in pairs if student)
    steps = [later - earlier for earlier, later in itertools.pairwise(teachers)]
    assert all(step >= (1 if student_depth <= teacher_depth else 0) for step in steps)
    if strategy.startswith("uniform"):
        assert pairs[-1] == (student_depth, teacher_depth)
        assert pairs[0] == (0, 0) or not (with_embeddings and strategy == "uniform")

    from_end = [[student - student_depth - 1, teacher - teacher_depth - 1] for student, teacher in pairs]
    for written in (dict(pairs), pairs, [list(pair) for pair in pairs], from_end):
        assert explicit_pairs(written, **depths, with_embeddings=with_embeddings) == pairs


def test_a_map_of_equal_depths_is_the_identity():
    for strategy in ("uniform", "uniform_last", "last", "first"):
        assert pairs_of(strategy, 7, 7) == tuple((layer, layer) for layer in range(1, 8))


@pytest.mark.parametrize("strategy", ["last", "first", "skip"])
def test_a_student_deeper_than_its_teacher_is_refused_with_both_depths(strategy):
    with pytest.raises(ValueError, match=f"{strategy}.*6 student and 4 teacher layers.*Use uniform"):
        pairs_of(strategy, 6, 4)


def test_a_map_that_maps_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"skip.*maps nothing with 1 student and 4 teacher layers.*Use uniform or last"
    ):
        pairs_of("skip", 1, 4)
    for depths in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="needs layers on both sides; it has"):
            pairs_of("uniform", *depths)


def test_an_unknown_map_is_refused_with_the_nearest_and_one_that_is_not_static_with_those_that_are():
    with pytest.raises(ValueError, match=r"Unknown layer map 'unifrom'\. Did you mean 'uniform'\?.*argmin"):
        pairs_of("unifrom", 4, 12)
    for strategy in ("explicit", *DYNAMIC_MAPS):
        with pytest.raises(ValueError, match=f"{strategy}.*uniform_last"):
            pairs_of(strategy, 4, 12)


def test_the_registry_knows_every_map_and_its_kind():
    kinds = {name: MAPS.get(name) for name in MAPS}
    others = {"explicit": "explicit", "copied": "copied", **dict.fromkeys(DYNAMIC_MAPS, "dynamic")}
    assert kinds == {**dict.fromkeys(STATIC_MAPS, "static"), **others}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"is empty\. The student has 4 layers, the teacher 12"),
        ({}, "is empty"),
        ([[5, 1]], r"\[5, 1\].*does not exist.*4 layers, the teacher 12.*-1 is the last"),
        ([[1, 13]], r"\[1, 13\].*does not exist"),
        ([[1, -13]], "this feature has no layer 0"),
        ([[0, 0]], "this feature has no layer 0"),
        ([[1, 3], [-4, 3]], r"\[1, 3\] twice, as \[-4, 3\]"),
        ([[1, 3, 5]], "expected two whole numbers"),
        ({"1": 3}, r"\['1', 3\]; expected two whole numbers"),
        ([[1, True]], "expected two whole numbers"),
    ],
)
def test_explicit_pairs_that_cannot_be_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        explicit_pairs(pairs, student_depth=4, teacher_depth=12, with_embeddings=False)


def test_explicit_pairs_may_share_layers_and_keep_their_order():
    depths = {"student_depth": 4, "teacher_depth": 12, "with_embeddings": True}
    assert explicit_pairs([[-1, -1], [1, 3], [1, 4], [0, 0]], **depths) == ((4, 12), (1, 3), (1, 4), (0, 0))


@settings(max_examples=50, deadline=None)
@given(candidates=st.sets(st.integers(1, 24), min_size=4), epoch=st.integers(0, 5), seed=st.integers(0, 9))
def test_random_pairs_are_an_ordered_choice_that_seed_and_epoch_fix(candidates, epoch, seed):
    pairs = random_pairs((1, 2, 3, 4), tuple(candidates), epoch=epoch, seed=seed)
    students, teachers = zip(*pairs, strict=True)
    assert students == (1, 2, 3, 4)
    assert sorted({*teachers}) == list(teachers)
    assert {*teachers} <= candidates
    assert random_pairs([1, 2, 3, 4], sorted(candidates, reverse=True), epoch=epoch, seed=seed) == pairs


def test_random_pairs_differ_between_epochs_and_seeds_and_reach_every_candidate():
    candidates = range(1, 13)
    by_epoch = {random_pairs((1, 2, 3), candidates, epoch=epoch, seed=0) for epoch in range(50)}
    by_seed = {random_pairs((1, 2, 3), candidates, epoch=0, seed=seed) for seed in range(50)}
    assert min(len(by_epoch), len(by_seed)) > 25
    assert {teacher for pairs in by_epoch for _, teacher in pairs} == {*candidates}
    assert random_pairs((1, 2, 3), candidates, epoch=1, seed=42) == ((1, 3), (2, 4), (3, 5))  # on every machine


def test_random_pairs_without_enough_candidates_are_refused():
    with pytest.raises(ValueError, match=r"each of the 3 student layers \[1, 2, 3\], but has 2 candidates \[4, 8\]"):
        random_pairs((1, 2, 3), (4, 8), epoch=0, seed=0)


@settings(max_examples=100, deadline=None)
@given(case=COSTS)
def test_ordered_argmin_is_the_cheapest_of_all_orders(case):
    student_layers, candidates, seed = case
    costs = random_costs(student_layers, candidates, seed).requires_grad_()
    weights = ordered_argmin(costs)
    assert not weights.requires_grad
    assert weights.shape == costs.shape
    assert {*weights.unique().tolist()} <= {0.0, 1.0}
    assert torch.equal(weights.sum(0), torch.ones(candidates, dtype=torch.float64))
    choose = itertools.combinations if candidates <= student_layers else itertools.combinations_with_replacement
    totals = {
        order: sum(costs[layer, place].item() for place, layer in enumerate(order))
        for order in choose(range(student_layers), candidates)
    }
    assert tuple(weights.argmax(0).tolist()) == min(totals, key=totals.get)


def test_ordered_argmin_keeps_the_order_where_the_cheapest_layers_cross():
    # By itself each candidate would take the other's layer.
    costs = torch.tensor([[5.0, 1.0], [1.0, 5.0], [9.0, 6.0]])
    assert ordered_argmin(costs).argmax(0).tolist() == [1, 2]
    assert ordered_argmin(costs[:1].expand(1, 2)).tolist() == [[1.0, 1.0]]


def test_ordered_argmin_reads_nothing_back_and_survives_nan():
    costs = random_costs(6, 4, 0)
    with Operations() as operations:
        ordered_argmin(costs)
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"} & {*operations.counts}
    costs[2, 1] = math.nan
    assert torch.equal(ordered_argmin(costs).sum(0), torch.ones(4, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(case=COSTS, scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_transport_spreads_both_sides_evenly_and_costs_no_more_than_any_matching(case, scale):
    student_layers, candidates, seed = case
    costs = random_costs(student_layers, candidates, seed) * scale
    flow = transport(costs.requires_grad_())
    assert not flow.requires_grad
    assert (flow >= -1e-9).all()
    for side, count in ((1, student_layers), (0, candidates)):
        torch.testing.assert_close(flow.sum(side), torch.full((count,), 1 / count, dtype=torch.float64))
    cost = (flow * costs).sum().item()
    if student_layers == candidates:  # then the cheapest flow is a matching
        matchings = itertools.permutations(range(candidates))
        cheapest = min(sum(costs[s, c].item() for s, c in enumerate(order)) / candidates for order in matchings)
        assert cost == pytest.approx(cheapest, rel=1e-6)
    assert cost <= costs.mean().item() * (1 + 1e-6)


def test_transport_of_two_layers_to_four_gives_each_layer_its_cheaper_half():
    costs = torch.tensor([[0.0, 9.0, 1.0, 9.0], [9.0, 0.0, 9.0, 1.0]])
    expected = torch.tensor([[0.25, 0, 0.25, 0], [0, 0.25, 0, 0.25]])
    torch.testing.assert_close(transport(costs), expected)
    assert transport(costs.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_transport_without_a_cheapest_way_is_even(value):
    costs = torch.full((2, 3), value)
    assert torch.equal(transport(costs), torch.full((2, 3), 1 / 6))
    costs = torch.ones(2, 3)
    costs[1, 2] = value
    total = (transport(costs) * costs).sum()
    assert total.isfinite() == math.isfinite(value)


def test_attend_mixes_the_teachers_layers_by_their_products_with_the_student():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(layers, 5, 8, generator=generator, dtype=torch.float64) for layers in (2, 3))
    mixed = attend(student, teacher)
    for layer, row in itertools.product(range(2), range(5)):
        products = [student[layer, row].dot(other[row]).exp() for other in teacher]
        expected = sum(product * other[row] for product, other in zip(products, teacher, strict=True)) / sum(products)
        torch.testing.assert_close(mixed[layer, row], expected)
    assert torch.autograd.gradcheck(lambda rows: attend(rows, teacher), student.requires_grad_())


def test_attend_gives_a_single_candidate_back_and_the_teacher_no_gradient():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    mixed = attend(student, teacher)
    torch.testing.assert_close(mixed, teacher.expand(2, 3, 4))
    mixed.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_attend_is_in_float32_and_changes_nothing_under_autocast():
    student, teacher = torch.randn(2, 3, 4).bfloat16(), torch.randn(3, 3, 4).bfloat16()
    expected = attend(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(student, teacher)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


def test_attend_refuses_other_widths():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), the teacher's \(2, 3, 5\).*projection"):
        attend(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
