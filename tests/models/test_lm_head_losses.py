"""Chunked losses on the heads of many families: every divergence, from no item to all of them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_rows import Divergence
from hf_distill.models.lm_head import HeadTap
from tests.losses.variants import SPECS
from tests.models.test_lm_head import FAMILIES, inputs_of, make, tapped

SUITABLE = [spec for spec in SPECS if not (spec.compares_rows or spec.any_classes)]
# Tied and free heads, with a bias, a final bias, a scale and a cap; of causal, masked and encoder-decoder models.
NAMES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "cohere", "granite", "phi", "opt", "falcon", "mamba", "bloom")
NAMES += ("gpt_oss", "t5", "bart", "mbart", "whisper", "bert-masked", "deberta-v2-masked")
TEMPERATURE = 2.0
# Whether each position of (batch, length) is an item.
MASKS = {
    "none": lambda rows, places: (rows < 0).expand(-1, places.shape[-1]),
    "one": lambda rows, places: (rows == 1) & (places == 2),
    "half": lambda rows, places: (rows + places) % 2 == 0,
    "all": lambda rows, places: (rows >= 0).expand(-1, places.shape[-1]),
}


def heads_of(name):
    """What the logits of a family's student and teacher are made of; the student's hidden states are a leaf."""
    sides = []
    for seed in (0, 1):
        model = make(name)
        if seed:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        tap, inputs = HeadTap(model), inputs_of(model, FAMILIES[name])
        with torch.no_grad():
            tap.verify(model, inputs)
            sides.append(tapped(tap, model, inputs)[1])
    student, teacher = (replace(side, hidden=side.hidden[:3]) for side in sides)
    student.hidden.requires_grad_()
    return student, teacher


def dense_loss(student, teacher, divergence, targets, mask):
    """The sum over the items of half of each term, from the logits of all positions."""
    logits, classes = student.dense(), len(student.weight)
    cross_entropy = F.cross_entropy(logits.view(-1, classes), targets.flatten(), reduction="none").view(targets.shape)
    temperature = torch.full(targets.shape, TEMPERATURE)
    values = divergence(logits, teacher.dense().detach(), temperature=temperature, targets=targets)
    return torch.where(mask, cross_entropy + values, 0.0).sum() / 2


@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_on_every_share_of_the_items_is_the_dense_one(name, monkeypatch):
    monkeypatch.setattr("hf_distill.losses.chunked_head._SMALLEST_CHUNK", 16)
    monkeypatch.setattr("hf_distill.losses.chunked_head._CPU_CHUNK_BYTES", 1)
    student, teacher = heads_of(name)
    rows, places = (torch.arange(size) for size in student.hidden.shape[:2])
    targets = (rows[:, None] * 7 + places * 3) % len(student.weight)
    leaves = [leaf for leaf in (student.hidden, student.weight, student.bias) if leaf is not None]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    # Each divergence on half of the items and, of a family in its turn, on each other share.
    turn = NAMES.index(name)
    cases = [(spec, share) for at, spec in enumerate(SUITABLE) for share in ("half", [*MASKS][(turn + at) % 4])]
    for spec, share in dict.fromkeys(cases):
        divergence = Divergence(spec)
        mask = MASKS[share](rows[:, None], places[None])
        weights = mask.float() / 2
        options = {"temperature": TEMPERATURE, "divergence": divergence}
        found = chunked_head_loss(student, teacher, targets, task_weights=weights, kd_weights=weights, **options).loss
        expected = dense_loss(student, teacher, divergence, targets, mask)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12), (spec.name, share)
        gradients = (torch.autograd.grad(loss, leaves) for loss in (found, expected))
        for gradient, wanted in zip(*gradients, strict=True):
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), (spec.name, share)


def test_the_families_and_divergences_are_as_many_as_they_should_be():
    assert len({*NAMES} & {*FAMILIES}) >= 15
    assert len(SUITABLE) >= 15
