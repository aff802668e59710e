"""Every preset minimises what its paper does: each term of a step against the formula, in float64, on what is real.

Two reductions differ from the papers' code, as the presets say: means are over real tokens where TinyBERT's and
BERT-EMD's code also counts padding, and logits are compared by a sum over the classes where TinyBERT's and PKD's code
divides by their number.
"""

import math
from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from hf_distill.presets import load_preset, preset_names
from tests import tiny
from tests.matches import look, pair_of
from tests.training import logged, make_trainer

WIDE = ({"hidden": 32, "layers": 2}, {"hidden": 48, "layers": 4})
EQUAL = ({"hidden": 32, "layers": 2}, {"hidden": 32, "layers": 4})
MICRO = 4


def bert_mlm(**options):
    return tiny.bert("MaskedLM", **options)


# name -> (makes a model, student's and teacher's sizes, kind of rows), where it is not BERT with a classifier, WIDE
MODELS = {
    "distilbert": (bert_mlm, EQUAL, "masked"),
    "pkd": (tiny.bert, ({"hidden": 32, "layers": 3}, {"hidden": 32, "layers": 6}), "sequence"),
    "minilmv2": (tiny.bert, ({"hidden": 48, "layers": 2}, {"hidden": 96, "layers": 3}), "sequence"),
    "mobilebert": (tiny.bert, ({"hidden": 32, "layers": 3}, {"hidden": 32, "layers": 3}), "sequence"),
    "fitnets": (tiny.bert, ({"hidden": 32, "layers": 4}, {"hidden": 48, "layers": 8}), "sequence"),
    "alp": (tiny.bert, EQUAL, "sequence"),
    "distil_whisper": (tiny.whisper, WIDE, "features"),
}


def case(name):
    make, sizes, kind = MODELS.get(name, (tiny.bert, WIDE, "sequence"))
    return pair_of(make, *sizes), tiny.rows(kind)


# -- the formulas: s and t are what is inside student and teacher, `weights` the projections' before the step --------


def labels(s, t, weights):
    """Cross-entropy, a mean over the labels."""
    return F.cross_entropy(s.logits[s.labels >= 0], s.labels[s.labels >= 0])


def soft_targets(temperature):
    """Hinton et al.: T² times the KL, a mean over what has a label (for a classifier, the texts)."""

    def value(s, t, weights):
        p, q = ((x.logits[s.labels >= 0] / temperature).softmax(-1) for x in (t, s))
        return temperature**2 * (p * (p / q).log()).sum(-1).mean()

    return value


def projected(weights, name, hidden):
    return hidden @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]


def shared_projection_error(s, t, m, n, weights):
    """MSE(H W, H') of real tokens, with one W for all layers as in the authors' code."""
    return F.mse_loss(projected(weights, "hidden_shared", s.hidden[m][s.real]), t.hidden[n][s.real])


def tinybert_hidden(s, t, weights):
    """The sum over g(0) = 0, g(m) = 2m."""
    return sum(shared_projection_error(s, t, m, n, weights) for m, n in [(0, 0), (1, 2), (2, 4)])


def score_error(s, t, m, n):
    """MSE of the scores before the softmax over heads and pairs of real tokens."""
    pairs = (s.real[:, :, None] & s.real[:, None, :])[:, None].expand_as(s.maps[0])
    return F.mse_loss(s.scores(m)[pairs], t.scores(n)[pairs])


def tinybert_attention(s, t, weights):
    """The teacher's index from 0 is i·k + k - 1 in the authors' code, with k = 2 here."""
    return score_error(s, t, 1, 2) + score_error(s, t, 2, 4)


def row_kl(teacher, student, tokens):
    """(rows, length): KL of probabilities over the real tokens, a mean over the heads."""
    keys = tokens[:, None, None, :]
    p, q = (torch.where(keys, x, 1.0) for x in (teacher, student))
    return (p * (p / q).log()).sum(-1).mean(1)


