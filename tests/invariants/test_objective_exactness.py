"""Whatever changes over time or from item to item, a step is one step however its rows are cut up and padded."""

import pytest
import torch

from hf_distill.losses import LOSSES
from tests import tiny
from tests.invariants.objective_cases import (
    BALANCES,
    EXACT_TEMPERATURES,
    NEEDED,
    ON_ALL_HEADS,
    WEIGHTS,
    losses_and_heads,
    weighted_rows,
)
from tests.invariants.steps import assert_same_steps, distil, longer

UNEVEN, SINGLE_ROWS = (3, 3), (1, 8)
LOSS_HEADS = losses_and_heads()
ITEM_LOSSES = [(loss, name) for loss, name in LOSS_HEADS if not LOSSES.get(loss).compares_rows]
# On another head a policy or a weight has other logits and labels to read, but is the same function of them.
TEMPERATURES = [
    *((policy, "llama") for policy in EXACT_TEMPERATURES),
    *(("disagreement", name) for name in ("bert", "bert-spans", "bert-tokens", "t5")),
    *(("instance", name) for name in ("bert", "bert-spans")),
]
MOVING = ("linear", "learned", "instance")
WEIGHTED = [
    *((weights, "llama") for weights in WEIGHTS),
    *(
        (weights, name)
        for weights in ("all", "correctness")
        for name in ("bert", "bert-multi-label", "bert-spans", "bert-tokens", "t5", "vit")
    ),
]


def rows_of(name):
    return tiny.rows(tiny.ZOO[name][1])


def assert_exact(name, rows, output_dir, splits=(UNEVEN,), **settings):
    whole = distil(tiny.pair(name), rows, output_dir, **settings)
    for batch, accumulation in splits:
        assert_same_steps(distil(tiny.pair(name), rows, output_dir, batch, accumulation, **settings), whole)
    return whole


@pytest.mark.parametrize(("loss", "name"), ITEM_LOSSES)
def test_every_loss_takes_the_same_step(loss, name, output_dir):
    """Cut up without more padding, and cut up in another way with it."""
    settings = {"kd_loss": loss, "temperature": 3.0, **NEEDED.get(loss, {})}
    rows = rows_of(name)
    if loss in ON_ALL_HEADS or "spans" in name:
        whole = assert_exact(name, rows, output_dir, **settings)
    else:
        whole = distil(tiny.pair(name), rows, output_dir, **settings)
    if "spans" not in name:  # a span head takes padding for positions
        rows = longer(rows, tiny.ZOO[name][1])
    split = SINGLE_ROWS if loss in ON_ALL_HEADS else UNEVEN
    assert_same_steps(distil(tiny.pair(name), rows, output_dir, *split, **settings), whole)


@pytest.mark.parametrize(("loss", "name"), [pair for pair in LOSS_HEADS if pair not in ITEM_LOSSES])
def test_losses_that_compare_rows_take_the_same_step_with_more_padding(loss, name, output_dir):
    settings = {"kd_loss": loss, "task_weight": 0.0, **NEEDED.get(loss, {})}
    rows = rows_of(name)
    padded = longer(rows, tiny.ZOO[name][1])
    steps = [distil(tiny.pair(name), some, output_dir, **settings) for some in (padded, rows)]
    assert_same_steps(*steps)


@pytest.mark.parametrize(("policy", "name"), TEMPERATURES)
def test_every_temperature_of_an_item_takes_the_same_step(policy, name, output_dir):
    settings = {"temperature": EXACT_TEMPERATURES[policy], "num_train_epochs": 2 if policy in MOVING else 1}
    run = assert_exact(name, rows_of(name), output_dir, **settings)
    assert all(log["temperature_min"] <= log["temperature"] <= log["temperature_max"] for log in run.logs)


@pytest.mark.parametrize(("weights", "name"), WEIGHTED)
def test_weighted_items_take_the_same_step(weights, name, output_dir):
    splits = (UNEVEN, SINGLE_ROWS) if weights == "all" and name in ("bert", "llama") else (UNEVEN,)
    settings = {"item_weights": WEIGHTS[weights], "temperature": {"policy": "adaptive"}}
    assert_exact(name, weighted_rows(name), output_dir, splits, **settings)


@pytest.mark.parametrize("name", ["bert-tokens", "llama", "bert-masked", "gpt2"])
def test_weighted_tokens_take_the_same_step(name, output_dir):
    rows = weighted_rows(name, by_token=True)
    settings = {"item_weights": WEIGHTS["rows"], "temperature": {"policy": "adaptive"}}
    whole = assert_exact(name, rows, output_dir, **settings)
    plain = distil(tiny.pair(name), rows_of(name), output_dir, temperature={"policy": "adaptive"})
    assert whole.logs[0]["loss_kd"] != pytest.approx(plain.logs[0]["loss_kd"], rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_weights_of_two_for_all_items_change_nothing(name, output_dir):
    rows = [{**row, "distill_weight": 2.0} for row in rows_of(name)]
    weighted = distil(tiny.pair(name), rows, output_dir, item_weights=WEIGHTS["rows"])
    assert_same_steps(weighted, distil(tiny.pair(name), rows_of(name), output_dir))


def test_a_row_of_weight_zero_teaches_nothing(output_dir):
    rows = rows_of("bert")
    weighted = [{**row, "distill_weight": float(number < 6)} for number, row in enumerate(rows)]
    settings = {"task_weight": 0.0}
    run = distil(tiny.pair("bert"), weighted, output_dir, item_weights=WEIGHTS["rows"], **settings)
    assert_same_steps(run, distil(tiny.pair("bert"), rows[:6], output_dir, **settings))


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("balance", BALANCES)
def test_balanced_terms_take_the_same_step(balance, name, output_dir):
    settings = {"loss_balance": balance, "hidden_weight": 0.5, "num_train_epochs": 3}
    run = assert_exact(name, rows_of(name), output_dir, **settings)
    weights = [tuple(log[f"weight_{term}"] for term in ("task", "kd", "hidden")) for log in run.logs]
    assert len({*weights}) > 1, "the balance never moves"


def test_a_batch_that_weighs_nothing_leaves_the_student_as_it_is(output_dir):
    rows = [{**row, "distill_weight": 0.0} for row in rows_of("bert")]
    run = distil(tiny.pair("bert"), rows, output_dir, item_weights=WEIGHTS["rows"], task_weight=0.0)
    assert run.logs[0]["loss_kd"] == 0
    assert torch.equal(run.gradients[0], torch.zeros_like(run.gradients[0]))
