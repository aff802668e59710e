"""Packed, padding-free and padded batches are the same training."""

import pytest
import torch
from datasets import Dataset

from hf_distill import DistillationTrainer
from tests.text.corpus import PLAIN_TEMPLATE, SENTENCES, talk, tokenizer
from tests.text.models import FAMILIES, make, mixtral, pair
from tests.training import GradientRecorder, arguments

WAYS = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True},
    "packed, padding-free": {"packing": True, "padding_free": True},
}
TEXTS = Dataset.from_list([{"text": " ".join(SENTENCES[i % 5].split()[: 2 + i])} for i in range(8)])
# The last answer is cut off, so that one row has no label.
TALKS = Dataset.from_list(
    [
        *({"messages": talk(SENTENCES[i % 5], SENTENCES[i % 3][: 5 + 4 * i])} for i in range(5)),
        {"messages": talk(" ".join(SENTENCES), "yes")},
    ]
)


def trained(folder, name="llama", way="padded", *, data=TEXTS, models=None, **options):
    """A trainer after one step over all rows, with the student's gradient."""
    student, teacher = models or pair(name)
    options = {"max_length": 40, "per_device_train_batch_size": 8, "max_steps": 1, **WAYS[way], **options}
    args = arguments(folder, learning_rate=0.0, **options)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        processing_class=tokenizer(PLAIN_TEMPLATE),
    )
    gradients = GradientRecorder()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.state.log_history[0], gradients.steps[0]


def assert_same(one, other):
    for name in ("loss", "loss_task", "loss_kd", *(key for key in one[0] if key.startswith("loss_m_"))):
        assert other[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    scale = max(float(gradient.abs().max()) for gradient in one[1].values())
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "padded"])
def test_loss_and_gradient_are_those_of_one_row_per_sequence(tmp_path, name, way):
    one = trained(tmp_path, name, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same(one, trained(tmp_path, name, way))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "padded"])
@pytest.mark.filterwarnings("ignore:1 of the 6 rows")
def test_answers_alone_are_learned_in_every_form(tmp_path, way):
    one = trained(tmp_path, data=TALKS)
    other = trained(tmp_path, way=way, data=TALKS)
    assert_same(one, other)
    assert one[0]["labelled_fraction"] == pytest.approx(5 / 6)
    assert other[0]["labelled_fraction"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "padded"])
def test_micro_batches_of_packed_rows_make_the_same_step(tmp_path, way):
    rows = 2 if WAYS[way].get("packing") else 4
    one = trained(tmp_path, way=way)
    assert_same(one, trained(tmp_path, way=way, per_device_train_batch_size=rows, gradient_accumulation_steps=2))


def test_the_balance_of_experts_is_that_of_padded_batches(tmp_path):
    one = trained(tmp_path, models=(mixtral(32, 2), make("llama")))
    assert_same(one, trained(tmp_path, way="packed, padding-free", models=(mixtral(32, 2), make("llama"))))


def test_rows_may_be_longer_than_a_table_of_positions_that_their_texts_fit_into(tmp_path):
    one = trained(tmp_path, "gpt2")
    assert_same(one, trained(tmp_path, "gpt2", way="packed", max_length=70, pad_to_multiple_of=64))


def test_texts_that_saw_each_other_would_be_noticed(tmp_path, monkeypatch):
    from hf_distill import text_setup

    monkeypatch.setattr(text_setup, "check_keeps_apart", lambda *args, **options: None)
    models = make("falcon"), make("falcon", seed=1, hidden=48)
    one = trained(tmp_path, models=models)
    other = trained(tmp_path, way="packed", models=(make("falcon"), make("falcon", seed=1, hidden=48)))
    assert other[0]["loss_kd"] != pytest.approx(one[0]["loss_kd"], rel=1e-3)


def test_cut_texts_lose_the_tokens_that_begin_a_row_and_no_others(tmp_path):
    args = {"packing_strategy": "wrapped", "max_length": 16}
    log, _ = trained(tmp_path, way="packed", data=TEXTS, num_train_epochs=1, **args)
    assert log["labelled_fraction"] > 0.8


@pytest.mark.parametrize("way", ["padding-free", "packed, padding-free"])
def test_matches_of_tokens_are_the_same_too(tmp_path, way):
    config = {
        "task": {"weight": 0.5},
        "logits": {"weight": 0.5},
        "matches": [
            {"name": "m_hidden", "student": "hidden[*]", "loss": "hidden_mse"},
            {"name": "m_last", "student": "hidden[-1]", "loss": "hidden_cosine", "mask": "task"},
            {"name": "m_attention", "student": "attention_probs[*]", "loss": "attention_kl"},
        ],
    }
    one = trained(tmp_path, distillation_config=config)
    other = trained(tmp_path, way=way, distillation_config=config)
    assert_same(one, other)
    assert other[0]["loss_m_attention"] > 0


def test_weights_of_words_groups_and_columns_go_with_their_texts(tmp_path):
    data = TEXTS.add_column("share", [0.5, 1.0, 2.0, 1.0] * 2).add_column("kind", ["a", "b"] * 4)
    weights = [
        {"by": "phrases", "phrases": ["ship", "the old"], "boost": 2.0},
        {"by": "column", "column": "share"},
        {"by": "group", "column": "kind", "weights": {"a": 1.0, "b": 3.0}},
        {"by": "teacher", "signal": "confidence"},
    ]
    one = trained(tmp_path, data=data, item_weights=weights)
    other = trained(tmp_path, way="padding-free", data=data, item_weights=weights)
    assert_same(one, other)
    assert one[0]["item_weight"] == pytest.approx(other[0]["item_weight"], rel=1e-5)
    plain = trained(tmp_path)
    assert one[0]["loss_kd"] != pytest.approx(plain[0]["loss_kd"], rel=1e-3)
