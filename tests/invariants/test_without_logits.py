"""A training of a language model from its hidden states is the training from its logits."""

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests.invariants.steps import assert_same_steps, longer, recorded, step_options
from tests.tiny import VOCABULARY, ZOO, llama, mixtral, pair, rows

SOFT = {"policy": "adaptive", "signal": "disagreement", "min": 0.5, "max": 3}
HEADS = ("llama", "gpt2", "t5", "bart", "whisper", "bert-masked")


def trainer_of(name, tmp_path, batch=4, accumulation=2, *, models=None, data=None, **options):
    student, teacher = models or pair(name)
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationTrainingArguments(**step_options(tmp_path, batch, accumulation, **options)),
        train_dataset=data or rows(ZOO[name][1]),
    )


def run(trainer, monkeypatch, *, chunked):
    """A recorded training, with a check of which way its terms were formed; None lets it choose the logits."""
    ways = {"_chunked_shares": [], "_dense_shares": []}
    for way, calls in ways.items():
        method = getattr(trainer, way)
        monkeypatch.setattr(trainer, way, lambda *a, c=calls, m=method, **k: c.append(1) or m(*a, **k))
    if chunked is False:
        monkeypatch.setattr(trainer, "_can_be_chunked", lambda *_, **__: False)
    found = recorded(trainer)
    assert bool(ways["_chunked_shares"]) == bool(chunked)
    assert bool(ways["_dense_shares"]) != bool(chunked)
    return found


OPTIONS = [
    {},
    {"task_weight": 0.0},
    {"kd_loss": "jsd", "temperature": 1.0},
    {"kd_loss": "dkd"},
    {"kd_loss": "reverse_kl", "temperature": 4.0, "temperature_schedule": "linear", "temperature_final": 1.0},
]


@pytest.mark.parametrize(
    ("name", "options"),
    # Of the heads of one shape, one has all of the formulas.
    [
        (name, options)
        for name in HEADS
        for options in (OPTIONS if name in ("llama", "t5", "bert-masked") else OPTIONS[:1])
    ],
    ids=str,
)
def test_gradients_and_logs_are_those_of_the_logits(name, options, tmp_path, monkeypatch):
    reference = run(trainer_of(name, tmp_path, **options), monkeypatch, chunked=False)
    assert_same_steps(run(trainer_of(name, tmp_path, **options), monkeypatch, chunked=True), reference)


ON_ITEMS = [
    {"temperature": SOFT},
    {"logit_transform": "standardize", "temperature": SOFT, "kd_loss": "jsd"},
    {
        "temperature": SOFT,
        "kd_loss": "skewed_kl",
        "distillation_config": {"logits": {"temperature_squared": False}},
    },
]
ON_LOGITS = [
    {"temperature": SOFT, "kd_loss": "tvd"},
    {"logit_transform": "standardize"},
    {"teacher_scale": {"kind": "linear", "from": 0.2, "to": 1}, "kd_loss": "reverse_kl"},
    {"temperature": 3.0, "distillation_config": {"logits": {"temperature_squared": False}}},
    {"kd_loss": "tvd", "distillation_config": {"logits": {"temperature_squared": False}}},
    {"kd_loss": "dkd", "task_weight": 0.0},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("llama", options) for options in (*ON_ITEMS, *ON_LOGITS)),
        *((name, options) for name in ("t5", "bert-masked") for options in ON_ITEMS),
    ],
    ids=str,
)
def test_so_are_temperatures_of_items_and_what_is_done_to_the_logits(name, options, tmp_path, monkeypatch):
    runs = [run(trainer_of(name, tmp_path, **options), monkeypatch, chunked=way) for way in (True, False)]
    assert_same_steps(*runs)
    for log, expected in zip(*(each.logs for each in runs), strict=True):
        shown = {name: value for name, value in expected.items() if name.startswith("temperature")}
        assert shown
        assert {name: log.get(name) for name in shown} == pytest.approx(shown, rel=1e-5)