def map_kl(s, t, m, n):
    return row_kl(t.maps[n - 1], s.maps[m - 1], s.real)


def mean_of_texts(values, tokens):
    """1/|x| sum over the rows of a text, then the mean of the texts."""
    return torch.stack([row[real].mean() for row, real in zip(values, tokens, strict=True)]).mean()


def relation(vectors, tokens):
    """softmax(X Xᵀ / sqrt(width)) among the real tokens of (rows, heads, length, width)."""
    scores = vectors @ vectors.mT / math.sqrt(vectors.shape[-1])
    return scores.masked_fill(~tokens[:, None, None, :], -math.inf).softmax(-1)


def minilm_attention(s, t, weights):
    return mean_of_texts(map_kl(s, t, len(s.maps), len(t.maps)), s.real)


def minilm_values(s, t, weights):
    own, other = (relation(x.parts["value"][-1], s.real) for x in (s, t))
    return mean_of_texts(row_kl(other, own, s.real), s.real)


def minilmv2(kind):
    """48 relation heads of the vectors of all heads side by side."""

    def value(s, t, weights):
        flat = [x.parts[kind][-1].transpose(1, 2).flatten(2) for x in (s, t)]
        own, other = (relation(torch.stack(x.chunk(48, -1), 1), s.real) for x in flat)
        return mean_of_texts(row_kl(other, own, s.real), s.real)

    return value


def mobilebert_hidden(s, t, weights):
    return sum((s.hidden[i] - t.hidden[i])[s.real].square().mean() for i in (1, 2, 3))


def mobilebert_attention(s, t, weights):
    return sum(map_kl(s, t, i, i)[s.real].mean() for i in (1, 2, 3))


def distilbert_hidden(s, t, weights):
    own, other = s.hidden[-1][s.real], t.hidden[-1][s.real]
    return F.cosine_embedding_loss(own, other, torch.ones(len(own)))


def pkd_hidden(s, t, weights):
    """The authors' F.mse_loss of normalised [CLS] vectors, stacked over PKD-Skip's layers: 2 and 4 of 6."""
    own, other = (torch.stack([x.hidden[i][:, 0] for i in layers], 1) for x, layers in ((s, (1, 2)), (t, (2, 4))))
    return F.mse_loss(F.normalize(own, dim=-1), F.normalize(other, dim=-1))


def fitnets_hint(s, t, weights):
    """Half the squared distance of the middle layers, 2 of 4 and 4 of 8; a mean over the real tokens."""
    guided = projected(weights, "hidden_2_4", s.hidden[2][s.real])
    return ((guided - t.hidden[4][s.real]) ** 2).sum(-1).mean() / 2


def mean_vectors(x):
    return torch.stack([row[real].mean(0) for row, real in zip(x.hidden[-1], x.real, strict=True)])


def over_batches(value):
    """Relations between texts see a micro-batch; as many texts in each, so the mean of theirs is the step's."""

    def mean(s, t, weights):
        batches = zip(s.split(MICRO), t.split(MICRO), strict=True)
        return torch.stack([value(own, other, weights) for own, other in batches]).mean()

    return mean


@over_batches
def rkd_distance(s, t, weights):
    """Smooth L1 of distances over their mean, a mean over B² as in the authors' code."""
    own, other = (torch.linalg.vector_norm(x[:, None] - x[None], dim=-1) for x in map(mean_vectors, (s, t)))
    own, other = (x / x[x > 0].mean() for x in (own, other))
    return F.smooth_l1_loss(own, other)


@over_batches
def rkd_angle(s, t, weights):
    """Smooth L1 of the cosines of all angles, a mean over B³ as in the authors' code."""

    def cosines(x):
        rays = F.normalize(mean_vectors(x)[None] - mean_vectors(x)[:, None], dim=-1)
        return torch.einsum("ijw,ikw->ijk", rays, rays)

    return F.smooth_l1_loss(cosines(s), cosines(t))


