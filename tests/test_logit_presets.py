"""Presets of the logits alone minimise what their papers do, at every moment of a training, in float64.

Nothing learns here (learning rate 0): a step differs from the one before it only by what a preset changes over time.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_distill import DistillationTrainingArguments
from hf_distill.presets import load_preset, preset_names
from tests import tiny
from tests.matches import look, pair_of
from tests.test_presets_against_papers import REFERENCES as WITH_LAYERS
from tests.test_presets_against_papers import logged_terms
from tests.training import logged, make_trainer

SIZES = ({"hidden": 32, "layers": 2}, {"hidden": 48, "layers": 4})
MICRO, STEPS = 4, 10
LANGUAGE_MODELS = ("distillm", "akl")


def distributions(s, t, temperature):
    return ((x / temperature).softmax(-1) for x in (s, t))


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def decoupled(s, t, labels):
    """Eq. 7 from probabilities: alpha 1, beta 8, T 4."""
    q, p = distributions(s, t, 4)
    is_label = F.one_hot(labels, p.shape[-1]).bool()
    own, taught = q[is_label], p[is_label]
    about_label = kl(torch.stack([taught, 1 - taught], -1), torch.stack([own, 1 - own], -1))
    others, others_taught = (x[~is_label].view(len(x), -1) / (1 - x[is_label])[:, None] for x in (q, p))
    return 16 * (about_label + 8 * kl(others_taught, others)).mean()


def correlations(s, t, labels):
    """Eq. 6-10 with numpy's own correlation: rows and columns, weights of 2, T 4; a mean over micro-batches."""
    values = []
    for own, taught in zip(s.split(MICRO), t.split(MICRO), strict=True):
        q, p = distributions(own, taught, 4)
        for pairs in (zip(q, p, strict=True), zip(q.T, p.T, strict=True)):
            values.append(torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())
    return 16 * 2 * torch.stack(values).sum() / (len(s) / MICRO)


def standardized(s, t, labels):
    """Algorithm 1: z-scores of both, KL at T 2."""
    q, p = distributions(*((x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) for x in (s, t)), 2)
    return 4 * kl(p, q).mean()


def curriculum(s, t, labels):
    """At the first T, which nothing has moved: 1 + 20 sigmoid(1)."""
    temperature = 1 + 20 / (1 + math.exp(-1))
    q, p = distributions(s, t, temperature)
    return temperature**2 * kl(p, q).mean()


def skewed(s, t, labels):
    q, p = distributions(s, t, 1)
    return kl(q, 0.1 * q + 0.9 * p).mean()


def adaptive(s, t, labels):
    """Both directions, weighted by the gaps in the head, at most half of the teacher's probability, and the tail."""
    q, p = distributions(s, t, 1)
    order = p.argsort(-1, descending=True)
    gaps = (p - q).abs().gather(-1, order)
    in_head = p.gather(-1, order).cumsum(-1) <= 0.5
    in_head[..., 0] = True
    share = (gaps * in_head).sum(-1) / gaps.sum(-1)
    return (share * kl(p, q) + (1 - share) * kl(q, p)).mean()


def annealed(progress):
    """T_max 7: phi = 1 - (T - 1) / 7 at T = 7, 6, ... 1, a tenth of the training each."""
    phi = 1 - (7 - math.floor(10 * progress) - 1) / 7
    return lambda s, t, labels: F.mse_loss(s, phi * t)


# name -> the terms at a share of the training: weight and formula; the labels' cross-entropy is named alone
REFERENCES = {
    "dkd": lambda progress: {"task": 1, "kd": (min(progress / 0.083, 1), decoupled)},
    "dist": lambda progress: {"task": 1, "kd": (1, correlations)},
    "lskd": lambda progress: {"task": 0.1, "kd": (9, standardized)},
    "ctkd": lambda progress: {"task": 0.1, "kd": (0.9, curriculum)},
    "annealing_kd": lambda progress: {"kd": (1, annealed(progress))} if progress < 0.7 else {"task": 1},
    "distillm": lambda progress: {"kd": (1, skewed)},
    "akl": lambda progress: {"kd": (1, adaptive)},
}


