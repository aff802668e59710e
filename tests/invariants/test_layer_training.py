"""A training with terms between layers: resumed, exported, checkpointed, compiled, evaluated in between."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import assert_same_steps, distil, with_dropout
from tests.invariants.test_layer_exactness import config
from tests.invariants.test_resume import PLAN, STEPS, STOP, adapted_llama
from tests.training import SILENT, logged

LAYERS = {"hidden_weight": 1.0, "attention_weight": 1.0}
# The adapter's base is as wide as it: only `when: always` gives it a projection.
PROJECTED = {
    "distillation_config": config(
        {"student": "hidden[*]", "loss": "hidden_mse", "projection": {"when": "always", "learning_rate_factor": 3.0}},
        {"student": "attention_scores[*]", "loss": "attention_mse"},
    )
}


def trainer_of(name, output_dir, **changes):
    student, teacher = adapted_llama() if name == "llama with LoRA" else tiny.pair(name)
    return DistillationTrainer(
        student if name == "llama with LoRA" else with_dropout(student),
        DistillationTrainingArguments(output_dir=output_dir, **{**PLAN, **PROJECTED, **changes}),
        teacher_model=teacher,
        train_dataset=tiny.rows("sequence" if name == "bert" else "causal", count=16),
        eval_dataset=tiny.rows("sequence" if name == "bert" else "causal", count=4),
    )


@pytest.mark.parametrize("name", ["bert", "llama", "llama with LoRA"])
def test_a_resumed_training_ends_with_the_same_bits(name, output_dir):
    whole = trainer_of(name, output_dir)
    before = {key: value.clone() for key, value in whole._layers.modules.state_dict().items()}
    whole.train()
    checkpoint = Path(output_dir, f"checkpoint-{STOP}")
    saved = load_file(checkpoint / "distillation_modules.safetensors")
    assert any(not torch.equal(saved[key], before[key]) for key in before), "the projections do not learn"
    resumed = trainer_of(name, output_dir)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (whole, resumed)]
    assert logs[0][STOP:] == logs[1][STOP:]
    for part in ("model", "modules"):
        one, other = ((t.model if part == "model" else t._layers.modules).state_dict() for t in (whole, resumed))
        assert [*one] == [*other]
        for key, value in one.items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_exported_student_holds_nothing_of_the_layers(name, output_dir):
    trainer = DistillationTrainer(
        *(
            [
                tiny.pair(name)[0],
                DistillationTrainingArguments(
                    output_dir, **SILENT | {"save_strategy": "steps", "save_steps": 1}, **LAYERS
                ),
            ]
        ),
        teacher_model=tiny.pair(name)[1],
        train_dataset=tiny.rows(tiny.ZOO[name][1]),
    )
    trainer.train()
    trainer.save_model()
    names = {key for key, _ in tiny.pair(name)[0].named_parameters()}
    assert {key for key, _ in trainer.model.named_parameters()} == names
    assert not trainer.model._forward_hooks
    for folder in (output_dir, f"{output_dir}/checkpoint-1"):
        assert not any("distillation" in key for key in load_file(f"{folder}/model.safetensors"))
        assert "distill" not in Path(folder, "config.json").read_text(encoding="utf-8")
        _, info = type(trainer.model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    assert Path(output_dir, "checkpoint-1", "distillation_modules.safetensors").is_file()
    assert not Path(output_dir, "distillation_modules.safetensors").exists()


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_activation_checkpointing_takes_the_same_step(name, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    plain = distil(tiny.pair(name), rows, output_dir, **LAYERS)
    assert_same_steps(distil(tiny.pair(name), rows, output_dir, activation_checkpointing=True, **LAYERS), plain)


@pytest.mark.parametrize(("name", "backend"), [("bert", "aot_eager"), ("llama", "eager")])
def test_a_compiled_student_takes_the_same_step(name, backend, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    plain = distil(tiny.pair(name), rows, output_dir, 4, 2, **LAYERS)
    options = {"torch_compile": True, "torch_compile_backend": backend, **LAYERS}
    compiled = distil(tiny.pair(name), rows, output_dir, 4, 2, **options)
    assert_same_steps(compiled, plain)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper", "wav2vec2-ctc"])
def test_a_weight_too_small_to_matter_leaves_the_steps_of_the_other_terms(name, output_dir):
    """Recording changes nothing: with a vanishing weight the student takes the steps of one that is not recorded."""
    rows = tiny.rows(tiny.ZOO[name][1])
    plain = distil(tiny.pair(name), rows, output_dir)
    recorded = distil(tiny.pair(name), rows, output_dir, hidden_weight=1e-30, attention_weight=1e-30)
    gradient = recorded.gradients[0][: len(plain.gradients[0])]  # the projections' come last
    torch.testing.assert_close(gradient, plain.gradients[0], rtol=0, atol=1e-25)
    assert recorded.logs[0]["loss"] == plain.logs[0]["loss"]


def test_terms_are_on_in_their_window_alone(output_dir):
    terms = config({"student": "hidden[*]", "loss": "hidden_mse", "active": [0, 0.5]}, task=0.5, kd=0.5)
    terms["logits"]["active"] = [0.5, 1]
    terms["task"]["active"] = [0.5, 1]
    rows = tiny.rows("sequence", count=16)
    run = distil(tiny.pair("bert"), rows, output_dir, 4, distillation_config=terms)
    for number, log in enumerate(run.logs):
        first_half = number < 2
        assert ("loss_match_0" in log) == first_half
        assert ("loss_kd" in log, "loss_task" in log) == (not first_half, not first_half)
    assert len(run.logs) == 4


def test_a_part_of_the_training_without_terms_is_refused(output_dir):
    terms = config({"student": "hidden[*]", "loss": "hidden_mse", "active": [0, 0.5]}, task=0.0, kd=0.0)
    with pytest.raises(ValueError, match=r"No term is active between 50% and 100%"):
        distil(tiny.pair("bert"), tiny.rows("sequence"), output_dir, distillation_config=terms)


def test_evaluation_in_between_changes_no_step(output_dir):
    def train(**changes):
        rows, options = tiny.rows("sequence", count=16), {**SILENT, **LAYERS, "max_steps": 4, **changes}
        student, teacher = tiny.pair("bert")
        trainer = DistillationTrainer(
            student,
            DistillationTrainingArguments(output_dir, **options),
            teacher_model=teacher,
            train_dataset=rows,
            eval_dataset=rows[:4],
        )
        trainer.train()
        return trainer

    evaluated, without = train(eval_strategy="steps", eval_steps=1), train()
    assert logged(evaluated, "loss") == logged(without, "loss")
    assert len(logged(evaluated, "eval_kd")) == 4
    assert {"eval_loss", "eval_kd", "eval_agreement"} <= {*evaluated.evaluate()}


def test_a_second_training_goes_on_with_the_projections(output_dir):
    trainer = trainer_of("bert", output_dir, max_steps=2, save_strategy="no")
    trainer.train()
    first = {key: value.clone() for key, value in trainer._layers.modules.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(value, first[key]) for key, value in trainer._layers.modules.state_dict().items())


def test_an_optimizer_made_before_the_projections_is_refused(output_dir):
    student, teacher = tiny.pair("bert")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(output_dir, **SILENT, **LAYERS),
        teacher_model=teacher,
        train_dataset=tiny.rows("sequence"),
        optimizers=(optimizer, None),
    )
    with pytest.raises(ValueError, match="would never train"):
        trainer.train()


def test_projections_have_their_own_learning_rate(output_dir):
    trainer = trainer_of("bert", output_dir, max_steps=1, save_strategy="no")
    trainer.train()
    own = {id(parameter) for parameter in trainer._layers.modules.parameters()}
    rates = {
        group["initial_lr"] for group in trainer.optimizer.param_groups if any(id(p) in own for p in group["params"])
    }
    assert rates == {3.0 * PLAN["learning_rate"]}


def test_a_search_that_changes_the_matches_plans_them_anew(output_dir):
    trainer = DistillationTrainer(
        tiny.pair("bert")[0],
        DistillationTrainingArguments(output_dir, **SILENT),
        teacher_model=tiny.pair("bert")[1],
        train_dataset=tiny.rows("sequence"),
    )
    trainer.args.hidden_weight = 1.0
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "loss_hidden"))
    assert len(logged(trainer, "loss_hidden")) == 2


def test_student_and_teacher_of_one_config_object_are_told_apart(output_dir):
    config_of_both = tiny.bert().config
    torch.manual_seed(0)
    student, teacher = (hf.BertForSequenceClassification(config_of_both) for _ in range(2))
    run = distil((student, teacher), tiny.rows("sequence"), output_dir, **LAYERS)
    assert run.logs[0]["loss_attention"] > 0
    assert run.logs[0]["loss_hidden"] > 0