@pytest.mark.parametrize("options", [{"temperature": "flsw"}, {"temperature": "learned"}], ids=str)
def test_a_temperature_that_needs_all_items_or_trains_keeps_the_logits(options, tmp_path, monkeypatch):
    run(trainer_of("llama", tmp_path, **options), monkeypatch, chunked=None)


@pytest.mark.parametrize("split", [(3, 3), (1, 8)])
@pytest.mark.parametrize("name", ["llama", "t5", "bert-masked"])
def test_how_a_batch_is_split_and_padded_does_not_matter(name, split, tmp_path, monkeypatch):
    data, kind = rows(ZOO[name][1]), ZOO[name][1]
    reference = run(trainer_of(name, tmp_path, 8, 1), monkeypatch, chunked=True)
    padded = trainer_of(name, tmp_path, *split, data=longer(data, kind))
    assert_same_steps(run(padded, monkeypatch, chunked=True), reference)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"hidden_weight": 1.0}, {"bf16": True}], ids=str
)
def test_checkpointing_matches_and_autocast(options, tmp_path, monkeypatch):
    runs = [run(trainer_of("llama", tmp_path, **options), monkeypatch, chunked=way) for way in (True, False)]
    if "bf16" not in options:
        assert_same_steps(*runs)
        return
    found, expected = (each.gradients[0] for each in runs)
    assert float((found - expected).norm() / expected.norm()) < 2e-2


def test_a_student_with_adapters_learns_from_its_own_base_and_from_a_teacher(tmp_path, monkeypatch):
    for teacher in (None, pair("llama")[1]):
        runs = []
        for chunked in (True, False):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
            student = peft.get_peft_model(llama(), config)
            runs.append(run(trainer_of("llama", tmp_path, models=(student, teacher)), monkeypatch, chunked=chunked))
        assert_same_steps(*runs)


def test_adapters_on_the_head_keep_the_logits_and_say_why_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_distill.chunked_terms.logger.warning", said.append)
    student = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    trainer = trainer_of("llama", tmp_path, 2, 1, models=(student, pair("llama")[1]))
    trainer.train()
    assert len(said) == 1
    assert "the head of LlamaForCausalLM has an adapter" in said[0]


def test_an_auxiliary_loss_keeps_the_logits(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_distill.chunked_terms.logger.warning", said.append)
    trainer = trainer_of("llama", tmp_path, 2, 1, models=(mixtral(), pair("llama")[1]))
    trainer.train()
    assert trainer._chunked.reason == "the student's own loss is more than the cross-entropy of its logits"
    assert said == [f"Logits of tokens x vocabulary are formed: {trainer._chunked.reason}."]


class Largest(TorchDispatchMode):
    """The most entries that a tensor with the vocabulary as its last dimension had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 and leaf.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, leaf.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("name", ["llama", "t5", "bert-masked"])
def test_no_tensor_of_tokens_by_vocabulary_is_made(name, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.losses.chunked_head._SMALLEST_CHUNK", 4)
    monkeypatch.setattr("hf_distill.losses.chunked_head._CPU_CHUNK_BYTES", 1)
    trainer = trainer_of(name, tmp_path, 8, 1)
    with Largest() as largest:
        trainer.train()
    tokens = sum(row["labels"].numel() for row in rows(ZOO[name][1]))
    assert 0 < largest.rows < tokens  # the most are the rows of a head's weight, transposed


def test_memory_for_logits_is_kept_from_step_to_step_and_not_after_them(tmp_path):
    kept = []

    class Looks(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            kept.append(len(trainer._chunked._workspace._kept))

    trainer = trainer_of("llama", tmp_path, 8, 1, max_steps=3)
    trainer.add_callback(Looks)
    trainer.train()
    assert kept == [2, 2, 2]
    assert not trainer._chunked._workspace._kept


def test_the_student_is_left_without_hooks(tmp_path):
    trainer = trainer_of("llama", tmp_path)
    trainer.train()
    for model in (trainer.model, trainer.teacher.model):
        assert not model.lm_head._forward_hooks
        assert not model.lm_head._forward_pre_hooks
