import pickle

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from hf_distill.text.formats import RowTokenizer, TextFormat, find_format
from tests.text.corpus import (
    FORGETFUL_TEMPLATE,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    SENTENCES,
    supervised,
    talk,
    tokenizer,
)

END = "</s>"


def tokenised(made, rows, text_format, **options):
    """The rows as `datasets` would have them, and each with its ids and labels."""
    columns = Dataset.from_list(rows)[:]
    made = RowTokenizer(made, text_format, **options)(columns, range(5, 5 + len(rows)))
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


class TestFindFormat:
    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            (["text", "label"], TextFormat.TEXT),
            (["prompt", "completion", "text"], TextFormat.COMPLETION),
            (["messages", "prompt", "completion"], TextFormat.MESSAGES),
            (["input_ids", "text"], None),
            (["prompt", "chosen"], None),
            (["content"], None),
        ],
    )
    def test_the_columns_say_what_a_data_set_holds(self, columns, expected):
        assert find_format(columns) is expected

    def test_the_column_of_plain_text_has_the_name_that_is_given(self):
        assert find_format(["content"], "content") is TextFormat.TEXT


class TestText:
    def test_a_text_has_a_loss_everywhere_and_ends(self):
        made = tokenizer()
        (row,) = tokenised(made, [{"text": SENTENCES[0]}], TextFormat.TEXT)
        assert made.decode(row["input_ids"]) == SENTENCES[0] + END
        assert row["labels"] == row["input_ids"]

    def test_a_text_that_ends_already_does_not_end_twice(self):
        (row,) = tokenised(tokenizer(), [{"text": SENTENCES[0] + END}], TextFormat.TEXT)
        assert row["input_ids"].count(2) == 1

    def test_a_tokenizer_without_an_end_puts_none(self):
        (row,) = tokenised(tokenizer(eos_token=None), [{"text": SENTENCES[0]}], TextFormat.TEXT)
        assert 2 not in row["input_ids"]

    def test_rows_without_a_token_are_left_out_with_their_other_columns(self):
        rows = [{"text": "", "weight": 1.0}, {"text": "a ship", "weight": 2.0}]
        made = tokenised(tokenizer(eos_token=None), rows, TextFormat.TEXT, kept=("weight",))
        assert [row["weight"] for row in made] == [2.0]

    def test_a_row_that_is_no_text_is_named(self):
        with pytest.raises(ValueError, match=r"Row 6: 'text' holds None, expected a text"):
            tokenised(tokenizer(), [{"text": "a"}, {"text": None}], TextFormat.TEXT)

    @pytest.mark.parametrize(("keep_end", "kept"), [(False, slice(None, 4)), (True, slice(-4, None))])
    def test_a_long_text_keeps_the_end_that_was_asked_for(self, keep_end, kept):
        made = tokenizer()
        (row,) = tokenised(made, [{"text": SENTENCES[0]}], TextFormat.TEXT, max_length=4, keep_end=keep_end)
        assert row["input_ids"] == [*made(SENTENCES[0])["input_ids"], 2][kept]
        assert row["labels"] == row["input_ids"]


