"""Terms between layers take the same step however a batch is split and padded; those over a batch see the batch."""

import pytest
import torch

from hf_distill.losses import LOSSES
from tests import tiny
from tests.invariants.steps import assert_same_steps, distil, longer

ITEM_SCOPED = [
    {"student": "hidden[*]", "loss": "hidden_mse"},
    {"student": "hidden[*]", "loss": "hidden_mse", "reduction": "sample_mean"},
    {"student": "hidden[*]", "loss": "hidden_mse", "mask": "cls"},
    {"student": "hidden[*]", "loss": "hidden_mse", "projection": {"kind": "mlp", "share": "all"}},
    {"student": "hidden[-1]", "teacher": "hidden[-1]", "loss": "hidden_cosine"},
    {"student": "pooled(mean)@hidden[-1]", "loss": "hidden_kl", "options": {"temperature": 2.0}},
    {"student": "hidden[*]", "loss": "hidden_hint", "map": "last"},
    {"student": "pooled(cls)@hidden[*]", "loss": "hidden_normalized_mse", "map": "skip", "reduction": "reference"},
    {"student": "pooled(mean)@hidden[-1]", "teacher": "pooled(mean)@hidden[-1]", "loss": "hidden_mse"},
    {"student": "pooled(max)@hidden[1]", "teacher": "pooled(max)@hidden[2]", "loss": "hidden_mse"},
    {"student": "pooled(cls)@hidden[*]", "loss": "hidden_mse", "map": {"strategy": "attention"}},
    {"student": "hidden[*]", "loss": "hidden_mse", "map": {"strategy": "random", "seed": 3}},
    {"student": "attention_scores[*]", "loss": "attention_mse"},
    {"student": "attention_scores[*]", "loss": "attention_mse", "reduction": "sample_mean"},
    {"student": "attention_scores[*]", "loss": "attention_mse", "heads": "relation", "options": {"relation_heads": 2}},
    {"student": "attention_probs[*]", "loss": "attention_kl"},
    {"student": "attention_probs[-1]", "teacher": "attention_probs[-1]", "loss": "attention_probs_mse"},
    {"student": "value[-1]", "teacher": "value[-1]", "loss": "minilm_values", "reduction": "reference"},
    {
        "student": "query[-1]",
        "teacher": "query[-1]",
        "loss": "minilmv2_relations",
        "options": {"relation_heads": 8},
    },
    {"student": "hidden[*]", "loss": "ckd_pairs"},
    {"student": "hidden[-1]", "teacher": "hidden[-1]", "loss": "ckd_angles"},
]
BATCH_SCOPED = [
    {"student": "pooled(cls)@hidden[-1]", "teacher": "pooled(cls)@hidden[-1]", "loss": "rkd_distance"},
    {"student": "pooled(mean)@hidden[-1]", "teacher": "pooled(mean)@hidden[-1]", "loss": "rkd_angle"},
    {"student": "pooled(mean)@hidden[-1]", "teacher": "pooled(mean)@hidden[-1]", "loss": "similarity_preserving"},
    {"student": "pooled(mean)@hidden[-1]", "teacher": "pooled(mean)@hidden[-1]", "loss": "cka"},
    {
        "student": "pooled(mean)@hidden[-1]",
        "teacher": "pooled(mean)@hidden[-1]",
        "loss": "contrastive",
        "projection": {"when": "always"},
    },
    {"student": "pooled(mean)@hidden[-1]", "loss": "mmd", "domain": "domain"},
    {"student": "pooled(mean)@hidden[-1]", "loss": "coral", "domain": "domain"},
]
# The layers are chosen by the batch at hand: a split changes the step where it changes the choice, and only there.
BATCH_MAPS = [
    {"student": "hidden[*]", "loss": "hidden_mse", "map": {"strategy": "argmin"}},
    {"student": "hidden[*]", "loss": "hidden_mse", "map": {"strategy": "emd"}},
]


