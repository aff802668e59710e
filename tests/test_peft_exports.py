"""What a student with adapters leaves on the disk, and how a run goes on from there."""

import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.invariants.steps import assert_same_steps, recorded
from tests.tiny import llama, pair, rows
from tests.training import batch_of, logged, make_trainer

BODY = ["q_proj", "v_proj"]
# name -> (the config, what may be in the adapter's file)
KINDS = {
    "lora": (lambda: peft.LoraConfig(r=2, target_modules=BODY), ("lora_",)),
    "dora": (lambda: peft.LoraConfig(r=2, target_modules=BODY, use_dora=True), ("lora_",)),
    "ia3": (peft.IA3Config, ("ia3_",)),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3), ("prompt_embeddings",)),
    "head": (lambda: peft.LoraConfig(r=2, target_modules=BODY, modules_to_save=["lm_head"]), ("lora_", "lm_head")),
    "embeddings": (
        lambda: peft.LoraConfig(r=2, target_modules=BODY, modules_to_save=["embed_tokens"]),
        ("lora_", "embed_tokens"),
    ),
    "tokens": (
        lambda: peft.LoraConfig(r=2, target_modules=BODY, trainable_token_indices=[20, 26, 60]),
        ("lora_", "trainable_tokens_delta"),
    ),
}


def saved_base(folder, **options):
    torch.manual_seed(0)
    llama(**options).save_pretrained(folder)
    return hf.LlamaForCausalLM.from_pretrained(folder)


def student_of(folder, kind, *, tied=False, teacher="pair", **options):
    """A trainer whose student was saved in `folder`/base and has adapters of a kind."""
    base = saved_base(folder / "base", tie_word_embeddings=tied)
    models = (base, pair("llama")[1] if teacher == "pair" else None)
    options = {"learning_rate": 0.05, "peft_config": KINDS[kind][0](), **options}
    return make_trainer(folder / "run", "llama", models=models, **options)


def logits(model):
    batch = {name: value for name, value in batch_of(rows("causal")).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_alone_is_saved_and_loads_without_us(kind, tied, tmp_path):
    # With a projection and a learned temperature beside the student, of which nothing may be exported.
    extra = {"preset": "ctkd", "hidden_weight": 0.1} if kind == "lora" else {}
    trainer = student_of(tmp_path, kind, tied=tied, save_strategy="steps", save_steps=2, **extra)
    base, expected = logits(saved_base(tmp_path / "other", tie_word_embeddings=tied)), KINDS[kind][1]
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trained = logits(trainer.model)
    assert not torch.allclose(trained, base, atol=1e-3)
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
        weights = load_file(folder / "adapter_model.safetensors")
        assert all(any(mark in name for mark in expected) for name in weights), [*weights]
        assert all(any(mark in name for name in weights) for mark in expected)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        own = {"distillation_modules.safetensors"} if extra and folder.name != "final" else set()
        assert {file.name for file in folder.glob("*.safetensors")} == {"adapter_model.safetensors"} | own
        assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder)), trained)
        twin = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(logits(peft.PeftModel.from_pretrained(twin, folder)), trained)


PLAN = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "random",
    "lr_scheduler_type": "linear",
}


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "head", "tokens"])
def test_a_resumed_training_ends_with_the_same_bits(kind, tmp_path):
    options = {**PLAN, "hidden_weight": 0.1, "teacher": None if kind == "head" else "pair"}
    whole = student_of(tmp_path, kind, **options)
    whole.train()
    resumed = student_of(tmp_path, kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [*found] == [*expected]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    # The worst by the loss, which is not the last.
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    trainer = student_of(tmp_path, "head", **{**PLAN, **best, "metric_for_best_model": "eval_loss"})
    trainer.train()
    step = trainer.state.best_global_step
    assert step < 4
    adapter = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    assert torch.equal(logits(trainer.model), logits(adapter))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("teacher", ["pair", None], ids=["teacher", "base"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["head", "embeddings", "prefix", "tokens"])
def test_a_step_without_logits_is_the_step_with_them(kind, tied, teacher, tmp_path, monkeypatch):
    runs, reasons = [], []
    for chunked in (True, False):
        bare = {"optim": "sgd", "learning_rate": 1e-3}
        trainer = student_of(tmp_path, kind, tied=tied, teacher=teacher, **bare)
        if not chunked:
            monkeypatch.setattr(trainer, "_can_be_chunked", lambda *args, **kwargs: False)
        runs.append(recorded(trainer))
        reasons.append(trainer._chunked.reason)
    assert_same_steps(*runs)
    # A tied head's few trained rows are no plain weight.
    assert (reasons[0] is None) == (kind != "tokens" or not tied)
