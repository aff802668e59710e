import json

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.text.corpus import PLAIN_TEMPLATE, SENTENCES, talk, tokenizer
from tests.text.models import make, mixtral, pair
from tests.training import arguments, logged

ROWS = [{"text": " ".join(SENTENCES[i % 5].split()[: 2 + i])} for i in range(8)]
TEXTS = Dataset.from_list(ROWS)
TOKENS = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8)


def make_trainer(folder, models=None, **options):
    student, teacher = models or pair("llama")
    trainer_options = {"train_dataset": TEXTS, "processing_class": tokenizer()}
    names = (*trainer_options, "eval_dataset", "data_collator", "teacher_model", "model_init")
    trainer_options |= {name: options.pop(name) for name in names if name in options}
    args = arguments(folder, **{"max_length": 40, **options})
    return DistillationTrainer(
        model=None if "model_init" in trainer_options else student,
        args=args,
        **{"teacher_model": teacher, **trainer_options},
    )


def refused(folder, match, **options):
    with pytest.raises(ValueError, match=match):
        make_trainer(folder, **options)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"packing_strategy": "bdf", "packing": True}, "packing_strategy='bdf' is unknown. Did you mean 'bfd'"),
            ({"truncation_mode": "keep_stert"}, "Did you mean 'keep_start'"),
            ({"packing": True, "max_length": None}, "packing=True fills rows of max_length"),
            ({"packing_strategy": "wrapped"}, "packing is False"),
            ({"truncation_mode": "keep_end", "max_length": None}, "nothing is cut"),
            ({"padding_free": True, "pad_to_multiple_of": 8}, "nothing to pad"),
            ({"max_length": 0}, "max_length=0"),
        ],
    )
    def test_settings_that_do_not_fit_together_are_refused(self, tmp_path, options, match):
        with pytest.raises(ValueError, match=match):
            DistillationTrainingArguments(output_dir=str(tmp_path), **options)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"train_dataset": TOKENS}, "max_length=40: nobody reads this, since train_dataset holds no raw text"),
            (
                {"data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False), "packing": True},
                "packing=True: nobody.*the data collator is your own",
            ),
            ({"dataset_text_field": "content"}, r"train_dataset has no column.*\(it has text\).*_field='content'"),
            (
                {"train_dataset": TOKENS, "eval_dataset": TEXTS, "padding_free": True},
                "padding_free=True: nobody reads this",
            ),
            ({"completion_only_loss": True}, "completion_only_loss=True, but the data set holds text"),
        ],
    )
    def test_settings_that_nobody_reads_are_refused(self, tmp_path, options, match):
        refused(tmp_path, match, **options)

    def test_that_prompts_have_a_loss_says_nothing_wrong_of_plain_text(self, tmp_path):
        prompts = Dataset.from_list([{"prompt": "the ship ", "completion": "came"}] * 4)
        labels = [
            make_trainer(tmp_path, train_dataset=train, eval_dataset=TEXTS, completion_only_loss=False).train_dataset
            for train in (TEXTS, prompts)
        ]
        assert all(row["labels"] == row["input_ids"] for rows in labels for row in rows)
        talks = Dataset.from_list([{"messages": talk("a", "b")}])
        options = {"processing_class": tokenizer(PLAIN_TEMPLATE), "completion_only_loss": False}
        refused(
            tmp_path, "completion_only_loss=False, but the data set holds messages", train_dataset=talks, **options
        )

    def test_other_tasks_read_no_text(self, tmp_path):
        models = tiny.bert("MaskedLM"), tiny.bert("MaskedLM", hidden=48)
        refused(tmp_path, "padding_free=True.*the student does masked_lm", models=models, padding_free=True)