def match_id(match):
    chosen = match.get("map", "")
    parts = [match["loss"], match["student"], chosen["strategy"] if isinstance(chosen, dict) else chosen]
    return "-".join(
        [*filter(None, parts), *(str(match[key]) for key in ("reduction", "mask", "heads") if key in match)]
    )


def config(*matches, task=0.5, kd=0.5):
    named = [{"name": f"match_{number}", **match} for number, match in enumerate(matches)]
    return {"task": {"weight": task}, "logits": {"weight": kd}, "matches": named}


def rows_of(name, match=None):
    rows = tiny.rows(tiny.ZOO[name][1])
    if match is not None and "domain" in match:
        return [{**row, "domain": torch.tensor(number % 2)} for number, row in enumerate(rows)]
    return rows


def steps(name, match, output_dir, *split, rows=None, **changes):
    terms = {"distillation_config": config(match, **changes)}
    return distil(tiny.pair(name), rows_of(name, match) if rows is None else rows, output_dir, *split, **terms)


@pytest.mark.parametrize("match", ITEM_SCOPED, ids=match_id)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_match_of_independent_items_takes_the_same_step(name, match, output_dir):
    whole = steps(name, match, output_dir, task=0.0, kd=0.0)
    assert whole.logs[0]["loss_match_0"] > 0
    longer_rows = longer(rows_of(name), tiny.ZOO[name][1])
    assert_same_steps(steps(name, match, output_dir, 3, 3, rows=longer_rows, task=0.0, kd=0.0), whole)


@pytest.mark.parametrize("match", [*BATCH_SCOPED, *BATCH_MAPS], ids=match_id)
def test_a_match_over_the_batch_does_not_see_padding_and_does_see_the_batch(match, output_dir):
    rows = rows_of("bert", match)
    whole = steps("bert", match, output_dir, rows=rows)
    assert whole.logs[0]["loss_match_0"] != 0
    assert_same_steps(steps("bert", match, output_dir, rows=longer(rows, "sequence")), whole)
    if match in BATCH_MAPS:
        return
    split = steps("bert", match, output_dir, 4, 2, rows=rows)
    assert split.logs[0]["loss_match_0"] != pytest.approx(whole.logs[0]["loss_match_0"], rel=1e-4)


@pytest.mark.parametrize("name", tiny.ZOO)
def test_hidden_states_and_attention_of_every_head_take_the_same_step(name, output_dir):
    rows, kind = rows_of(name), tiny.ZOO[name][1]
    settings = {"hidden_weight": 0.7, "attention_weight": 2.0}
    whole = distil(tiny.pair(name), rows, output_dir, **settings)
    assert whole.logs[0]["loss_hidden"] > 0
    assert whole.logs[0]["loss_attention"] > 0
    can_be_longer = kind not in ("image", "features", "spans")  # a span head takes padding for positions
    padded = longer(rows, kind) if can_be_longer else rows
    for split in ((1, 8), (3, 3)):
        assert_same_steps(distil(tiny.pair(name), padded, output_dir, *split, **settings), whole)


def test_every_loss_between_layers_is_tested_here():
    tested = {match["loss"] for match in (*ITEM_SCOPED, *BATCH_SCOPED)}
    assert tested == {name for name in LOSSES if LOSSES.get(name).feature != "logits"}


def test_left_and_right_padding_take_the_same_step(output_dir):
    """GPT-like models count positions from the mask only in `generate`, so BERT-like ones are compared shifted."""
    rows = rows_of("llama")
    match = {"student": "pooled(cls)@hidden[*]", "loss": "hidden_mse"}
    left = [
        {key: torch.roll(value, int((row["attention_mask"] == 0).sum()), 0) for key, value in row.items()}
        for row in rows
    ]
    whole = steps("llama", match, output_dir, rows=rows, task=0.0, kd=0.0)
    moved = steps("llama", match, output_dir, rows=left, task=0.0, kd=0.0)
    # Llama's positions are relative: moving a text moves nothing else.
    assert moved.logs[0]["loss_match_0"] == pytest.approx(whole.logs[0]["loss_match_0"], rel=1e-4)
