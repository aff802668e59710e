"""Rows of text that a user got wrong: each is refused, or counted, with what is wrong about it."""

import pytest
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling

from hf_distill.token_alignment import tokenize_for_teacher
from tests.text.corpus import PLAIN_TEMPLATE, SENTENCES, tokenizer
from tests.text.test_text_setup import TEXTS, TOKENS, make_trainer, refused
from tests.tokenizers_of_text import byte_level, sentence_piece
from tests.training import logged

SHAREGPT = [{"from": "human", "value": SENTENCES[0]}, {"from": "gpt", "value": SENTENCES[1]}]
UNLABELLED = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}] * 8)
DEFAULT_LENGTH = {"max_length": 1024}


class TestConversations:
    @pytest.mark.parametrize("assistant_only", [None, False])
    def test_messages_of_another_format_are_refused_with_their_keys(self, tmp_path, assistant_only):
        rows = Dataset.from_list([{"messages": SHAREGPT}] * 4)
        options = {"train_dataset": rows, "assistant_only_loss": assistant_only}
        match = "Row 0: a message has the keys from, value, and no role.*human is user and gpt is assistant"
        refused(tmp_path, match, **options, processing_class=tokenizer(PLAIN_TEMPLATE))

    def test_a_column_of_another_name_and_format_is_told_to_change_both(self, tmp_path):
        rows = Dataset.from_list([{"conversations": SHAREGPT}] * 4)
        match = r"rename_column\('conversations', 'messages'\), and the keys of its messages \(from, value\) to role"
        refused(tmp_path, match, train_dataset=rows)

    def test_conversations_without_an_answer_are_not_said_to_be_too_long(self, tmp_path):
        rows = Dataset.from_list([{"messages": [{"role": "user", "content": SENTENCES[0]}]}] * 4)
        match = r"role 'assistant' are missing, empty or were cut off at max_length=40\. Raise.*or give them an answer"
        refused(tmp_path, match, train_dataset=rows, processing_class=tokenizer(PLAIN_TEMPLATE))


class TestLengths:
    def test_texts_that_are_too_short_are_not_called_completions(self, tmp_path):
        match = "fewer than two tokens or were cut off at max_length=1.*Raise max_length.*leave them out"
        refused(tmp_path, match, max_length=1)

    def test_no_length_is_to_be_raised_where_none_is_set(self, tmp_path):
        rows = Dataset.from_list([{"prompt": SENTENCES[0], "completion": ""}] * 4)
        match = "their completions are empty. Give them a completion.$"
        refused(tmp_path, match, train_dataset=rows, max_length=None, processing_class=tokenizer(eos_token=None))

    @pytest.mark.parametrize(
        "row",
        [
            {"text": " ".join(SENTENCES)},
            {"prompt": " ".join(SENTENCES), "completion": SENTENCES[0]},
            {"messages": [{"role": "user", "content": " ".join(SENTENCES)}, {"role": "assistant", "content": "came"}]},
        ],
    )
    def test_a_text_that_is_cut_anyway_is_not_warned_about(self, tmp_path, row):
        said = "sequence-length-is-longer-than-the-specified-maximum"
        made, other = (tokenizer(PLAIN_TEMPLATE, model_max_length=8) for _ in range(2))
        other(" ".join(SENTENCES))
        assert said in other.deprecation_warnings  # where Transformers notes what it has warned of
        options = {"max_length": 60, "truncation_mode": "keep_end", "processing_class": made}
        make_trainer(tmp_path, train_dataset=Dataset.from_list([row] * 4), **options)
        assert said not in made.deprecation_warnings


class TestPrompts:
    def test_prompts_alone_are_not_said_to_be_plain_text(self, tmp_path):
        rows = Dataset.from_list([{"prompt": SENTENCES[0]}] * 4)
        match = "prompts alone.*column completion.*empty ones with lmbda=1"
        refused(tmp_path, match, train_dataset=rows)

    def test_they_are_answered_with_empty_completions(self, tmp_path):
        rows = Dataset.from_list([{"prompt": SENTENCES[0], "completion": ""}] * 8)
        options = {"lmbda": 1.0, "task_weight": 0.0, "kd_weight": 1.0, "max_new_tokens": 4, "max_steps": 1}
        trainer = make_trainer(tmp_path, train_dataset=rows, **options)
        trainer.train()
        assert logged(trainer, "on_policy_fraction")[-1] == 1.0

    def test_plain_text_is_said_to_have_no_prompt(self, tmp_path):
        refused(tmp_path, "plain text has none", lmbda=0.5)


class TestTokensOfTheUser:
    @pytest.mark.parametrize("weights", [{}, {"task_weight": 0.0, "kd_weight": 1.0}])
    def test_labels_of_nothing_but_minus_100_are_refused(self, tmp_path, weights):
        match = "None of the 8 rows of train_dataset has a token with a loss: their labels are -100 throughout"
        refused(tmp_path, match, train_dataset=UNLABELLED, **DEFAULT_LENGTH, **weights)

    @pytest.mark.parametrize(
        "options",
        [
            {"data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False)},  # makes its own
            {"task_weight": 0.0, "kd_weight": 0.0, "hidden_weight": 1.0},  # reads no labels
            {"task_weight": 0.0, "kd_weight": 1.0, "lmbda": 1.0, "max_new_tokens": 4},  # prompts alone
        ],
    )
    def test_they_are_left_alone_where_something_else_teaches(self, tmp_path, options):
        trainer = make_trainer(tmp_path, train_dataset=UNLABELLED, **DEFAULT_LENGTH, **options, max_steps=1)
        trainer.train()
        assert min(logged(trainer, "loss")) > 0

    def test_one_row_with_a_label_is_enough(self, tmp_path):
        rows = Dataset.from_list([*UNLABELLED.to_list(), TOKENS[0]])
        make_trainer(tmp_path, train_dataset=rows, **DEFAULT_LENGTH)

    def test_rows_with_fewer_labels_than_tokens_are_refused_by_number(self, tmp_path):
        rows = Dataset.from_list([TOKENS[0], {"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8]}])
        refused(tmp_path, "Row 1 of train_dataset has 4 input_ids and 3 labels", train_dataset=rows, **DEFAULT_LENGTH)

    def test_rows_of_several_texts_are_refused(self, tmp_path):
        students, teachers = sentence_piece(), byte_level()
        rows = TEXTS.map(
            tokenize_for_teacher,
            input_columns="text",
            fn_kwargs={"student_tokenizer": students, "teacher_tokenizer": teachers},
        )
        refused(tmp_path, "lists of lists.*batched=True", train_dataset=rows, **DEFAULT_LENGTH)

    def test_that_nothing_is_cut_says_nothing_wrong_of_tokens(self, tmp_path):
        make_trainer(tmp_path, train_dataset=TOKENS, max_length=None)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"text": ["a"], "label": [0]}, "rows of the columns text, label.*input_columns='text'"),
        ([[{"role": "user", "content": "a"}]], "Conversations cannot be aligned"),
        (["a", None], "was given None, expected texts"),
    ],
)
def test_what_is_no_text_is_not_aligned(given, match):
    with pytest.raises(ValueError, match=match):
        tokenize_for_teacher(given, sentence_piece(), byte_level())


def test_the_name_of_a_tokenizer_is_not_taken_for_one(tmp_path):
    refused(tmp_path, r"processing_class='org/llm' is no tokenizer.*from_pretrained", processing_class="org/llm")