class TestRefusals:
    def test_messages_need_a_chat_template(self, tmp_path):
        data = Dataset.from_list([{"messages": talk("a", "b")}])
        refused(tmp_path, "has no chat template.*tokenizer.chat_template", train_dataset=data)
        data = Dataset.from_list([{"prompt": talk("a"), "completion": talk("a", "b")[1:]}])
        refused(tmp_path, "has no chat template", train_dataset=data)

    def test_text_needs_a_tokenizer(self, tmp_path):
        refused(tmp_path, "train_dataset holds raw text.*processing_class=", processing_class=None)

    def test_a_dict_of_training_sets_is_refused(self, tmp_path):
        refused(tmp_path, "train_dataset is a dict of a, b", train_dataset=DatasetDict(a=TEXTS, b=TEXTS))

    def test_a_model_that_mixes_packed_texts_is_refused(self, tmp_path):
        llama, falcon = make("llama"), make("falcon")
        refused(tmp_path, r"The student \(FalconForCausalLM\) mixes", models=(falcon, llama), packing=True)
        refused(tmp_path, r"The teacher \(FalconForCausalLM\) mixes", models=(llama, falcon), padding_free=True)
        make_trainer(tmp_path, (falcon, llama))

    def test_a_student_made_anew_is_tried_too(self, tmp_path):
        made = iter(["llama", "falcon"])
        trainer = make_trainer(tmp_path, packing=True, model_init=lambda: make(next(made)))
        with pytest.raises(ValueError, match=r"The student \(FalconForCausalLM\) mixes"):
            trainer.train()

    def test_texts_longer_than_a_table_of_positions_are_refused(self, tmp_path):
        long = Dataset.from_list([{"text": " ".join(SENTENCES * 4)}])
        models = pair("gpt2")
        refused(tmp_path, "knows 64 positions.*max_length=64", models=models, train_dataset=long, max_length=128)
        make_trainer(tmp_path, pair("gpt2"), max_length=128, packing=True)  # of short texts
        make_trainer(tmp_path, train_dataset=long, max_length=128)  # of a model that computes its positions

    @pytest.mark.parametrize(
        ("match", "reason"),
        [
            ({"student": "attention_scores[*]", "loss": "attention_mse"}, "a mean over all pairs"),
            ({"student": "query[-1]", "loss": "minilmv2_relations"}, "relates the tokens of a row"),
            ({"student": "pooled(mean)@hidden[-1]", "loss": "hidden_mse"}, "pools a row"),
            ({"student": "hidden[-1]", "loss": "hidden_mse", "mask": "cls"}, "takes its first token"),
            ({"student": "hidden[-1]", "loss": "hidden_mse", "reduction": "sample_mean"}, "a mean over rows"),
            ({"student": "hidden[-1]", "loss": "hidden_mse", "mask": "batch:part"}, "have no other columns"),
        ],
    )
    def test_matches_of_whole_rows_are_refused(self, tmp_path, match, reason):
        config = {"logits": {"weight": 1.0}, "matches": [{"name": "m", **match}]}
        refused(tmp_path, f"Match 'm': .*{reason}", distillation_config=config, padding_free=True)

    def test_matches_of_tokens_need_rows_without_padding(self, tmp_path):
        refused(tmp_path, "Set padding_free=True beside packing", hidden_weight=1.0, packing=True)

    def test_weights_of_texts_do_not_follow_them_into_packed_rows(self, tmp_path):
        weights = [{"by": "phrases", "phrases": ["ship"]}]
        refused(tmp_path, "item_weights read the columns text", item_weights=weights, packing=True)

    def test_virtual_tokens_are_refused_beside_packing(self, tmp_path):
        student, teacher = pair("llama")
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        models = get_peft_model(student, config), teacher
        refused(tmp_path, "virtual tokens|prompt tuning", models=models, padding_free=True)

    def test_a_teacher_of_other_tokens_needs_them(self, tmp_path):
        student, teacher = pair("llama")
        words = [*dict.fromkeys(" ".join(SENTENCES).split()), *(f"w{i}" for i in range(290))]
        options = {"token_alignment": "offsets", "kd_loss": "uld"}
        with pytest.raises(ValueError, match="Tokenise it for both"):
            DistillationTrainer(
                model=student,
                args=arguments(tmp_path, **options),
                teacher_model=teacher,
                train_dataset=TEXTS,
                processing_class=tokenizer(),
                teacher_processing_class=tiny.tokenizer(words),
            )

    def test_a_balance_of_experts_over_filled_up_rows_is_refused(self, tmp_path):
        models = mixtral(32, 2), make("llama")
        refused(tmp_path, "balances its experts.*padding_free=True beside packing", models=models, packing=True)
        make_trainer(tmp_path, models, packing=True, padding_free=True)

    def test_a_cache_of_keys_is_refused(self, tmp_path):
        refused(tmp_path, "use_cache=True keeps models", use_cache=True, padding_free=True)

    def test_rows_without_a_label_are_counted(self, tmp_path):
        rows = [{"prompt": SENTENCES[0], "completion": " x" if i else ""} for i in range(4)]
        made = tokenizer(eos_token=None)
        with pytest.warns(UserWarning, match="1 of the 4 rows of train_dataset have no token with a loss"):
            trainer = make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), processing_class=made)
        trainer.train()
        assert logged(trainer, "labelled_fraction") == [0.75, 0.75]
        match = "4 of the 4 rows of train_dataset.*Raise max_length"
        refused(tmp_path, match, train_dataset=Dataset.from_list(rows), max_length=3)


