"""From prompts to a student: what the teacher wrote is what the trainer reads."""

import json

import pytest
import torch
from datasets import Dataset, load_dataset

from hf_distill import DistillationTrainer, DistillationTrainingArguments, generate_answers
from hf_distill.text.formats import RowTokenizer, TextFormat
from tests.generation.writers import CHAT, answer_ids, causal, some_prompts, spaced, words
from tests.text import corpus


@pytest.mark.parametrize("chat", [False, True])
def test_a_student_learns_the_tokens_that_the_teacher_wrote(tmp_path, chat):
    teacher, tokenizer = causal(), words(chat_template=CHAT) if chat else spaced()
    prompts = some_prompts()
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    generate_answers(teacher, prompts, tmp_path / "answers", tokenizer=tokenizer, max_new_tokens=8)
    torch.manual_seed(1)
    trainer = DistillationTrainer(
        model=causal(),
        teacher_model=teacher,
        args=DistillationTrainingArguments(
            str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True
        ),
        train_dataset=load_dataset(str(tmp_path / "answers"), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    if chat:
        return
    for row, prompt in zip(trainer.train_dataset, dict.fromkeys(prompts), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        written = answer_ids(teacher, ids, max_new_tokens=8)[0]
        assert [label for label in row["labels"] if label != -100] == [token for token in written if token != 0]


TEMPLATE = "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}{{ style }} " + CHAT
TURNS = [{"role": "user", "content": "w1 w2"}]


def tool(name, **more):
    return {"name": name, **more}


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_what_a_row_gives_the_template_reaches_teacher_and_student(tmp_path, column):
    rows = [
        {column: TURNS, "tools": [tool("w5", about="w6"), tool("w7")], "chat_template_kwargs": {"style": "w8"}},
        {column: TURNS, "tools": [tool("w9")], "chat_template_kwargs": {"other": 1}},
        {column: TURNS, "tools": None, "chat_template_kwargs": None},
        {column: TURNS, "tools": [tool("w9")], "chat_template_kwargs": {"other": 1}},
    ]
    teacher, tokenizer = causal(), words(chat_template=TEMPLATE)
    options = {"tokenizer": tokenizer, "max_new_tokens": 8, "chat_template_kwargs": {"style": "w3"}}
    summary = generate_answers(teacher, Dataset.from_list(rows), tmp_path / "out", **options)
    assert (summary.rows, summary.counts["repeated"]) == (3, 1)

    given = [([tool("w5", about="w6"), tool("w7")], "w8"), ([tool("w9")], "w3"), (None, "w3")]
    found = load_dataset(str(tmp_path / "out"), split="train")
    trained = RowTokenizer(tokenizer, TextFormat.COMPLETION)(found[:], range(3))["input_ids"]
    texts = []
    for (tools, style), row, ids in zip(given, found, trained, strict=True):
        asked = {"tools": tools, "style": style, "return_dict": False}
        prompt = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, **asked)
        answer = tokenizer.decode(answer_ids(teacher, prompt, max_new_tokens=8)[0], skip_special_tokens=True)
        assert row["completion"] == [{"role": "assistant", "content": answer}]
        assert ids == tokenizer.apply_chat_template(TURNS + row["completion"], **asked)
        texts.append(answer)
    assert len({*texts}) == 3


def test_tools_that_are_json_stay_json_and_other_tools_are_another_run(tmp_path):
    teacher, tokenizer = causal(), words(chat_template=TEMPLATE)
    rows = [{"prompt": TURNS, "tools": json.dumps([tool(name)])} for name in ("w5", "w6")]
    options = {"tokenizer": tokenizer, "max_new_tokens": 4}
    generate_answers(teacher, Dataset.from_list(rows), tmp_path / "out", **options)
    assert load_dataset(str(tmp_path / "out"), split="train")["tools"][:] == [row["tools"] for row in rows]
    rows[1]["tools"] = json.dumps([tool("w7")])
    with pytest.raises(ValueError, match=r"prompts\.fingerprint is"):
        generate_answers(teacher, Dataset.from_list(rows), tmp_path / "out", **options)


def test_a_prompt_without_tools_keeps_its_fingerprint_and_a_text_has_no_columns_for_a_template(tmp_path):
    options = {"tokenizer": words(chat_template=CHAT), "max_new_tokens": 4}
    beside = {"tools": [None, None], "chat_template_kwargs": [None, None]}
    chats = [[{"role": "user", "content": word}] for word in ("w1", "w2")]
    for prompts in (["w1", "w2"], chats):
        found = []
        for name, rows in (("plain", {"prompt": prompts}), ("beside", {"prompt": prompts, **beside})):
            folder = tmp_path / f"{name} {type(prompts[0]).__name__}"
            generate_answers(causal(), Dataset.from_dict(rows), folder, **options)
            found.append(json.loads((folder / "generation.json").read_text())["settings"]["prompts"]["fingerprint"])
        assert found[0] == found[1]
    made = generate_answers(causal(), ["w1"], tmp_path / "text", chat_template_kwargs={"style": "w3"}, **options)
    assert load_dataset(str(made.output), split="train").column_names == ["prompt", "completion", "finished"]


def test_what_a_template_refuses_is_named_by_its_row(tmp_path):
    refusing = words(chat_template="{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + CHAT)
    rows = [{"prompt": TURNS, "tools": None}, {"prompt": TURNS, "tools": [tool("w5")]}]
    with pytest.raises(ValueError, match="Row 1: the chat template refuses the messages: no tools here"):
        generate_answers(causal(), Dataset.from_list(rows), tmp_path / "out", tokenizer=refusing, max_new_tokens=4)


def test_a_prompt_that_was_written_with_its_beginning_is_read_with_one(tmp_path):
    teacher, tokenizer = causal(vocab_size=330), corpus.tokenizer(begins=True)
    prompts = ["<s>the old", "the ship"]
    generate_answers(teacher, prompts, tmp_path / "out", tokenizer=tokenizer, max_new_tokens=6)
    found = load_dataset(str(tmp_path / "out"), split="train")
    for prompt, row in zip(prompts, found, strict=True):
        ids = [1, *tokenizer(prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"]]
        written = answer_ids(teacher, ids, max_new_tokens=6)[0]
        assert row["completion"] == tokenizer.decode(written, skip_special_tokens=True)
