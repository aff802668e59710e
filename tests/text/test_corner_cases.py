"""Raw text at its edges: how a tokenizer pads, rows that nobody can answer, settings that change."""

import warnings

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from hf_distill.text.formats import RowTokenizer, TextFormat
from hf_distill.text.preparation import prepare_text
from tests import tiny
from tests.on_policy_cases import on_policy_trainer, window
from tests.text.corpus import PLAIN_TEMPLATE, SENTENCES, talk, tokenizer
from tests.text.models import pair
from tests.text.test_text_setup import TEXTS, make_trainer
from tests.tokenizers_of_text import sentence_piece
from tests.training import arguments


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_side_on_which_the_tokenizer_pads_changes_nothing(tmp_path, name):
    rows = Dataset.from_list([{"text": "the"}, {"text": SENTENCES[0]}])
    made = tokenizer()
    made.padding_side = "left"
    found = [
        make_trainer(
            tmp_path, pair(name), train_dataset=rows, processing_class=made, per_device_eval_batch_size=size
        ).evaluate(rows)["eval_loss"]
        for size in (1, 2)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert made.padding_side == "left"


@pytest.mark.parametrize("begins", [False, True])
def test_empty_texts_are_left_out_whatever_the_tokenizer_puts_around_them(begins):
    made = RowTokenizer(tokenizer(begins=begins), TextFormat.TEXT)({"text": ["", "a ship"]}, [0, 1])
    assert len(made["input_ids"]) == 1


ENDS = [
    ({"text": "a ship"}, True),
    ({"prompt": "a", "completion": " ship"}, True),
    ({"messages": talk("a", "b")}, False),
]


@pytest.mark.parametrize(("row", "is_warned"), ENDS, ids=["text", "completion", "messages"])
def test_texts_without_an_end_because_the_tokenizer_has_none_are_warned_of(tmp_path, row, is_warned):
    rows, args = Dataset.from_list([row] * 3), arguments(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare_text(rows, tokenizer(PLAIN_TEMPLATE, eos_token=None), args)
        said = [str(each.message) for each in seen if "eos_token" in str(each.message)]
        prepare_text(rows, tokenizer(PLAIN_TEMPLATE), args)
        assert len([each for each in seen if "eos_token" in str(each.message)]) == len(said) == is_warned
    assert all("tokenizer.eos_token = " in each for each in said)


def test_a_tokenizer_that_ends_its_texts_itself_needs_no_end_token(tmp_path):
    made = tokenizer(eos_token=None, sep_token="<|end|>")
    end = ("<|end|>", made.sep_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[end])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = prepare_text(Dataset.from_list([{"text": "a ship"}]), made, arguments(tmp_path))
    assert row["input_ids"][-1] == made.sep_token_id


def test_texts_to_evaluate_that_are_longer_than_a_table_of_positions_are_refused(tmp_path):
    long = Dataset.from_list([{"text": " ".join(SENTENCES * 4)}])
    with pytest.raises(ValueError, match=r"eval_dataset.*knows 64 positions"):
        make_trainer(tmp_path, pair("gpt2"), eval_dataset=long, max_length=128)
    with pytest.raises(ValueError, match=r"Texts of b .*knows 64 positions"):
        make_trainer(tmp_path, pair("gpt2"), eval_dataset={"a": TEXTS, "b": long}, max_length=128)


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"prompt": "", "completion": "came"}, {}, "1 of the 5 rows .* no prompt"),
        ({"prompt": "the ship", "completion": " ".join(SENTENCES)}, {"truncation_mode": "keep_end"}, "no prompt"),
        (
            {"prompt": " ".join(SENTENCES * 4), "completion": "came"},
            {"max_length": 64},
            "fill the student's context of 64.*max_length=63",
        ),
    ],
)
def test_rows_that_cannot_be_answered_are_refused_with_the_trainer(tmp_path, row, options, match):
    rows = Dataset.from_list([{"prompt": "the ship ", "completion": "came"}] * 4 + [row])
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, train_dataset=rows, lmbda=0.5, **options)


def test_a_kept_beginning_is_no_prompt(tmp_path):
    rows = [{"prompt": "the ship ", "completion": "came"}] * 4
    rows.append({"prompt": "the ship", "completion": " ".join(SENTENCES)})
    options = {"processing_class": tokenizer(begins=True), "truncation_mode": "keep_end", "lmbda": 0.5}
    with pytest.raises(ValueError, match=r"1 of the 5 rows .* no prompt"):
        make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), **options)


@pytest.mark.parametrize("change", [{"max_length": 3}, {"packing": True}])
def test_text_settings_changed_after_the_text_was_tokenised_are_refused(tmp_path, change):
    trainer = make_trainer(tmp_path)
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* after the text was tokenised"):
        trainer.train()


def test_a_completion_gets_no_space_that_the_text_does_not_have():
    made = RowTokenizer(sentence_piece(bos=False), TextFormat.COMPLETION)(
        {"prompt": ["the cat "], "completion": ["sat"]}, [0]
    )
    assert made["input_ids"][0][:3] == sentence_piece(bos=False)("the cat ")["input_ids"]
    assert sentence_piece(bos=False).decode(made["input_ids"][0], skip_special_tokens=True) == "the cat sat"


OWN = [
    {"min_length": 60},
    {"min_new_tokens": 6},
    {"top_h": 0.1},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"sequence_bias": {(5,): 99.0}},
    {"forced_eos_token_id": 2},
    {"stop_strings": ["zz"]},
    {"max_time": 1e-9},
    {"return_dict_in_generate": True},
    {"prompt_lookup_num_tokens": 2},
    {"early_stopping": True},
    {"encoder_repetition_penalty": 9.0},
    {"guidance_scale": 9.0},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_no_setting_of_a_models_own_changes_its_samples(tmp_path, own):
    def labels(**settings):
        models = tiny.pair("llama")
        models[0].generation_config.eos_token_id = [*range(2, 30)]
        for name, value in settings.items():
            setattr(models[0].generation_config, name, value)
        (batch,), _ = window(on_policy_trainer(tmp_path, models=models))
        return batch["labels"].tolist()

    assert labels(**own) == labels()


@pytest.mark.parametrize("content", ["the ship", " the ship ", ""])
def test_an_answer_that_was_cut_off_does_not_end_in_a_conversation_either(content):
    from tests.text.corpus import PLAIN_TEMPLATE, supervised

    made = tokenizer(PLAIN_TEMPLATE)
    rows = {
        "prompt": [[{"role": "user", "content": "the ship"}]] * 2,
        "completion": [[{"role": "assistant", "content": content}]] * 2,
        "finished": [True, False],
    }
    columns = RowTokenizer(made, TextFormat.COMPLETION)(rows, [0, 1])
    whole, cut = [supervised(made, {k: v[i] for k, v in columns.items()}) for i in (0, 1)]
    assert whole.endswith("<|end|>")
    assert cut.strip() == content.strip()
