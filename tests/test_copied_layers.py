"""`layer_mapping="copied"` pairs each layer of a student with the teacher layer that its weights came from."""

import warnings

import pytest
import torch

from hf_distill import build_student, run_stages
from hf_distill.stages import preset_stages
from tests import tiny
from tests.training import arguments, logged, make_trainer

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
        make_trainer(tmp_path, models=(tiny.bert(), tiny.bert(layers=3)), **COPIED)


def test_a_map_that_leads_copies_astray_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"Layer 1 of the student .*is a copy of the teacher's layer 1, .*learns"):
        make_trainer(tmp_path, models=models(layers=[0, 2, 5]), hidden_weight=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, models=models(layers=[1, 3, 5]), hidden_weight=1.0)


def test_a_student_that_is_narrower_too_is_told_to_write_the_pairs(tmp_path):
    torch.manual_seed(0)
    teacher = tiny.bert(hidden=48, layers=4)
    student = build_student(teacher, layers=2, hidden_size=24).model
    with pytest.raises(ValueError, match=r"cut narrower too.*Write the pairs"):
        make_trainer(tmp_path, models=(student, teacher), **COPIED)


def test_pairs_counted_from_zero_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"of 1, 2, \.\.\.\) is a copy of the teacher's layer 1, .*explicit map"):
        make_trainer(tmp_path, models=models(layers=[0, 2, 5]), hidden_weight=1.0, layer_mapping={0: 0, 1: 2, 2: 5})


def test_the_stages_of_a_preset_take_a_map_and_epochs_where_they_are_read():
    first, second = preset_stages("tinybert", layer_mapping="copied", num_train_epochs=1)
    assert (first.training["layer_mapping"], first.training["num_train_epochs"]) == ("copied", 1)
    assert "layer_mapping" not in second.training
    assert second.training == {"learning_rate": 3.0e-5, "num_train_epochs": 1}


def test_a_preset_by_name_warns_of_what_it_sets_in_place_of_the_arguments(tmp_path):
    student, teacher = models(layers=[0, 2, 5])
    with pytest.warns(UserWarning, match=r"whatever args say: intermediate: learning_rate=5e-05; intermediate: num_t"):
        with pytest.raises(TypeError, match="no_such_argument"):
            run_stages(
                "tinybert",
                model=student,
                teacher_model=teacher,
                args=arguments(tmp_path),
                train_dataset=tiny.rows("sequence"),
                no_such_argument=1,
            )


def test_a_checkpoint_with_projections_is_not_resumed_without_the_terms(tmp_path):
    with_terms = make_trainer(tmp_path, hidden_weight=1.0, save_strategy="steps", save_steps=1)
    with_terms.train()
    with pytest.raises(ValueError, match=r"written with terms between layers, .*, which are off now"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_teacher_that_reads_something_else_is_refused_with_what_it_reads(tmp_path):
    student, teacher = tiny.pair("bert")[0], tiny.pair("vit")[1]
    with pytest.raises(ValueError, match=r"reads pixel_values, but the batch has input_ids.*teacher_pixel_values"):
        make_trainer(tmp_path, models=(student, teacher)).train()