class TestTrainings:
    @pytest.mark.parametrize("options", [{}, {"packing": True}, {"padding_free": True}])
    def test_a_stream_trains_from_raw_text(self, tmp_path, options):
        def rows():
            yield from ROWS

        streams = TEXTS.to_iterable_dataset(), IterableDataset.from_generator(rows)
        found = []
        for stream in streams:
            options = {"per_device_train_batch_size": 2, "max_steps": 3, **options}
            trainer = make_trainer(tmp_path, train_dataset=stream, eval_dataset=TEXTS, **options)
            trainer.train()
            found.append(logged(trainer, "loss"))
            assert trainer.evaluate()["eval_loss"] > 0
        assert found[0] == found[1]
        assert len(found[0]) == 3

    def test_a_stream_is_what_the_data_set_is(self, tmp_path):
        table = make_trainer(tmp_path, packing=True).train_dataset
        stream = make_trainer(tmp_path, packing=True, train_dataset=TEXTS.to_iterable_dataset()).train_dataset
        assert [*stream] == table.to_list()

    def test_evaluation_reads_raw_text_wherever_it_comes_from(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset={"one": TEXTS, "two": TEXTS.select(range(2))}, packing=True)
        metrics = trainer.evaluate()
        assert {"eval_one_loss", "eval_one_kd", "eval_two_loss"} <= {*metrics}
        again = trainer.evaluate(TEXTS)
        assert again["eval_loss"] == metrics["eval_one_loss"]
        assert trainer.evaluate(DatasetDict(a=TEXTS))["eval_a_loss"] == again["eval_loss"]
        assert trainer.evaluate(ROWS)["eval_loss"] == again["eval_loss"]
        assert trainer.evaluate(TEXTS.with_format("torch"))["eval_loss"] == again["eval_loss"]
        assert trainer.predict(TEXTS).metrics["test_loss"] == again["eval_loss"]
        alone = make_trainer(tmp_path, train_dataset=None)
        assert alone.evaluate(TEXTS)["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-6)

    def test_evaluation_while_training_is_of_padded_rows(self, tmp_path):
        options = {"packing": True, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path, eval_dataset=TEXTS, **options)
        trainer.train()
        assert len(logged(trainer, "eval_loss")) == 2
        assert len(trainer.eval_dataset) == len(TEXTS)
        assert "attention_mask" in next(iter(trainer.get_eval_dataloader()))
        assert "attention_mask" not in next(iter(trainer.get_train_dataloader()))

    def test_tokenised_rows_train_beside_raw_text_to_evaluate(self, tmp_path):
        trainer = make_trainer(tmp_path, train_dataset=TOKENS, eval_dataset=TEXTS)
        assert trainer.train_dataset is TOKENS
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0

    def test_a_collator_of_the_users_own_gets_the_rows_as_they_are(self, tmp_path):
        made = tokenizer()

        def collate(rows):
            batch = made([row["text"] for row in rows], padding=True, return_tensors="pt")
            return {**batch, "labels": batch["input_ids"]}

        options = {"max_length": 1024, "remove_unused_columns": False}
        trainer = make_trainer(tmp_path, data_collator=collate, **options)
        assert trainer.train_dataset is TEXTS
        trainer.train()

    def test_conversations_train_on_answers(self, tmp_path):
        data = Dataset.from_list([{"messages": talk(text, "counted")} for text in SENTENCES])
        options = {"train_dataset": data, "processing_class": tokenizer(PLAIN_TEMPLATE), "padding_free": True}
        trainer = make_trainer(tmp_path, **options)
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        assert tokenizer().decode(labels[labels >= 0]) == "counted<|end|>" * 4
        trainer.train()

    def test_padding_needs_no_padding_token(self, tmp_path):
        plain = make_trainer(tmp_path)
        without = make_trainer(tmp_path, processing_class=tokenizer(pad_token=None), pad_to_multiple_of=16)
        assert without.processing_class.pad_token is None
        assert next(iter(without.get_train_dataloader()))["input_ids"].shape[1] % 16 == 0
        plain.train()
        without.train()
        assert logged(without, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)

    def test_tokenised_text_is_read_from_the_cache(self, tmp_path, monkeypatch):
        from hf_distill.text.formats import RowTokenizer

        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        options = {"data_files": str(tmp_path / "data.jsonl"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
        first = make_trainer(tmp_path, train_dataset=load_dataset("json", **options), packing=True)
        monkeypatch.setattr(RowTokenizer, "_made", lambda *args: pytest.fail("tokenised again"))
        used = tokenizer()
        used(["a", "the ship"], padding=True, truncation=True, max_length=4)  # its state then is another
        again = make_trainer(
            tmp_path, train_dataset=load_dataset("json", **options), packing=True, processing_class=used
        )
        assert again.train_dataset.to_list() == first.train_dataset.to_list()
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            make_trainer(tmp_path, train_dataset=load_dataset("json", **options), packing=True, max_length=20)

    def test_no_random_number_is_drawn(self, tmp_path):
        torch.manual_seed(5)
        models = pair("llama")
        make_trainer(tmp_path, models, max_length=1024)
        state = torch.get_rng_state()
        make_trainer(tmp_path, models, packing=True, padding_free=True)
        assert torch.equal(torch.get_rng_state(), state)
