"""What cannot be asked of a teacher, said before it writes anything; and where prompts may come from."""

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset

from hf_distill.generation.answers import generate_answers
from hf_distill.generation.prompts import read_prompts
from tests.generation.writers import causal, encoder_decoder, some_prompts, spaced, words
from tests.tiny import bert, tokenizer


def generate(tmp_path, **changes):
    asked = {"teacher": causal(), "prompts": ["w1 w2"], "tokenizer": words(), "max_new_tokens": 4, **changes}
    return generate_answers(output=tmp_path / "out", **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.5}, "do_sample"),
        ({"generation_temperature": 2.0}, "do_sample"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"generation_kwargs": {"length_penalty": 0.5}}, "num_beams"),
        ({"generation_kwargs": {"lenght_penalty": 0.5}}, "Did you mean 'length_penalty'"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_temperature"),
        ({"generation_kwargs": {"num_beams": 2}}, "an argument of its own"),
        ({"generation_kwargs": {"max_time": 2}}, "speed of the machine"),
        ({"generation_kwargs": "[1]"}, "no JSON object"),
        ({"generation_kwargs": "{oops"}, "no JSON object"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 64}, "no room for a prompt in the teacher's window of 64"),
        ({"prompts": ["w1 " * 40], "max_new_tokens": 30}, r"more than the 34 tokens .* row 0 \(41 tokens\)"),
        ({"prompts": ["", " "]}, "2 have an empty 'prompt'"),
        ({"prompts": [[{"role": "user", "content": "w1"}]]}, "no chat template"),
        ({"prompts": Dataset.from_dict({"question": ["w1"]})}, "none of the columns prompt, messages, text"),
        ({"column": "question"}, "no column 'question'; there are: prompt"),
        ({"tokenizer": None}, "comes without its tokenizer"),
        ({"tokenizer": tokenizer()}, "no answer would ever end"),
        ({"tokenizer": words([f"v{i}" for i in range(200)]), "prompts": ["v150"]}, "embeddings for 97"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "this one is a module"),
        ({"teacher": "somewhere", "teacher_model_init_kwargs": {"token": "hf_x"}}, "HF_TOKEN"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    if "would ever end" in message:
        changes["teacher"] = causal()
        changes["teacher"].generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_what_is_no_teacher_no_prompt_and_no_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="BertForSequenceClassification generates no text"):
        generate(tmp_path, teacher=bert())
    with pytest.raises(TypeError, match="Row 0 of the prompts: 3 is neither a text nor a list of messages"):
        generate(tmp_path, prompts=Dataset.from_dict({"prompt": [3]}))
    with pytest.raises(TypeError, match="temperature"):
        generate(tmp_path, temperature=2.0)


def test_prompts_without_room_may_be_left_out(tmp_path):
    prompts = ["w1 " * 40, "w2", "w3 " * 33]
    summary = generate(tmp_path, prompts=prompts, max_new_tokens=30, skip_long_prompts=True)
    assert (summary.rows, summary.counts["too_long"]) == (2, 1)
    # The window of an encoder-decoder model's prompts is not that of its answers, and T5 has none.
    summary = generate_answers(encoder_decoder(), prompts, tmp_path / "t5", tokenizer=words(), max_new_tokens=30)
    assert summary.rows == 3


def test_without_a_padding_token_the_end_pads(tmp_path):
    teacher, prompts = causal(), some_prompts(5)
    assert spaced().pad_token is None
    generate(tmp_path, teacher=teacher, prompts=prompts, tokenizer=spaced(), batch_size=5, save_steps=1)
    together = load_dataset(str(tmp_path / "out"), split="train").to_list()
    for row in together:
        generate_answers(teacher, [row["prompt"]], tmp_path / row["prompt"], tokenizer=spaced(), max_new_tokens=4)
        assert load_dataset(str(tmp_path / row["prompt"]), split="train").to_list() == [row]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "txt"])
def test_prompts_come_from_files(tmp_path, suffix):
    texts, path = ["w1 w2", "w3"], tmp_path / f"prompts.{suffix}"
    if suffix == "txt":
        path.write_text("w1 w2\nw3\n", encoding="utf-8")
    else:
        getattr(Dataset.from_dict({"text": texts}), f"to_{suffix.removesuffix('l')}")(path)
    assert read_prompts(path, split="train", dataset_config=None)["text"][:] == texts
    assert read_prompts(str(path), split="train[:1]", dataset_config=None)["text"][:] == texts[:1]


def test_prompts_come_from_folders(tmp_path):
    data = Dataset.from_dict({"prompt": ["w1", "w2"]})
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files/test.parquet")
    for folder, split, expected in (("one", "train", 2), ("splits", "test", 1), ("files", "test", 2)):
        assert len(read_prompts(tmp_path / folder, split=split, dataset_config=None)) == expected
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_prompts(tmp_path / "splits", split="dev", dataset_config=None)


def test_a_window_ends_where_the_teachers_positions_do(tmp_path):
    """Exactly as many tokens as fit are taken, and the teacher is never asked for one position more."""
    teacher, longest = causal(), []
    teacher.model.register_forward_pre_hook(
        lambda _, args, kwargs: longest.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    teacher.generation_config.eos_token_id = 96
    with torch.no_grad():
        teacher.lm_head.weight[[3, 96]] = -10.0 * teacher.lm_head.weight[5]
    generate(tmp_path, teacher=teacher, prompts=["w1 " * 33], max_new_tokens=30)
    assert max(longest) <= 63
