"""Missing labels are filled so that any collator works, and the teacher's columns are padded apart."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

from hf_distill import DistillationCollator
from hf_distill.collator import is_incomplete, is_missing
from hf_distill.dataset_checks import label_filler
from hf_distill.items import LABEL_MASK
from hf_distill.row_weights import RowWeights
from hf_distill.signals import Task
from hf_distill.weighting import ITEM_WEIGHT, ColumnWeights
from tests.tiny import tokenizer


def collator(task=Task.SEQUENCE_CLASSIFICATION, inner=default_data_collator, **options):
    return DistillationCollator(inner, task=task, **options)


@pytest.mark.parametrize(
    ("label", "missing", "incomplete"),
    [
        (None, True, True),
        (-100, True, True),
        (math.nan, True, True),
        ([], True, True),
        ([-100, -100], True, True),
        ([None, None], True, True),
        ([math.nan, 1.0], False, True),
        ([-100, 3], False, True),
        (0, False, False),
        (-1, False, False),
        (0.0, False, False),
        ([0, 0], False, False),
        (torch.tensor(2), False, False),
        (torch.tensor([math.nan, math.nan]), True, True),
        (np.int64(-100), True, True),
        (True, False, False),
    ],
)
def test_a_label_is_missing_or_incomplete(label, missing, incomplete):
    assert is_missing(label) == missing
    assert is_incomplete(label) == incomplete


FORMS = {
    "None": lambda row: {**row, "labels": None},
    "-100": lambda row: {**row, "labels": -100},
    "nan": lambda row: {**row, "labels": math.nan},
    "no key": lambda row: {key: value for key, value in row.items() if key != "labels"},
}


@given(st.lists(st.sampled_from([None, *FORMS]), min_size=1, max_size=6))
def test_any_mixture_of_missing_labels_becomes_one_tensor_and_its_mask(forms):
    data = [{"input_ids": [5, i], "labels": i % 3} for i in range(len(forms))]
    given_rows = [row if form is None else FORMS[form](row) for row, form in zip(data, forms, strict=True)]
    before = [dict(row) for row in given_rows]
    batch = collator()(given_rows)
    assert str(given_rows) == str(before), "the rows themselves are left alone"
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in data]
    if {*forms} == {"no key"}:
        assert "labels" not in batch
        assert LABEL_MASK not in batch
        return
    assert batch["labels"].tolist() == [i % 3 if form is None else -100 for i, form in enumerate(forms)]
    assert batch["labels"].dtype == torch.long
    if None in forms and {*forms} == {None}:
        assert LABEL_MASK not in batch
    else:
        assert batch[LABEL_MASK].tolist() == [form is None for form in forms]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
@pytest.mark.parametrize("first", [0, 1])
def test_many_labels_are_filled_as_the_kind_of_array_they_are(kind, first):
    data = [{"labels": kind([0.0, 1.0])}, {"labels": kind([1.0, 1.0])}]
    data[first]["labels"] = None
    batch = collator(filler=[math.nan] * 2)(data)
    assert batch["labels"].isnan().all(-1).tolist() == [first == 0, first == 1]
    assert batch["labels"][1 - first].tolist() == [[0.0, 1.0], [1.0, 1.0]][1 - first]


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float64])
def test_whole_floats_are_classes_and_others_are_left_to_fail(kind):
    batch = collator()([{"labels": kind(2.0)}, {"labels": kind(1.0)}])
    assert batch["labels"].tolist() == [2, 1]
    assert batch["labels"].dtype == torch.long
    assert collator(filler=math.nan)([{"labels": kind(2.0)}])["labels"].is_floating_point()
    assert collator()([{"labels": kind(0.5)}])["labels"].is_floating_point()


def test_a_span_needs_both_ends():
    rows = [{"start_positions": 1, "end_positions": 2}, {"start_positions": 3, "end_positions": None}]
    batch = collator(Task.QUESTION_ANSWERING)(rows)
    assert batch["start_positions"].tolist() == [1, -100]
    assert batch["end_positions"].tolist() == [2, -100]
    assert batch[LABEL_MASK].tolist() == [True, False]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_tokens_without_labels_are_ignored_ones_and_need_no_mask(kind):
    rows = [{"input_ids": kind([5, 6, 7]), "labels": kind([0, -100, 2])}, {"input_ids": kind([5, 6, 7])}]
    batch = collator(Task.TOKEN_CLASSIFICATION)(rows[::-1])
    assert batch["labels"].tolist() == [[-100] * 3, [0, -100, 2]]
    assert LABEL_MASK not in batch


def test_spoken_rows_without_text_stack_with_the_others():
    rows = [{"input_values": [0.1], "labels": [3, 4, -100]}, {"input_values": [0.2], "labels": None}]
    batch = collator(Task.CTC, filler=[-100])(rows)
    assert batch["labels"].tolist() == [[3, 4, -100], [-100] * 3]
    assert batch[LABEL_MASK].tolist() == [True, False]


def test_a_language_models_labels_are_the_collators_own_affair():
    inner = DataCollatorForSeq2Seq(tokenizer())
    rows = [{"input_ids": [5, 6], "labels": [7, 8]}, {"input_ids": [5], "labels": [9]}]
    batch = collator(Task.SEQ2SEQ_LM, inner)([dict(row) for row in rows])
    plain = inner([dict(row) for row in rows])
    assert {key: value.tolist() for key, value in batch.items()} == {k: v.tolist() for k, v in plain.items()}


def test_rows_that_are_no_mappings_are_the_collators_own_affair():
    assert collator(inner=lambda rows: {"sum": sum(rows)})([1, 2, 3]) == {"sum": 6}


def test_teachers_columns_are_padded_by_its_tokenizer_and_come_last():
    rows = [{"teacher_input_ids": [5] * n, "input_ids": [6, 7], "label": 1} for n in (1, 4)]
    inner = DataCollatorWithPadding(tokenizer())
    batch = collator(inner=inner, teacher_processing_class=tokenizer(padding_side="left"))(rows)
    assert batch["teacher_input_ids"].tolist() == [[0, 0, 0, 5], [5, 5, 5, 5]]
    assert batch["teacher_attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[6, 7], [6, 7]]
    assert not next(iter(batch)).startswith("teacher_"), "accelerate reads the batch size off the first key"


def test_the_columns_of_weights_are_taken_off_and_the_weights_come_before_the_teachers_columns():
    rows = [
        {"input_ids": [6, 7], "trust": 2.0, "label": None, "teacher_input_ids": [5]},
        {"input_ids": [6], "trust": 1},
    ]
    rows[1] |= {"label": 1, "teacher_input_ids": [5, 5]}
    before = [dict(row) for row in rows]
    weights = RowWeights([ColumnWeights("trust")], task=Task.SEQUENCE_CLASSIFICATION)
    inner = DataCollatorWithPadding(tokenizer())
    batch = collator(inner=inner, teacher_processing_class=tokenizer(), row_weights=weights)(rows)
    assert rows == before, "the rows themselves are left alone"
    names = ["labels", LABEL_MASK, ITEM_WEIGHT, "teacher_input_ids", "teacher_attention_mask"]
    assert [*batch] == ["input_ids", "attention_mask", *names]
    assert batch[ITEM_WEIGHT].tolist() == [2, 1]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_ragged_columns_of_the_teachers_are_refused_without_its_tokenizer(kind):
    rows = [{"teacher_input_ids": kind([5] * n), "input_ids": [6]} for n in (1, 4)]
    with pytest.raises(ValueError, match=r"columns teacher_input_ids have rows of different lengths.*teacher_proc"):
        collator()(rows)


def test_it_looks_like_the_collator_inside_and_can_be_pickled():
    outer = collator(inner=DataCollatorWithPadding(tokenizer()))
    assert outer.tokenizer is outer.collator.tokenizer
    with pytest.raises(AttributeError, match="nonsense"):
        _ = outer.nonsense
    copied = pickle.loads(pickle.dumps(outer))
    assert copied([{"input_ids": [5], "label": None}])[LABEL_MASK].tolist() == [False]


@pytest.mark.parametrize(
    ("task", "options", "label", "filler"),
    [
        (Task.SEQUENCE_CLASSIFICATION, {}, 1, -100),
        (Task.SEQUENCE_CLASSIFICATION, {}, 1.0, -100),
        (Task.SEQUENCE_CLASSIFICATION, {}, None, -100),
        (Task.SEQUENCE_CLASSIFICATION, {"num_labels": 1}, 0.5, math.nan),
        (Task.SEQUENCE_CLASSIFICATION, {"num_labels": 1}, None, math.nan),
        (Task.SEQUENCE_CLASSIFICATION, {"problem_type": "regression"}, None, math.nan),
        (Task.SEQUENCE_CLASSIFICATION, {"num_labels": 3}, [0.0, 1.0, 1.0], [math.nan] * 3),
        (
            Task.SEQUENCE_CLASSIFICATION,
            {"problem_type": "multi_label_classification", "num_labels": 3},
            None,
            [math.nan] * 3,
        ),
        (Task.MULTIPLE_CHOICE, {}, 2, -100),
        (Task.QUESTION_ANSWERING, {}, None, -100),
        (Task.QUESTION_ANSWERING, {}, [4], [-100]),
        (Task.CTC, {}, [3, 4], [-100]),
    ],
)
def test_the_filler_has_the_shape_and_type_of_the_labels(task, options, label, filler):
    made = label_filler(task, BertConfig(**options), label)
    assert type(made) is type(filler)
    np.testing.assert_array_equal(made, filler)