def case(name):
    """The models, the rows, and student's and teacher's logits with the class of each item."""
    is_language = name in LANGUAGE_MODELS
    models = pair_of(tiny.llama if is_language else tiny.bert, *SIZES)
    rows = tiny.rows("causal" if is_language else "sequence")
    s, t = (look(model, rows, attention=False) for model in models)
    if not is_language:
        return models, rows, (s.logits, t.logits, s.labels)
    labels = s.labels[:, 1:]
    return models, rows, (s.logits[:, :-1][labels >= 0], t.logits[:, :-1][labels >= 0], labels[labels >= 0])


def trained(name, tmp_path, models, rows, **options):
    trainer = make_trainer(
        tmp_path,
        models=models,
        train_dataset=rows,
        preset=name,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=len(rows) // MICRO,
        max_steps=STEPS,
        **{"learning_rate": 0.0, **options},
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", REFERENCES)
def test_every_step_of_a_preset_is_its_papers(name, tmp_path):
    models, rows, (s, t, labels) = case(name)
    trainer = trained(name, tmp_path, models, rows)
    for step, log in enumerate(trainer.state.log_history[:STEPS]):
        total, expected = 0.0, {}
        for term, published in REFERENCES[name](step / STEPS).items():
            weight, formula = (
                published if term == "kd" else (published, lambda s, t, labels: F.cross_entropy(s, labels))
            )
            if weight:
                expected[term] = float(formula(s, t, labels))
                total += weight * expected[term]
        assert min(expected.values()) > 1e-3
        # A KL in float32 is good to about 1e-7, which T squared makes 1e-5 at CTKD's temperatures.
        assert logged_terms(log) == pytest.approx(expected, rel=2e-5, abs=1e-5)
        assert log["loss"] == pytest.approx(total, rel=2e-5, abs=1e-5)


# What the pages say may be given beside a preset.
BESIDE = {
    "dkd": ({"kd_options": {"alpha": 1, "beta": 2}}, {"options": {"alpha": 1, "beta": 2}, "temperature": 4}),
    "dist": ({"temperature_squared": False}, {"temperature_squared": False, "options": {"inter": 2, "intra": 2}}),
    "distillm": ({"kd_loss": "skewed_kl"}, {"loss": "skewed_kl", "options": {}}),
    "hinton": ({"logit_transform": "standardize"}, {"transform": "standardize", "temperature": 4}),
    "ctkd": ({"temperature": 4}, {"temperature": 4, "weight": 0.9}),
    "akl": ({"task_weight": 0.5}, {"loss": "adaptive_kl", "weight": 1}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_given_beside_a_preset_wins_and_the_rest_stays(name):
    given, expected = BESIDE[name]
    term = DistillationTrainingArguments("out", preset=name, **given).distillation.logits
    assert {field: getattr(term, field) for field in expected} == expected


def test_every_preset_is_held_to_its_paper():
    assert {*WITH_LAYERS, *REFERENCES} == {*preset_names()}


def test_the_temperature_of_ctkd_starts_as_in_the_authors_code_and_climbs_the_students_loss(tmp_path):
    models, rows, (s, t, _) = case("ctkd")
    trainer = trained("ctkd", tmp_path, models, rows, learning_rate=1e-6)
    temperatures = logged(trainer, "temperature")
    start = 1 + 20 / (1 + math.exp(-1))
    assert temperatures[0] == pytest.approx(start)

    def loss(temperature):
        q, p = distributions(s, t, temperature)
        return temperature**2 * kl(p, q).mean()

    rises_with_temperature = bool(loss(start + 0.01) > loss(start))
    assert (temperatures[-1] > temperatures[0]) == rises_with_temperature
    assert temperatures[-1] != temperatures[0]


@pytest.mark.parametrize("name", ["dkd", "dist", "lskd"])
def test_a_preset_that_needs_three_classes_says_so_and_refuses_two(name, tmp_path):
    assert "three classes or more" in load_preset(name).notes
    models = tuple(tiny.bert(num_labels=2, **size) for size in SIZES)
    rows = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("sequence")]
    with pytest.raises(ValueError, match=r"here are 2|any 2 logits"):
        trained(name, tmp_path, models, rows)