class TestBeginnings:
    @pytest.mark.parametrize("begins", [False, True])
    def test_a_text_that_was_written_with_its_beginning_has_it_once(self, begins):
        made = tokenizer(begins=begins)
        rows = [{"text": text} for text in ("<s>the ship", "the ship", "<s><s>the ship")]
        found = [made.decode(row["input_ids"]) for row in tokenised(made, rows, TextFormat.TEXT)]
        second = "<s>the ship</s>" if begins else "the ship</s>"
        assert found == ["<s>the ship</s>", second, "<s><s>the ship</s>"]

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("prompt", ["<s>the old", "the old", "light", "<s>light", "<s>", ""])
    def test_a_prompt_that_was_written_with_its_beginning_has_it_once(self, begins, prompt):
        made = tokenizer(begins=begins)
        completion = "house" if "light" in prompt else " keeper"
        (row,) = tokenised(made, [{"prompt": prompt, "completion": completion}], TextFormat.COMPLETION)
        (whole,) = tokenised(
            made, [{"prompt": prompt, "completion": completion}], TextFormat.COMPLETION, completion_only=False
        )
        expected = prompt + completion + END
        expected = "<s>" + expected if begins and not prompt.startswith("<s>") else expected
        assert made.decode(row["input_ids"]) == expected
        assert supervised(made, row) == completion + END
        assert whole["labels"] == whole["input_ids"] == row["input_ids"]

    @pytest.mark.parametrize("length", [2, 5])
    def test_the_end_of_a_text_stands_behind_its_beginning(self, length):
        made = tokenizer(begins=True)
        ids = [*made(SENTENCES[0])["input_ids"], 2]
        (row,) = tokenised(made, [{"text": SENTENCES[0]}], TextFormat.TEXT, max_length=length, keep_end=True)
        assert row["input_ids"] == [1, *ids[1 - length :]]
        # What stands behind the beginning now never followed it.
        assert row["labels"] == [1, -100, *ids[len(ids) + 2 - length :]]

    def test_a_text_that_fits_or_leaves_no_room_is_cut_as_any_other(self):
        made = tokenizer(begins=True)
        ids = [*made("a ship")["input_ids"], 2]
        for length, kept in ((len(ids), ids), (1, [2])):
            (row,) = tokenised(made, [{"text": "a ship"}], TextFormat.TEXT, max_length=length, keep_end=True)
            assert row == {"input_ids": kept, "labels": kept}

    def test_the_end_of_a_prompt_stands_behind_its_beginning_and_all_of_the_completion_has_a_loss(self):
        made = tokenizer(begins=True)
        rows = [{"prompt": "the old lighthouse keeper counted", "completion": " the ships"}]
        (whole,) = tokenised(made, rows, TextFormat.COMPLETION)
        length = len(whole["input_ids"]) - 2
        (row,) = tokenised(made, rows, TextFormat.COMPLETION, max_length=length, keep_end=True)
        assert row["input_ids"] == [1, *whole["input_ids"][3:]]
        assert row["labels"] == [-100, *whole["labels"][3:]]
        assert supervised(made, row) == " the ships" + END

    def test_a_conversation_that_its_template_begins_keeps_that_too(self):
        made = tokenizer("{{ bos_token }}" + PLAIN_TEMPLATE)
        rows = [{"messages": talk("a ship", "where")}]
        (whole,) = tokenised(made, rows, TextFormat.MESSAGES, assistant_only=True)
        (row,) = tokenised(made, rows, TextFormat.MESSAGES, assistant_only=True, max_length=6, keep_end=True)
        assert row["input_ids"] == [1, *whole["input_ids"][-5:]]
        assert row["labels"][2:] == whole["labels"][-4:]


