"""What a new user meets with a language model: columns by other names, rows tokenised before, tokens added."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_distill import DistillationTrainer
from tests import tiny
from tests.text.corpus import PLAIN_TEMPLATE, SENTENCES, talk, tokenizer
from tests.text.models import make, pair
from tests.training import SILENT, arguments, logged

LENGTHS = (5, 9, 3, 7, 4, 8, 6, 2)
TOKENS = Dataset.from_list([{"input_ids": [*range(5, 5 + n)], "labels": [-100, *range(6, 5 + n)]} for n in LENGTHS])
TEXTS = Dataset.from_dict({"text": SENTENCES})


def make_trainer(folder, data, models=None, *, collator=None, evaluation=None, made=None, **options):
    student, teacher = models or pair("llama")
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(folder, **options),
        data_collator=collator,
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=made or tokenizer(),
    )


def refusal(folder, data, **options):
    with pytest.raises(ValueError, match=r".") as caught:
        make_trainer(folder, data, **options)
    return str(caught.value)


def texts(*names):
    return Dataset.from_list([{name: f"{name} {text}" for name in names} for text in SENTENCES])


class TestTokenisedRows:
    def test_rows_of_unequal_length_are_padded_with_their_labels(self, tmp_path):
        losses = []
        for collator in (None, DataCollatorForSeq2Seq(tokenizer())):
            trainer = make_trainer(tmp_path, TOKENS, collator=collator, evaluation=TOKENS)
            trainer.train()
            losses.append([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]])
        assert losses[0] == losses[1]

    def test_without_a_teacher_they_train_like_trainer_with_a_collator_for_labels(self, tmp_path):
        ours = make_trainer(tmp_path, TOKENS, kd_weight=0.0, task_weight=1.0)
        plain = Trainer(
            make("llama"),
            TrainingArguments(str(tmp_path), **SILENT),
            DataCollatorForSeq2Seq(tokenizer()),
            TOKENS,
            processing_class=tokenizer(),
        )
        for trainer in (ours, plain):
            trainer.train()
        assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)

    def test_rows_of_an_encoder_and_a_decoder_are_padded_apart(self, tmp_path):
        rows = [{"input_ids": [5, 6, 7, 8][: 1 + n % 4], "labels": [9, 10, 11][: 1 + n % 3]} for n in range(8)]
        models, made = tiny.pair("t5"), tiny.tokenizer([f"w{i}" for i in range(50)])
        trainer = make_trainer(tmp_path, Dataset.from_list(rows), models, made=made)
        trainer.train()
        own = DataCollatorForSeq2Seq(made)
        again = make_trainer(tmp_path, Dataset.from_list(rows), tiny.pair("t5"), made=made, collator=own)
        again.train()
        assert logged(trainer, "loss") == logged(again, "loss")

    def test_their_length_is_a_multiple_where_that_is_asked(self, tmp_path):
        trainer = make_trainer(tmp_path, TOKENS, pad_to_multiple_of=16)
        assert next(iter(trainer.get_train_dataloader()))["labels"].shape == (4, 16)

    def test_an_evaluation_without_labels_says_that_it_has_no_loss(self, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr("hf_distill.evaluation.logger.warning_once", said.append)
        trainer = make_trainer(tmp_path, TOKENS, evaluation=TOKENS.remove_columns("labels"))
        assert "eval_loss" not in trainer.evaluate()
        assert len(said) == 1
        assert "no eval_loss, as no row of this evaluation set has a label" in said[0]
        assert "eval_loss" in trainer.evaluate(TOKENS)
        assert len(said) == 1


class TestColumns:
    @pytest.mark.parametrize(
        ("data", "guess"),
        [
            (Dataset.from_dict({"content": SENTENCES, "id": [*range(5)]}), "dataset_text_field='content'?"),
            (texts("texts", "title"), "Did you mean dataset_text_field='texts'"),
            (texts("prompt"), "dataset_text_field='prompt' learns the prompts themselves"),
            (texts("instruction", "output"), "rename them (Dataset.rename_columns) to prompt and completion"),
            (Dataset.from_dict({"conversations": [talk("a", "b")] * 4}), "rename_column('conversations', 'messages')"),
            ([{"content": text} for text in SENTENCES], "Did you mean dataset_text_field='content'"),
            (texts("content").to_iterable_dataset(), "Did you mean dataset_text_field='content'"),
        ],
        ids=["content", "close", "prompt", "instruction", "conversations", "list", "stream"],
    )
    def test_columns_that_nobody_reads_are_refused_with_a_guess(self, tmp_path, data, guess):
        message = refusal(tmp_path, data)
        assert message.startswith("train_dataset has no column that the student reads (it has ")
        assert "input_ids, or raw text: the column dataset_text_field='text'" in message
        assert guess in message

    def test_beside_text_settings_the_columns_are_what_is_said(self, tmp_path):
        message = refusal(tmp_path, texts("content"), max_length=40, packing=True)
        assert "Did you mean dataset_text_field='content'" in message
        assert "Drop it" not in message

    def test_evaluation_sets_are_looked_at_too(self, tmp_path):
        sets = {"a": TEXTS, "b": texts("content")}
        assert refusal(tmp_path, TEXTS, evaluation=sets).startswith("eval_dataset['b'] has no column")
        with pytest.raises(ValueError, match="eval_dataset has no column"):
            make_trainer(tmp_path, TEXTS).evaluate(sets["b"])

    def test_a_collator_of_the_users_own_needs_the_columns_kept(self, tmp_path):
        assert "set remove_unused_columns=False" in refusal(
            tmp_path, TEXTS, collator=DataCollatorForSeq2Seq(tokenizer())
        )

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [("t5", "Tokenise the rows first, into input_ids and labels"), ("bert-masked", "first, into")],
    )
    def test_other_language_models_read_tokens_alone(self, tmp_path, name, remedy):
        made = tiny.tokenizer([f"w{i}" for i in range(50)])
        assert remedy in refusal(tmp_path, TEXTS, models=tiny.pair(name), made=made)

    def test_texts_without_a_column_are_refused(self, tmp_path):
        assert "The rows of train_dataset are texts" in refusal(tmp_path, SENTENCES)
        assert "[{'text': ...}]" in refusal(tmp_path, SENTENCES)

    @pytest.mark.parametrize(
        ("columns", "ignored"),
        [({"completion": SENTENCES, "prompt": SENTENCES}, "text"), ({"messages": [talk("a", "b")] * 5}, "text")],
    )
    def test_columns_that_are_passed_over_are_named(self, tmp_path, monkeypatch, columns, ignored):
        said = []
        monkeypatch.setattr("hf_distill.text.columns.logger.warning", said.append)
        data = Dataset.from_dict({"text": SENTENCES, **columns})
        make_trainer(tmp_path, data, made=tokenizer(PLAIN_TEMPLATE))
        assert len(said) == 1
        assert said[0].endswith(f"is read, and {ignored} is ignored.")
        make_trainer(tmp_path, data.remove_columns("text"), made=tokenizer(PLAIN_TEMPLATE))
        assert len(said) == 1

    def test_a_text_field_that_is_passed_over_is_refused(self, tmp_path):
        message = refusal(tmp_path, texts("content", "prompt", "completion"), dataset_text_field="content")
        assert message.startswith("dataset_text_field='content': nobody reads this, since the columns of prompt and")
        make_trainer(
            tmp_path, texts("content"), evaluation=texts("prompt", "completion"), dataset_text_field="content"
        )


class TestAddedTokens:
    def test_tokens_without_an_embedding_are_refused(self, tmp_path):
        made, models = tokenizer(), [make("llama"), make("llama", seed=1)]
        made.add_tokens(["<think>"])
        data = Dataset.from_dict({"text": ["<think> the book", *SENTENCES]})
        message = refusal(tmp_path, data, models=models, made=made)
        assert "token 330 ('<think>'), and the student embeds 330 tokens" in message
        assert "model.resize_token_embeddings(len(tokenizer))" in message
        for model in models:
            model.resize_token_embeddings(len(made))
        trainer = make_trainer(tmp_path, data, models=models, made=made)
        trainer.train()
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))

    def test_tokens_that_no_text_has_need_no_embedding(self, tmp_path):
        made = tokenizer()
        made.add_tokens(["<think>"])
        make_trainer(tmp_path, TEXTS, made=made)


def test_prompts_with_a_loss_leave_an_on_policy_student_no_prompt(tmp_path):
    data = texts("prompt", "completion")
    message = refusal(tmp_path, data, completion_only_loss=False, lmbda=0.5)
    assert message.startswith("completion_only_loss=False gives prompts a loss, and lmbda=0.5")


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_kd", False),
        ("kd", False),
        ("eval_held_out_kd", False),
        ("perplexity", False),
        ("eval_perplexity", False),
        ("eval_mse", False),
        ("eval_loss_rare", False),
        ("eval_loss", False),
        ("eval_agreement", True),
        ("eval_f1", True),
        ("kd_agreement", True),
    ],
)
def test_the_best_of_a_distance_is_the_smallest(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_the_checkpoint_nearest_to_the_teacher_is_loaded_at_the_end(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "kd"}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 0.01}
    trainer = make_trainer(tmp_path, TEXTS, evaluation=TEXTS, **best, **saving)
    trainer.train()
    distances = logged(trainer, "eval_kd")
    assert trainer.state.best_metric == min(distances) < max(distances)
    assert trainer.evaluate()["eval_kd"] == pytest.approx(min(distances), rel=1e-5)
    assert torch.isfinite(torch.tensor(distances)).all()
