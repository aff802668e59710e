"""Weights made of columns reach the batch where the tokens are, whatever the collator; no model sees the columns."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from hf_distill import DistillationCollator
from hf_distill.row_weights import RowWeights
from hf_distill.signals import Task
from hf_distill.weighting import ITEM_GROUP, ITEM_WEIGHT, ColumnWeights, GroupWeights, PhraseWeights
from tests.test_phrases import byte_bpe, wordpiece
from tests.tiny import tokenizer

LENGTHS = (3, 7, 1, 5)


def collate(rows, inner, task, *weights, **options):
    return DistillationCollator(inner, task=task, row_weights=RowWeights(weights, task=task, **options))(rows)


def token_rows(column="input_ids"):
    """Rows of different lengths, whose weights are a function of their ids."""
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = [5 + (3 * number + 7 * place) % 90 for place in range(length)]
        row = {"input_ids": ids, "attention_mask": [1] * length}
        rows.append({**row, column: ids, "w": [weight_of(i) for i in ids]})
    return rows


def weight_of(token):
    return 0.25 * (token % 9)


def language_model(tokens, **options):
    return DataCollatorForLanguageModeling(tokens, **options)


COLLATORS = {
    "causal": (Task.CAUSAL_LM, lambda tokens: language_model(tokens, mlm=False)),
    "masked": (Task.MASKED_LM, lambda tokens: language_model(tokens, mlm_probability=0.9, pad_to_multiple_of=4)),
    "tokens": (Task.TOKEN_CLASSIFICATION, DataCollatorForTokenClassification),
    "translation": (Task.SEQ2SEQ_LM, DataCollatorForSeq2Seq),
}


@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_weights_of_tokens_are_padded_as_the_tokens_are(name, side, kind):
    task, make = COLLATORS[name]
    ids = "labels" if task is Task.SEQ2SEQ_LM else "input_ids"
    rows = token_rows(ids)
    if task is Task.TOKEN_CLASSIFICATION:
        rows = [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
    if kind is not list:
        rows = [{key: kind(value) for key, value in row.items()} for row in rows]
    if kind is torch.tensor and name in ("tokens", "translation"):
        rows = [{**row, "labels": row["labels"].tolist()} for row in rows]
    tokens = tokenizer(padding_side=side)
    batch = collate(rows, make(tokens), task, ColumnWeights("w"), tokenizer=tokens)
    assert "w" not in batch
    assert batch[ITEM_WEIGHT].dtype == torch.float32
    width = batch[ids].shape[-1]
    expected = torch.ones(len(rows), width)
    for number, row in enumerate(rows):
        own = torch.tensor([weight_of(int(token)) for token in row[ids]])
        place = slice(width - len(own), width) if side == "left" else slice(0, len(own))
        expected[number, place] = own
    torch.testing.assert_close(batch[ITEM_WEIGHT], expected, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_tells_the_side_even_where_the_tokenizer_says_another_or_is_not_known(side):
    inner = language_model(tokenizer(padding_side=side), mlm_probability=1.0)
    for tokens in (None, tokenizer(padding_side="left" if side == "right" else "right")):
        weights = collate(token_rows(), inner, Task.MASKED_LM, ColumnWeights("w"), tokenizer=tokens)[ITEM_WEIGHT]
        own = [weight_of(token) for token in token_rows()[0]["input_ids"]]
        assert (weights[0, -3:] if side == "left" else weights[0, :3]).tolist() == own


def test_rows_that_were_padded_before_keep_their_places():
    rows = [
        {"input_ids": [0, 0, 8], "attention_mask": [0, 0, 1], "w": [1, 1, 3.0]},
        {"input_ids": [7, 6, 5], "attention_mask": [1, 1, 1], "w": [1, 2.0, 1]},
    ]
    batch = collate(rows, language_model(tokenizer(), mlm=False), Task.CAUSAL_LM, ColumnWeights("w"))
    assert batch[ITEM_WEIGHT].tolist() == [[1, 1, 3], [1, 2, 1]]


def test_a_collator_may_drop_the_token_that_a_decoder_starts_with():
    def inner(rows):
        labels = DataCollatorForSeq2Seq(tokenizer())([{"input_ids": [5], "labels": row["labels"]} for row in rows])
        return {"labels": labels["labels"][:, 1:]}

    rows = [{"labels": [2, 7, 7, 7], "w": [9, 1, 2, 3]}, {"labels": [2, 7], "w": [9, 4]}]
    batch = collate(rows, inner, Task.SEQ2SEQ_LM, ColumnWeights("w"), tokenizer=tokenizer())
    assert batch[ITEM_WEIGHT].tolist() == [[1, 2, 3], [4, 1, 1]]


def test_a_collator_may_cut_what_can_be_recognised_and_nothing_else():
    def cut(rows, at=slice(3)):
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])[:, at]}

    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "w": [1, 2, 3, 4, 5, 6]}]
    assert collate(rows, cut, Task.MASKED_LM, ColumnWeights("w"))[ITEM_WEIGHT].tolist() == [[1, 2, 3]]
    last = collate(rows, lambda rows: cut(rows, slice(-3, None)), Task.MASKED_LM, ColumnWeights("w"))
    assert last[ITEM_WEIGHT].tolist() == [[4, 5, 6]]
    with pytest.raises(ValueError, match="collator made 3 input_ids of a row's 6, and which of them are left cannot"):
        collate(rows, lambda rows: cut(rows, slice(2, 5)), Task.MASKED_LM, ColumnWeights("w"))


def test_packed_rows_have_their_weights_one_after_another():
    rows = [{"input_ids": [5, 6, 7], "w": [1, 2, 3], "g": "a"}, {"input_ids": [8, 9], "w": 4, "g": "b"}]
    weights = (ColumnWeights("w"), GroupWeights("g", follow="loss"))
    sizes = {"g": {"a": 1, "b": 1}}
    batch = collate(rows, DataCollatorWithFlattening(), Task.CAUSAL_LM, *weights, group_sizes=sizes)
    assert batch["input_ids"].shape == (1, 5)
    assert batch[ITEM_WEIGHT].tolist() == [[1, 2, 3, 4, 4]]
    assert batch[ITEM_GROUP].tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("make", [wordpiece, byte_bpe])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("truncation", ["left", "right"])
def test_phrases_weigh_tokens_after_padding_and_truncation(make, side, truncation):
    tokens = make(padding_side=side, truncation_side=truncation)
    texts = ["heart attack, not just any art, heart attack", "heart attack", "art"]
    rows = [{"text": text, **tokens(text, truncation=True, max_length=9)} for text in texts]
    batch = collate(
        rows,
        language_model(tokens, mlm=False),
        Task.CAUSAL_LM,
        PhraseWeights(("heart attack", "心肌梗死")),
        tokenizer=tokens,
    )
    heavy = [
        tokens.decode([i for i, w in zip(ids, row, strict=True) if w != 1.0]).replace(" ##", "")
        for ids, row in zip(batch["input_ids"].tolist(), batch[ITEM_WEIGHT].tolist(), strict=True)
    ]
    assert "text" not in batch
    assert [text.strip() for text in heavy] == ["heart attack", "heart attack", ""]
    middle = len(batch[ITEM_WEIGHT][0]) // 2
    is_first = bool((batch[ITEM_WEIGHT][0, :middle] > 1).any())
    assert is_first == (truncation == "right")
    assert {*batch[ITEM_WEIGHT].unique().tolist()} == {1.0, torch.tensor(1.3).item()}


def test_phrases_of_a_target_weigh_its_labels():
    tokens = wordpiece()
    rows = [
        {**tokens("art"), "labels": tokens(target)["input_ids"], "target": target} for target in ("heart", "a art art")
    ]
    inner = DataCollatorForSeq2Seq(tokens)
    batch = collate(
        rows, inner, Task.SEQ2SEQ_LM, PhraseWeights(("heart",), boost=1, text_column="target"), tokenizer=tokens
    )
    assert batch[ITEM_WEIGHT].shape == batch["labels"].shape
    assert batch[ITEM_WEIGHT][0, :4].tolist() == [1, 2, 1, 1]
    assert bool((batch[ITEM_WEIGHT][1] == 1).all())


def test_a_collator_that_tokenizes_gets_the_text():
    tokens = wordpiece()

    def inner(rows):
        return {**tokens([row["text"] for row in rows], padding=True, return_tensors="pt")}

    rows = [{"text": "a heart attack"}, {"text": "heart"}]
    batch = collate(rows, inner, Task.CAUSAL_LM, PhraseWeights(("heart",), boost=1), tokenizer=tokens)
    assert batch[ITEM_WEIGHT].tolist() == [[1, 1, 2, 1, 1, 1], [1, 2, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "task", [Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING, Task.MULTIPLE_CHOICE, Task.CTC]
)
def test_where_items_are_rows_a_phrase_weighs_its_row_and_needs_no_tokenizer(task):
    rows = [{"input_ids": [5], "text": text} for text in ("heart attack", "art", ["a", "an attack"], "attack")]
    index = (PhraseWeights(("heart attack",), boost=0.3), PhraseWeights(("attack",), boost=1))
    batch = collate(rows, default_data_collator, task, *index)
    assert batch[ITEM_WEIGHT].tolist() == pytest.approx([2.6, 1, 2, 2])
    assert batch[ITEM_WEIGHT].shape == (4,)
    assert {*batch} == {"input_ids", ITEM_WEIGHT}


def test_several_weights_multiply_and_rows_with_one_weight_give_it_to_all_their_tokens():
    rows = [
        {"input_ids": [5, 6], "attention_mask": [1, 1], "w": [1, 2], "q": 3, "g": "de"},
        {"input_ids": [5], "attention_mask": [1], "w": 5.0, "q": 2, "g": "en"},
    ]
    weights = (ColumnWeights("w"), ColumnWeights("q"), GroupWeights("g", weights=(("de", 10), ("en", 0))))
    batch = collate(rows, language_model(tokenizer(), mlm=False), Task.CAUSAL_LM, *weights)
    assert batch[ITEM_WEIGHT].tolist() == [[30, 60], [0, 1]]
    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "q")} for row in rows]
    plain = collate(rows, language_model(tokenizer(), mlm=False), Task.CAUSAL_LM, ColumnWeights("q"))
    assert plain[ITEM_WEIGHT].tolist() == [3, 2]


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), "2"])
def test_groups_are_numbers_or_texts_of_any_kind(value):
    rows = [{"input_ids": [5], "g": value}]
    for written in (2, "2"):
        weights = GroupWeights("g", weights=((written, 7),))
        batch = collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, weights)
        assert batch[ITEM_WEIGHT].tolist() == [7]


def test_a_group_weighs_by_size_and_one_of_the_evaluation_alone_weighs_one():
    rows = [{"input_ids": [5], "g": group} for group in ("en", "sw", "new")]
    sizes = {"g": {"en": 3, "sw": 1}}
    weights = GroupWeights("g", size_power=0)
    batch = collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, weights, group_sizes=sizes)
    assert batch[ITEM_WEIGHT].tolist() == pytest.approx([4 / 6, 2, 1])


def test_groups_that_follow_the_loss_are_numbered_and_others_come_last():
    rows = [{"input_ids": [5], "g": group} for group in ("en", "new", "de")]
    maker = RowWeights(
        [GroupWeights("g", follow="loss"), PhraseWeights(("a",))],
        task=Task.SEQUENCE_CLASSIFICATION,
        group_sizes={"g": {"en": 0, "de": 0}},
    )
    collator = DistillationCollator(
        default_data_collator, task=Task.SEQUENCE_CLASSIFICATION, row_weights=maker.for_evaluation()
    )
    batch = collator(rows)
    assert {*batch} == {"input_ids", ITEM_GROUP}, "an evaluation needs no text"
    assert batch[ITEM_GROUP].tolist() == [1, 2, 0]
    assert batch[ITEM_GROUP].dtype == torch.int64
    with pytest.raises(ValueError, match="no column 'text'"):
        maker(rows, batch)


def test_a_group_without_a_weight_is_refused_or_has_the_default():
    rows = [{"input_ids": [5], "g": "no"}]
    with pytest.raises(ValueError, match=r"group 'no', and weights are given for False, en alone.*YAML reads"):
        collate(
            rows,
            default_data_collator,
            Task.SEQUENCE_CLASSIFICATION,
            GroupWeights("g", weights=(("en", 1), (False, 2))),
        )
    with pytest.raises(ValueError, match=r"weights are given for en alone. Add its weight, or a default.$"):
        collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, GroupWeights("g", weights=(("en", 1),)))
    weights = GroupWeights("g", weights=(("en", 1),), default=0.5)
    assert collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, weights)[ITEM_WEIGHT].tolist() == [0.5]


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan")])
def test_a_missing_group_is_no_group_by_the_name_of_none(value):
    rows, task = [{"input_ids": [5], "g": value}, {"input_ids": [5], "g": "None"}], Task.SEQUENCE_CLASSIFICATION
    weights = {"None": 3.0, "nan": 4.0}
    made = collate(rows, default_data_collator, task, GroupWeights("g", weights=weights, default=0.5))
    assert made[ITEM_WEIGHT].tolist() == [0.5, 3]
    sizes = {"g": {"None": 1, "nan": 1}}
    made = collate(rows, default_data_collator, task, GroupWeights("g", follow="loss"), group_sizes=sizes)
    assert made[ITEM_GROUP].tolist() == [2, 0]
    for setting in (GroupWeights("g", weights=weights), GroupWeights("g", size_power=0.5)):
        with pytest.raises(ValueError, match=r"A row has no 'g', by which rows are weighed. Fill it in"):
            collate(rows, default_data_collator, task, setting, group_sizes=sizes)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), None, "much", [1, -2], [1, None]])
def test_what_is_no_weight_is_refused_with_its_value(value):
    rows = [{"input_ids": [5, 6], "w": 1}, {"input_ids": [5, 6], "w": value}]
    with pytest.raises(ValueError, match=r"Column 'w' holds .*, but weights are finite numbers >= 0") as caught:
        collate(rows, default_data_collator, Task.CAUSAL_LM, ColumnWeights("w"))
    assert repr(value) in str(caught.value)


def test_weights_that_do_not_fit_are_refused():
    lists = [{"input_ids": [5, 6], "w": [1, 2]}]
    for task in (Task.SEQUENCE_CLASSIFICATION, Task.CTC, Task.QUESTION_ANSWERING):
        with pytest.raises(
            ValueError, match=r"shape \(2,\), but the items of .* take one weight per row. Make it a num"
        ):
            collate(lists, default_data_collator, task, ColumnWeights("w"))
    with pytest.raises(ValueError, match="A row has 1 weights for 2 input_ids"):
        collate([{"input_ids": [5, 6], "w": [1]}], default_data_collator, Task.CAUSAL_LM, ColumnWeights("w"))
    with pytest.raises(ValueError, match=r"A row has no column 'w'.* \(it has input_ids\)"):
        collate(
            [{"input_ids": [5], "w": 1}, {"input_ids": [5]}], default_data_collator, Task.CAUSAL_LM, ColumnWeights("w")
        )
    with pytest.raises(ValueError, match="Weights of tokens need input_ids in the batch, which holds x"):
        collate(lists, lambda rows: {"x": torch.ones(1)}, Task.CAUSAL_LM, ColumnWeights("w"))


def test_columns_that_others_read_stay_in_the_rows():
    rows = [{"input_ids": [5], "label": 1, "domain": 0, "w": 2}]
    weights = (
        GroupWeights("label", weights=((1, 3),)),
        GroupWeights("domain", weights=((0, 1),)),
        ColumnWeights("w"),
    )
    batch = collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, *weights, kept=frozenset({"domain"}))
    assert {*batch} == {"input_ids", "labels", "domain", ITEM_WEIGHT}
    assert batch[ITEM_WEIGHT].tolist() == [6]


def test_a_teachers_name_does_not_hide_a_weight_from_its_reader():
    rows = [{"input_ids": [5], "teacher_input_ids": [6], "teacher_trust": 2.0}]
    batch = collate(rows, default_data_collator, Task.SEQUENCE_CLASSIFICATION, ColumnWeights("teacher_trust"))
    assert {*batch} == {"input_ids", "teacher_input_ids", ITEM_WEIGHT}
    assert batch[ITEM_WEIGHT].tolist() == [2]


def test_data_loader_workers_make_the_same_batches():
    tokens = wordpiece()
    texts = ["a heart attack", "art", "心肌梗死"]
    rows = [{"text": text, "g": "en", **tokens(text)} for text in texts]
    weights = (PhraseWeights(("heart attack", "心肌梗死")), GroupWeights("g", follow="loss"))
    collator = DistillationCollator(
        DataCollatorWithPadding(tokens),
        task=Task.TOKEN_CLASSIFICATION,
        row_weights=RowWeights(
            weights, task=Task.TOKEN_CLASSIFICATION, tokenizer=tokens, group_sizes={"g": {"en": 3}}
        ),
    )
    here = collator(rows)
    (there,) = DataLoader(rows, batch_size=3, collate_fn=pickle.loads(pickle.dumps(collator)), num_workers=1)
    assert {*here} == {*there} == {"input_ids", "attention_mask", ITEM_WEIGHT, ITEM_GROUP}
    for name in here:
        assert here[name].tolist() == there[name].tolist()