class TestCompletions:
    def test_an_answer_that_was_cut_off_does_not_end(self):
        rows = [{"prompt": "a ship", "completion": " sails", "finished": done} for done in (True, False)]
        whole, cut = tokenised(tokenizer(), rows, TextFormat.COMPLETION)
        assert whole["input_ids"] == [*cut["input_ids"], 2]
        assert whole["labels"] == [*cut["labels"], 2]

    @pytest.mark.parametrize("begins", [False, True])
    def test_only_the_completion_has_a_loss(self, begins):
        made = tokenizer(begins=begins)
        (row,) = tokenised(made, [{"prompt": "the old", "completion": " keeper"}], TextFormat.COMPLETION)
        assert supervised(made, row) == " keeper" + END
        assert made.decode(row["input_ids"]) == ("<s>" if begins else "") + "the old keeper" + END

    def test_a_prompt_has_a_loss_where_that_is_asked_for(self):
        rows = [{"prompt": "the old", "completion": " keeper"}]
        (row,) = tokenised(tokenizer(), rows, TextFormat.COMPLETION, completion_only=False)
        assert row["labels"] == row["input_ids"]

    def test_prompt_and_completion_share_no_token(self):
        made = tokenizer()
        assert len(made("lighthouse")["input_ids"]) < len(made("light")["input_ids"]) + len(made("house")["input_ids"])
        (row,) = tokenised(made, [{"prompt": "light", "completion": "house"}], TextFormat.COMPLETION)
        assert row["input_ids"] == [*made("light")["input_ids"], *made("house")["input_ids"], 2]
        assert supervised(made, row) == "house" + END

    def test_what_a_tokenizer_puts_behind_a_text_does_not_part_the_two(self):
        from tests.tiny import tokenizer as words

        made = words(["the", "old", "keeper"])
        rows = [{"prompt": "the old", "completion": " keeper"}, {"prompt": "", "completion": "old"}]
        first, second = tokenised(made, rows, TextFormat.COMPLETION)
        assert made.decode(first["input_ids"]) == "[CLS] the old keeper [SEP]"
        assert supervised(made, first) == "keeper [SEP]"
        assert supervised(made, second) == "old [SEP]"

    def test_messages_as_prompt_and_completion_have_the_loss_on_the_completion(self):
        made = tokenizer(PLAIN_TEMPLATE)
        row = {"prompt": talk("a ship", "where", "there"), "completion": talk("x", "nobody asked")[1:]}
        (got,) = tokenised(made, [row], TextFormat.COMPLETION)
        assert supervised(made, got) == "nobody asked<|end|>"

    def test_a_completion_of_several_turns_may_have_the_loss_on_the_assistants_alone(self):
        made = tokenizer(PLAIN_TEMPLATE)
        row = {"prompt": talk("a ship"), "completion": talk("x", "one", "two", "three")[1:]}
        (both,) = tokenised(made, [row], TextFormat.COMPLETION)
        (own,) = tokenised(made, [row], TextFormat.COMPLETION, assistant_only=True)
        assert supervised(made, both) == "one<|end|>\n<|user|>two<|end|>\n<|assistant|>three<|end|>"
        assert supervised(made, own) == "one<|end|>|three<|end|>"

    def test_an_answer_that_was_begun_in_the_prompt_goes_on(self):
        made = tokenizer(PLAIN_TEMPLATE)
        row = {"prompt": talk("a ship", "it was"), "completion": [{"role": "user", "content": "go on"}]}
        (got,) = tokenised(made, [row], TextFormat.COMPLETION)
        assert supervised(made, got) == "<|end|>\n<|user|>go on<|end|>"


