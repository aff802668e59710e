"""The teacher's answers: what they say, in which form, and what is left out."""

import json

import pytest
import torch
import transformers as hf
from datasets import load_dataset
from peft import LoraConfig, get_peft_model

from hf_distill.generation.answers import generate_answers
from tests.generation.writers import CHAT, answer_ids, causal, encoder_decoder, letters, some_prompts, spaced, words


def answers(folder):
    return load_dataset(str(folder), split="train").to_list()


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [causal, encoder_decoder])
def test_answers_in_batches_are_those_to_one_prompt_at_a_time(tmp_path, make, options):
    teacher, tokenizer, prompts = make(), words(), some_prompts()
    asked = {"max_new_tokens": 12, **options}
    generate_answers(teacher, prompts, tmp_path / "out", tokenizer=tokenizer, batch_size=4, save_steps=2, **asked)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if make is encoder_decoder else ids[:-1]  # a causal model writes no answer behind an end
        texts = [read(tokenizer, new) for new in answer_ids(teacher, ids, **asked)]
        expected += [(prompt, answer) for answer in dict.fromkeys(texts)]
    rows = answers(tmp_path / "out")
    assert [(row["prompt"], row["completion"].strip()) for row in rows] == expected
    assert len({row["completion"] for row in rows}) > 5


def test_prompt_and_answer_put_together_have_the_tokens_that_the_teacher_read_and_wrote(tmp_path):
    """Its words carry the space before them; read alone, the first word of an answer would lose it."""
    teacher, tokenizer = causal(), spaced()
    generate_answers(teacher, ["w1 w2", "w5"], tmp_path / "out", tokenizer=tokenizer, max_new_tokens=6)
    for row in answers(tmp_path / "out"):
        ids = tokenizer(row["prompt"])["input_ids"]
        written = [token for token in answer_ids(teacher, ids, max_new_tokens=6)[0] if token > 3]
        assert row["completion"].startswith(" ")
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == ids + written


def test_a_conversation_gets_an_assistants_turn_and_its_last_answer_is_asked_anew(tmp_path):
    teacher, tokenizer = causal(), words(chat_template=CHAT)
    asked = [{"role": "user", "content": "w1 w2"}]
    given = [[*asked, {"role": "assistant", "content": "w3"}], [*asked, {"role": "user", "content": "w9"}]]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in given), encoding="utf-8")
    generate_answers(teacher, path, tmp_path / "out", tokenizer=tokenizer, max_new_tokens=8)
    rows = answers(tmp_path / "out")
    assert [row["prompt"] for row in rows] == [asked, given[1]]
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        text = read(tokenizer, answer_ids(teacher, ids, max_new_tokens=8)[0])
        assert row["completion"] == [{"role": "assistant", "content": text}]


def test_variables_reach_the_chat_template(tmp_path):
    chats = [[{"role": "user", "content": "w1 w2"}]]
    tokenizer = words(chat_template="{{ extra }} " + CHAT)
    for extra in ("w5", "w6"):
        variables = {"extra": extra}
        options = {"tokenizer": tokenizer, "max_new_tokens": 8, "chat_template_kwargs": variables}
        generate_answers(causal(), chats, tmp_path / extra, **options)
    assert answers(tmp_path / "w5") != answers(tmp_path / "w6")


def test_what_ran_out_of_tokens_is_marked_and_may_be_dropped(tmp_path):
    teacher, tokenizer = causal(), words()
    options = {"tokenizer": tokenizer, "max_new_tokens": 30, "do_sample": True, "num_return_sequences": 3}
    summary = generate_answers(teacher, some_prompts(), tmp_path / "all", **options)
    rows = answers(tmp_path / "all")
    finished = [row for row in rows if row["finished"]]
    assert 0 < len(finished) < len(rows)
    assert summary.counts["unfinished"] == len(rows) - len(finished)
    dropped = generate_answers(teacher, some_prompts(), tmp_path / "finished", drop_unfinished=True, **options)
    assert answers(tmp_path / "finished") == finished
    assert dropped.counts["dropped"] == summary.counts["unfinished"]
    assert "unfinished and dropped" in str(dropped)


