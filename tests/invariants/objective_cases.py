"""Trainings in which something changes over time or from item to item, for tests of their steps."""

from collections.abc import Mapping
from typing import Any

from hf_distill.losses import LOSSES
from tests import tiny

LOGIT_LOSSES = [name for name in LOSSES if LOSSES.get(name).feature == "logits"]
NEEDED = {"top_k_kl": {"kd_options": {"k": 5}}}
HEADS = {
    "classes": ("bert", "llama", "bert-spans"),
    "labels": ("bert-multi-label",),
    "outputs": ("bert-regression", "t5"),
}
# A loss that is fused, one that is not, one that takes labels, one of plain numbers: the heads call all others alike.
ON_ALL_HEADS = ("forward_kl", "reverse_kl", "dkd", "logit_mse")
# Policies whose T of an item depends on that item alone.
EXACT_TEMPERATURES = {
    "linear": {"policy": "linear", "from": 8, "to": 2},
    "entropy": {"policy": "adaptive", "signal": "teacher_entropy"},
    "confidence": {"policy": "adaptive", "signal": "teacher_confidence", "sharpness": 0.5},
    "disagreement": {"policy": "adaptive", "signal": "disagreement", "direction": "harder_cooler"},
    "loss": {"policy": "adaptive", "signal": "loss", "min": 1, "max": 20},
    # At T = 16 rounding alone is 1e-5 of a KL this small, times T squared.
    "learned": {"policy": "learned", "range": 5, "curriculum": 0.5},
    "instance": {"policy": "learned", "scope": "instance", "range": 5, "curriculum": 0.5},
}
BALANCES = ("uncertainty", "magnitude")
LANGUAGES = ("en", "de", "zh")
# What weighs the items, and whether tokens have weights of their own.
WEIGHTS = {
    "rows": [{"by": "column", "column": "distill_weight"}],
    "groups": [{"by": "group", "column": "language", "weights": {"en": 1, "de": 2.5, "zh": 0}}],
    "sizes": [{"by": "group", "column": "language", "size_power": 0.3}],
    "confidence": [{"by": "teacher", "signal": "confidence", "power": 2}],
    "correctness": [{"by": "teacher", "signal": "correctness", "wrong": 0.25}],
    "all": [
        {"by": "column", "column": "distill_weight"},
        {"by": "group", "column": "language", "size_power": 0.5},
        {"by": "teacher", "signal": "confidence"},
    ],
}


def heads_of(loss: str) -> list[str]:
    """The zoo's heads on which a loss of logits is tried."""
    spec = LOSSES.get(loss)
    heads = [name for name in HEADS[spec.compares] if not spec.compares_rows or tiny.ZOO[name][1] == "sequence"]
    return [name for name in heads if name != "bert-regression" or spec.min_classes == 1]


def losses_and_heads() -> list[tuple[str, str]]:
    """Every loss of logits on one head, of many classes if it can be, and some on all of their heads."""
    chosen = []
    for loss in LOGIT_LOSSES:
        heads = heads_of(loss)
        best = "llama" if "llama" in heads else heads[-1]
        chosen += [(loss, name) for name in heads if name == best or loss in ON_ALL_HEADS]
    return chosen


def weighted_rows(name: str, count: int = 8, *, by_token: bool = False) -> list[dict[str, Any]]:
    """The zoo's rows with a weight each, or one for each token, and a language."""
    rows: list[Mapping[str, Any]] = tiny.rows(tiny.ZOO[name][1], count=count)
    weights = [0.5 + (number * 7 % 5) / 2 for number in range(count)]
    return [
        {
            **row,
            "distill_weight": [weight * (1 + place % 3) for place in range(len(row["input_ids"]))]
            if by_token
            else weight,
            "language": LANGUAGES[number % 5 % 3],
        }
        for number, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]
