"""`layer_mapping="copied"` pairs each layer of a student with the teacher layer that its weights came from."""

import warnings

import pytest
import torch

from hf_distill import build_student
from tests import tiny
from tests.training import logged, make_trainer

COPIED = {"hidden_weight": 1.0, "attention_weight": 1.0, "layer_mapping": "copied"}


def models(name="bert", *, layers):
    torch.manual_seed(0)
    teacher = tiny.ZOO[name][0](layers=6)
    return build_student(teacher, layers=layers).model, teacher


def pairs_of(trainer, match=0, stack=0):
    pairs = trainer._layers.plan.matches[match].stacks[stack].pairs
    return [(pair.student.layer, pair.teacher.layer) for pair in pairs]


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_layers_are_paired_with_their_originals(name, tmp_path):
    trainer = make_trainer(tmp_path, name, models=models(name, layers=[0, 2, 5]), **COPIED)
    assert pairs_of(trainer) == [(0, 0), (1, 1), (2, 3), (3, 6)]
    assert pairs_of(trainer, 1) == [(1, 1), (2, 3), (3, 6)]
    trainer.train()
    assert logged(trainer, "loss_hidden")[0] > 0


def test_each_stack_has_its_own_pairs(tmp_path):
    student, teacher = models("t5", layers={"encoder": [1, 4], "decoder": [0]})
    trainer = make_trainer(tmp_path, "t5", models=(student, teacher), **COPIED)
    assert pairs_of(trainer, stack=0) == [(0, 0), (1, 2), (2, 5)]
    assert pairs_of(trainer, stack=1) == [(0, 0), (1, 1)]


def test_a_student_that_was_trained_since_is_still_recognised(tmp_path):
    student, teacher = models(layers=[0, 2, 5])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0)
    assert pairs_of(make_trainer(tmp_path, models=(student, teacher), **COPIED)) == [(0, 0), (1, 1), (2, 3), (3, 6)]


def test_a_student_of_other_origin_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer 1 of the student .* is like none of the teacher's"):
        make_trainer(tmp_path, "bert", **COPIED)


def test_a_map_that_leads_copies_astray_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"layer 1 of the student is a copy of the teacher's layer 1, .*learns from"):
        make_trainer(tmp_path, models=models(layers=[0, 2, 5]), hidden_weight=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, models=models(layers=[1, 3, 5]), hidden_weight=1.0)