def test_an_answer_ends_at_a_stop_string_too(tmp_path):
    teacher, prompts = causal(vocab_size=30), ["abc", "de", "xyz", "f", "gh", "ijk", "lmno", "pq"]
    options = {"tokenizer": letters(), "max_new_tokens": 12}
    generate_answers(teacher, prompts, tmp_path / "out", **options)
    number, whole = next((i, row) for i, row in enumerate(answers(tmp_path / "out")) if not row["finished"])
    stop = whole["completion"][1:3]
    generate_answers(teacher, prompts, tmp_path / "cut", **options, generation_kwargs={"stop_strings": [stop]})
    cut = answers(tmp_path / "cut")[number]
    assert cut["completion"] == whole["completion"][: whole["completion"].index(stop) + 2]
    assert cut["finished"]


def test_a_prompt_is_answered_once_and_equal_answers_are_kept_once(tmp_path):
    teacher, tokenizer = causal(), words()
    prompts = ["w1 w2", "w3", "w1 w2", "", "  ", "w3"]
    summary = generate_answers(
        teacher,
        prompts,
        tmp_path / "out",
        tokenizer=tokenizer,
        max_new_tokens=2,
        do_sample=True,
        top_k=2,
        num_return_sequences=30,
    )
    rows = answers(tmp_path / "out")
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    assert len(pairs) == len({*pairs}) == summary.rows
    assert {prompt for prompt, _ in pairs} == {"w1 w2", "w3"}
    assert summary.counts["duplicates"] == 60 - len(pairs) > 0
    assert (summary.counts["repeated"], summary.counts["empty"]) == (2, 2)
    assert "prompts left out: 2 empty, 2 repeated" in str(summary)


def test_the_teachers_own_settings_hold_where_none_is_given(tmp_path):
    teacher, tokenizer = causal(), words()
    teacher.generation_config.update(top_p=0.5, max_length=7, repetition_penalty=1.3)
    generate_answers(teacher, some_prompts(), tmp_path / "out", tokenizer=tokenizer, max_new_tokens=9, do_sample=True)
    used = json.loads((tmp_path / "out/generation.json").read_text(encoding="utf-8"))["settings"]["generation"]
    assert (used["top_p"], used["repetition_penalty"], used["max_new_tokens"]) == (0.5, 1.3, 9)
    # Nothing cut off that nobody asked to: transformers alone would draw from the 50 likeliest.
    assert (used["top_k"], used["temperature"]) == (0, 1.0)
    assert "max_length" not in used


def test_teacher_tokenizer_and_random_numbers_are_left_as_they_were(tmp_path):
    teacher, tokenizer = causal(), words(padding_side="right")
    teacher.train()
    teacher.model.layers[0].eval()
    config, state = teacher.generation_config, torch.get_rng_state()
    generate_answers(teacher, some_prompts(), tmp_path / "out", tokenizer=tokenizer, max_new_tokens=4, do_sample=True)
    assert teacher.generation_config is config
    assert teacher.training
    assert not teacher.model.layers[0].training
    assert tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_teacher_with_adapters_writes_with_them(tmp_path):
    teacher, tokenizer = causal(), words()
    generate_answers(teacher, some_prompts(), tmp_path / "base", tokenizer=tokenizer, max_new_tokens=6)
    adapted = get_peft_model(teacher, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    before = adapted.generation_config
    generate_answers(adapted, some_prompts(), tmp_path / "adapted", tokenizer=tokenizer, max_new_tokens=6)
    assert answers(tmp_path / "adapted") != answers(tmp_path / "base")
    assert adapted.generation_config is before


def test_a_teacher_by_name_is_loaded_as_asked_and_recorded(tmp_path):
    causal().save_pretrained(tmp_path / "teacher")
    words().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw4\n", encoding="utf-8")
    summary = generate_answers(
        tmp_path / "teacher",
        tmp_path / "prompts.txt",
        tmp_path / "out",
        teacher_model_init_kwargs='{"dtype": "bfloat16"}',
        max_new_tokens=5,
    )
    record = json.loads((tmp_path / "out/generation.json").read_text(encoding="utf-8"))
    assert record["teacher"] == {"name": str(tmp_path / "teacher"), "revision": None}
    assert record["prompts"] == {"source": str(tmp_path / "prompts.txt"), "split": "train"}
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    generate_answers(half, ["w1 w2", "w4"], tmp_path / "again", tokenizer=words(), max_new_tokens=5)
    assert answers(tmp_path / "again") == answers(tmp_path / "out")
    again = json.loads((tmp_path / "again/generation.json").read_text(encoding="utf-8"))
    assert again["settings"]["teacher"] == record["settings"]["teacher"]
    # The folder it happened to be loaded from is nobody's business.
    assert str(tmp_path) not in json.dumps(again)
    assert summary.rows == record["counts"]["answers"] == 2
    assert record["settings"]["seed"] == 0
