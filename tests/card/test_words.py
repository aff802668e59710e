"""Everything that a term can be is told in words."""

import pytest

from hf_distill.card.words import balance_in_words, logits_in_words, match_in_words, schedule_in_words, sources
from hf_distill.config import Balance, DistillationConfig
from hf_distill.config.terms import BALANCES
from hf_distill.layer_mapping import MAPS
from hf_distill.schedules import SCHEDULES, Schedule
from hf_distill.temperature import POLICIES

TEMPERATURES = {
    "constant": ({"policy": "constant", "value": 4}, "T = 4"),
    "linear": ({"policy": "linear", "from": 8, "to": 2}, "T from 8 to 2 (linear)"),
    "cosine": (
        {"policy": "cosine", "from": 8, "to": 2, "end": 0.5},
        "T from 8 to 2 (cosine, from 0% to 50% of the training)",
    ),
    "exponential": ({"policy": "exponential", "from": 8, "to": 2}, "T from 8 to 2 (exponential)"),
    "warmup": ({"policy": "warmup", "from": 1, "to": 4}, "T from 1 to 4 (warmup, from 0% to 10% of the training)"),
    "step": ({"policy": "step", "points": [[0, 8], [0.5, 2]]}, "T 8 at 0%, 2 at 50% of the training, in steps"),
    "piecewise": (
        {"policy": "piecewise", "points": [[0, 8], [1, 2]]},
        "T 8 at 0%, 2 at 100% of the training, straight from point to point",
    ),
    "adaptive": (
        {"policy": "adaptive", "signal": "loss", "min": 2, "max": 9, "direction": "harder_cooler", "sharpness": 2},
        "T from 9 for easy items to 2 for hard ones, by loss to the power of 2",
    ),
    "flsw": ({"policy": "flsw"}, "cooler for harder items (FLSW"),
    "cwsm": ({"policy": "cwsm"}, "cooler for harder items (CWSM"),
    "learned": (
        {"policy": "learned", "scope": "instance", "min": 1, "range": 20},
        "T learned against the student within [1, 21], one for each item",
    ),
}


def config(**logits):
    return DistillationConfig.from_dict({"logits": logits})


@pytest.mark.parametrize("policy", [*POLICIES])
def test_every_temperature_has_words(policy):
    written, words = TEMPERATURES[policy]
    assert words in logits_in_words(config(temperature=written).logits)


@pytest.mark.parametrize("kind", [*SCHEDULES])
def test_every_schedule_has_words_with_its_numbers(kind):
    points = kind in ("step", "piecewise")
    plain = {"kind": kind, "points": [[0, 3], [0.5, 7]]} if points else {"kind": kind, "from": 3, "to": 7}
    words = schedule_in_words(Schedule.of(3 if kind == "constant" else plain))
    assert "3" in words
    assert ("7" in words) == (kind != "constant")


@pytest.mark.parametrize("strategy", [*MAPS])
def test_every_map_has_words(strategy):
    vectors = "pooled(cls)@hidden[*]" if strategy == "attention" else "hidden[*]"
    layers = [[1, 2]] if strategy == "explicit" else strategy
    match = {"name": "inner", "student": vectors, "loss": "hidden_mse", "map": layers}
    made = DistillationConfig.from_dict({"matches": [match]})
    words = match_in_words(made.matches[0], [["hidden[1]", "hidden[2]"], ["hidden[2]", "hidden[4]"]])
    dynamic = strategy in ("random", "attention", "argmin", "emd")
    assert ("(1→2, 2→4)" in words) != dynamic
    assert bool(sources(made)) == dynamic


def test_stacks_are_named_in_pairs():
    match = {"name": "inner", "student": "hidden[*]", "loss": "hidden_mse"}
    term = DistillationConfig.from_dict({"matches": [match]}).matches[0]
    pairs = [["encoder.hidden[1]", "encoder.hidden[2]"], ["decoder.hidden[1]", "decoder.hidden[3]"]]
    assert "(encoder 1→encoder 2, decoder 1→decoder 3)" in match_in_words(term, pairs)


@pytest.mark.parametrize("kind", BALANCES)
def test_every_balance_has_words(kind):
    assert bool(balance_in_words(Balance(kind))) == (kind != "none")


@pytest.mark.parametrize(
    ("options", "words", "number"),
    [
        ({"transform": "standardize"}, "logits standardized (LSKD)", "2403.01427"),
        ({"teacher_scale": {"kind": "linear", "from": 0.1, "to": 1}}, "times from 0.1 to 1 (linear)", "2104.07163"),
        ({"teacher_scale": 0.5}, "the teacher's logits times 0.5", None),
        ({"temperature_squared": False}, "loss not multiplied by T²", None),
        ({"loss": "generalized_jsd", "options": {"beta": 0.9}}, "beta = 0.9", None),
        ({"item_weights": [{"by": "column"}]}, "items weighed by column", None),
        ({"item_weights": [{"by": "group", "column": "x", "size_power": 0.5}]}, "weighed by group", "1911.02116"),
        ({"token_alignment": "offsets"}, "paired by offsets", None),
        ({"temperature": {"policy": "flsw"}}, "FLSW", "1911.07471"),
        ({"temperature": {"policy": "learned"}}, "one for all items", "2211.16231"),
    ],
)
def test_what_surrounds_the_loss_is_told_and_cited(options, words, number):
    made = config(**options)
    assert words in logits_in_words(made.logits)
    assert (number or "") in sources(made)
    assert bool(number) == bool(sources(made))


def test_a_loss_without_a_temperature_has_no_words_of_one():
    assert "T =" not in logits_in_words(config(loss="logit_mse").logits)