CKD_LAYERS = [(0, 0), (1, 2), (2, 4)]


def ckd(of_text):
    """A mean over the real tokens, the sum over the layers."""

    def value(s, t, weights):
        total = 0.0
        for m, n in CKD_LAYERS:
            for own, other, real in zip(s.hidden[m], t.hidden[n], s.real, strict=True):
                total += of_text(own[real], other[real])
        return total / s.real.sum()

    return value


@ckd
def ckd_pairs(own, other):
    """KL of the softmax over the cosines with the text's other tokens."""
    total = 0.0
    for i in range(len(own)):
        rest = [j for j in range(len(own)) if j != i]
        q, p = (torch.cosine_similarity(x[i], x[rest], dim=-1).softmax(-1) for x in (own, other))
        total += (p * (p / q).log()).sum()
    return total


@ckd
def ckd_angles(own, other):
    """Squared differences of the cosines at a token over its pairs of neighbours: all, within a window of 21."""
    total = 0.0
    for i in range(len(own)):
        j, k = zip(*permutations([n for n in range(len(own)) if n != i], 2), strict=True)
        a, b = (torch.cosine_similarity(x[[*j]] - x[i], x[[*k]] - x[i], dim=-1) for x in (own, other))
        total += (a - b).square().mean()
    return total


def alp_hidden(s, t, weights):
    """Each layer's [CLS] against the teacher's layers' mixed by a softmax of their products with it."""
    layers = torch.stack([hidden[:, 0] for hidden in t.hidden[1:]], 1)
    total = 0.0
    for hidden in s.hidden[1:]:
        shares = torch.einsum("bw,bnw->bn", hidden[:, 0], layers).softmax(-1)
        total += F.mse_loss(hidden[:, 0], (shares[..., None] * layers).sum(1))
    return total


def cheapest_flow(costs):
    """Two layers of mass 1/2 to four of mass 1/4: the best assignment of four halves of layers to four layers."""
    halves = costs.repeat_interleave(2, 0)
    return halves[linear_sum_assignment(halves)].sum() / 4


def transported(cost, items):
    """The flow is that of a micro-batch, whose items weigh as much as they are many."""

    def value(s, t, weights):
        total = 0.0
        for own, other in zip(s.split(MICRO), t.split(MICRO), strict=True):
            costs = [[cost(own, other, m, n, weights) for n in range(1, 5)] for m in (1, 2)]
            total += cheapest_flow(torch.tensor(costs, dtype=torch.float64)) * items(own.real)
        return total / items(s.real)

    return value


def emd_embeddings(s, t, weights):
    return F.mse_loss(projected(weights, "embeddings_0_0", s.hidden[0][s.real]), t.hidden[0][s.real])


emd_hidden = transported(shared_projection_error, lambda real: real.sum())
emd_attention = transported(
    lambda s, t, m, n, weights: score_error(s, t, m, n), lambda real: real.sum(-1).square().sum()
)