class TestMessages:
    @pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["turn by turn", "marked"])
    @pytest.mark.parametrize("system", [None, "be brief"])
    def test_only_the_assistants_turns_have_a_loss(self, template, system):
        made = tokenizer(template)
        messages = talk("a ship", "where", "the old keeper", "counted", system=system)
        (row,) = tokenised(made, [{"messages": messages}], TextFormat.MESSAGES, assistant_only=True)
        assert supervised(made, row) == "where<|end|>|counted<|end|>"
        assert row["input_ids"] == made.apply_chat_template(messages)["input_ids"]

    def test_both_ways_to_tell_turns_agree_on_rows_of_several_answers_at_once(self):
        messages = [*talk("a ship", "where", "x", "counted"), {"role": "assistant", "content": "twice"}]
        rows = [{"messages": messages}, {"messages": talk("no answer", "yes")[:1]}]
        plain, marked = (
            tokenised(tokenizer(template), rows, TextFormat.MESSAGES, assistant_only=True)
            for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE)
        )
        assert set(plain[1]["labels"]) == {-100}
        assert plain[1] == marked[1]
        # Nothing asks for an answer that follows an answer, so its header is the assistant's own too.
        assert supervised(tokenizer(), plain[0]) == "where<|end|>|counted<|end|>|<|assistant|>twice<|end|>"
        assert supervised(tokenizer(), marked[0]) == "where<|end|>|counted<|end|>|twice<|end|>"

    def test_a_token_over_the_border_of_an_answer_is_of_the_answer(self):
        # The space that ends the prompt goes into the answer's first token.
        plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
        plain += "{% if add_generation_prompt %}assistant: {% endif %}"
        marked = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        marked += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        rows = [{"messages": talk("where", "the ship")}]
        by_turns, by_marks = (
            tokenised(tokenizer(template), rows, TextFormat.MESSAGES, assistant_only=True)
            for template in (plain, marked)
        )
        assert by_turns == by_marks
        assert supervised(tokenizer(), by_turns[0]) == " the ship"

    def test_all_turns_have_a_loss_where_that_is_asked_for(self):
        (row,) = tokenised(tokenizer(PLAIN_TEMPLATE), [{"messages": talk("a", "b")}], TextFormat.MESSAGES)
        assert row["labels"] == row["input_ids"]

    def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row(self):
        made = tokenizer(FORGETFUL_TEMPLATE)
        (row,) = tokenised(made, [{"messages": talk("a", "b")}], TextFormat.MESSAGES, assistant_only=True)
        assert supervised(made, row) == "(hm) b<|end|>"
        with pytest.raises(ValueError, match=r"Row 5: the chat template writes turn 2 of 4 otherwise.*generation"):
            tokenised(made, [{"messages": talk("a", "b", "c", "d")}], TextFormat.MESSAGES, assistant_only=True)

    def test_what_a_template_refuses_is_named_by_its_row(self):
        made = tokenizer("{{ raise_exception('no system here') }}")
        with pytest.raises(ValueError, match="Row 5: the chat template refuses the messages: no system here"):
            tokenised(made, [{"messages": talk("a", "b")}], TextFormat.MESSAGES)

    def test_a_conversation_without_a_message_is_refused(self):
        rows = [{"messages": talk("a", "b")}, {"messages": []}]
        with pytest.raises(ValueError, match="Row 6 has no message"):
            tokenised(tokenizer(PLAIN_TEMPLATE), rows, TextFormat.MESSAGES)

    def test_tools_and_options_of_a_row_reach_the_template_without_the_gaps_that_arrow_fills(self):
        template = (
            "{% if tools %}{{ tools[0] | tojson }}{% endif %}{% if brief %}brief {% endif %}"
            "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
        )
        tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
        asked = {"role": "assistant", "content": "", "tool_calls": [{"name": "count"}]}
        rows = [
            {"messages": [*talk("a"), asked], "tools": [tool], "chat_template_kwargs": {"brief": True}},
            {"messages": talk("a"), "tools": None, "chat_template_kwargs": None},
        ]
        first, second = tokenised(tokenizer(template), rows, TextFormat.MESSAGES)
        decode = tokenizer().decode
        assert '"name": "count"' in decode(first["input_ids"])
        assert "}brief [" in decode(first["input_ids"])
        assert (
            decode(second["input_ids"]) == "['content', 'role']"
            or decode(second["input_ids"]) == "['role', 'content']"
        )

    def test_tools_may_be_json(self):
        rows = [{"messages": talk("a"), "tools": '[{"name": "count"}]'}]
        (row,) = tokenised(tokenizer("{{ tools[0]['name'] }}"), rows, TextFormat.MESSAGES)
        assert tokenizer().decode(row["input_ids"]) == "count"


def test_a_row_tokenizer_can_be_pickled():
    made = RowTokenizer(tokenizer(PLAIN_TEMPLATE), TextFormat.MESSAGES, assistant_only=True)
    rows = {"messages": [talk("a", "b")]}
    assert pickle.loads(pickle.dumps(made))(rows, [0]) == made(rows, [0])


def test_rows_that_were_made_by_other_rules_are_not_read_from_the_cache(monkeypatch):
    now, same = (Hasher.hash(RowTokenizer(tokenizer(), TextFormat.TEXT)) for _ in range(2))
    monkeypatch.setattr("hf_distill.text.formats.RULES", -1)
    assert now == same != Hasher.hash(RowTokenizer(tokenizer(), TextFormat.TEXT))