# name -> a stage each: the terms with their weights, as published, and the formula of each
REFERENCES = {
    "hinton": [{"task": (0.1, labels), "kd": (0.9, soft_targets(4))}],
    "distilbert": [{"task": (2, labels), "kd": (5, soft_targets(2)), "hidden": (1, distilbert_hidden)}],
    "tinybert": [
        {"hidden": (1, tinybert_hidden), "attention": (1, tinybert_attention)},
        {"kd": (1, soft_targets(2))},  # the paper's T is 1: the preset's notes say why
    ],
    "pkd": [{"task": (0.5, labels), "kd": (0.5, soft_targets(10)), "hidden": (100, pkd_hidden)}],
    "minilm": [{"attention": (1, minilm_attention), "values": (1, minilm_values)}],
    "minilmv2": [
        {name: (1, minilmv2(name[:-1].replace("querie", "query"))) for name in ("queries", "keys", "values")},
        {"kd": (1, soft_targets(2))},  # in place of the paper's fine-tuning on labels
    ],
    "mobilebert": [
        {"hidden": (1, mobilebert_hidden), "attention": (1, mobilebert_attention)},
        {"task": (0.5, labels), "kd": (0.5, soft_targets(1))},
    ],
    "fitnets": [{"hidden": (1, fitnets_hint)}, {"task": (1, labels), "kd": (0.28, soft_targets(3))}],
    "rkd": [{"task": (1, labels), "distance": (25, rkd_distance), "angle": (50, rkd_angle)}],
    "ckd": [
        {
            "task": (0.1, labels),
            "kd": (0.9, soft_targets(3)),
            "pairs": (1, ckd_pairs),
            "angles": (10, ckd_angles),
        }
    ],
    "alp": [{"task": (0.1, labels), "kd": (0.7, soft_targets(20)), "hidden": (0.2, alp_hidden)}],
    "emd": [
        {
            "kd": (1, soft_targets(1)),
            "embeddings": (1, emd_embeddings),
            "hidden": (1, emd_hidden),
            "attention": (1, emd_attention),
        }
    ],
    "distil_whisper": [{"task": (0.8, labels), "kd": (1, soft_targets(2))}],
}
# Presets of the logits alone, which change over time, have tests/test_logit_presets.py.
STAGES = [(name, stage) for name in REFERENCES for stage in range(len(load_preset(name).stages))]


def logged_terms(log):
    return {name.removeprefix("loss_"): value for name, value in log.items() if name.startswith("loss_")}


@pytest.mark.parametrize(("name", "stage"), STAGES, ids=[f"{name}-{stage}" for name, stage in STAGES])
def test_every_term_of_a_preset_is_its_papers(name, stage, tmp_path):
    models, rows = case(name)
    s, t = (look(model, rows, attention=name != "distil_whisper") for model in models)
    config = load_preset(name).stages[stage].config
    trainer = make_trainer(
        tmp_path,
        models=models,
        train_dataset=rows,
        distillation_config=config,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=len(rows) // MICRO,
        max_steps=1,
    )
    modules = {} if trainer._layers is None else trainer._layers.modules.state_dict()
    weights = {key: value.double().clone() for key, value in modules.items()}
    trainer.train()

    published = REFERENCES[name][stage]
    terms = {key: term.weight for key, term in config.terms.items() if term.weight > 0}
    assert terms == {key: weight for key, (weight, _) in published.items()}
    expected = {key: float(formula(s, t, weights)) for key, (_, formula) in published.items()}
    assert min(expected.values()) > 1e-4
    log = trainer.state.log_history[0]
    assert logged_terms(log) == pytest.approx(expected, rel=2e-5)
    assert log["loss"] == pytest.approx(sum(terms[key] * value for key, value in expected.items()), rel=2e-5)


@pytest.mark.parametrize("name", [name for name in preset_names() if len(load_preset(name).stages) > 1])
def test_the_stages_of_a_preset_follow_each_other_in_one_training(name, tmp_path):
    models, rows = case(name)
    steps = 10
    trainer = make_trainer(tmp_path, models=models, train_dataset=rows, preset=name, max_steps=steps)
    trainer.train()
    seen = [{*logged_terms(log)} for log in trainer.state.log_history if "loss" in log]
    first, second = (
        {key for key, term in stage.config.terms.items() if term.weight > 0} for stage in load_preset(name).stages
    )
    share = load_preset(name).stages[0].share
    assert seen == [first if step / steps < share else second for step in range(steps)]
    assert 0 < seen.count(first) < steps


@pytest.mark.parametrize("name", ["pkd", "minilm", "rkd"])
def test_a_preset_by_name_takes_the_step_of_its_config(name, tmp_path):
    losses = []
    for options in ({"preset": name}, {"distillation_config": load_preset(name).config()}):
        models, rows = case(name)
        trainer = make_trainer(tmp_path, models=models, train_dataset=rows, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
