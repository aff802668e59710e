"""Labels by name and vocabularies by token, as pure functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.alignment import label_order, ordered_classes, vocabulary_overlap

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=8, unique_by=str.casefold)


def table(names):
    return dict(enumerate(names))


@given(NAMES, st.randoms(use_true_random=False))
def test_the_order_finds_every_name_of_the_student_at_the_teacher(names, random):
    shuffled = [name.upper() for name in names]
    random.shuffle(shuffled)
    order = label_order(table(names), table(shuffled))
    found = range(len(names)) if order is None else order
    assert [shuffled[i] for i in found] == [name.upper() for name in names]
    assert (order is None) == (shuffled == [name.upper() for name in names])


@given(NAMES, st.randoms(use_true_random=False))
def test_ordered_classes_puts_the_teachers_logits_where_the_students_are(names, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    order = label_order(table(names), table(shuffled))
    by_name = {name: float(i) for i, name in enumerate(shuffled)}
    logits = torch.tensor([[by_name[name] for name in shuffled]] * 2)
    moved = ordered_classes(logits, order=None if order is None else torch.tensor(order), classes=None)
    assert moved.tolist() == [[by_name[name] for name in names]] * 2


@given(NAMES, NAMES)
def test_other_names_are_refused_with_those_that_one_side_has(mine, theirs):
    only_mine = {name.casefold() for name in mine} - {name.casefold() for name in theirs}
    only_theirs = {name.casefold() for name in theirs} - {name.casefold() for name in mine}
    if not only_mine and not only_theirs:
        label_order(table(mine), table(theirs))
        return
    with pytest.raises(ValueError, match="label sets differ") as refusal:
        label_order(table(mine), table(theirs))
    for names in (only_mine, only_theirs):
        assert (", ".join(sorted(names)[:8]) or "none") in str(refusal.value)


def test_names_that_are_not_in_the_order_of_their_keys_are_read_by_key():
    assert label_order({1: "b", 0: "a"}, {0: "a", 1: "b"}) is None
    assert label_order({2: "c", 0: "a", 1: "b"}, {1: "c", 2: "b", 0: "a"}) == (0, 2, 1)


@pytest.mark.parametrize("mine", [["LABEL_0", "LABEL_1"], ["yes", "no"]])
def test_default_names_agree_with_any_names_of_the_same_number(mine):
    assert label_order(table(mine), table(["LABEL_0", "LABEL_1"])) is None
    assert label_order(table(["LABEL_0", "LABEL_1"]), table(mine)) is None


def test_default_names_of_another_number_are_refused():
    with pytest.raises(ValueError, match="the student has 2 labels, the teacher 3"):
        label_order(table(["yes", "no"]), table(["LABEL_0", "LABEL_1", "LABEL_2"]))


def test_default_names_in_another_order_are_names_like_any():
    assert label_order(table(["x", "y"]), table(["LABEL_0", "LABEL_1"])) is None
    assert label_order(table(["LABEL_1", "LABEL_0"]), table(["label_1", "label_0"])) is None


def test_a_name_that_stands_twice_is_refused_unless_both_sides_are_equal():
    assert label_order(table(["other", "other", "x"]), table(["Other", "other", "X"])) is None
    with pytest.raises(ValueError, match="label sets differ"):
        label_order(table(["other", "other", "x"]), table(["x", "other", "other"]))


@given(st.integers(1, 50), st.integers(0, 30), st.integers(0, 30))
def test_padding_rows_beyond_the_tokens_are_cut_off(tokens, student_padding, teacher_padding):
    words = {f"w{i}": i for i in range(tokens)}
    sizes = tokens + student_padding, tokens + teacher_padding
    overlap = vocabulary_overlap(*sizes, student_tokens=words, teacher_tokens=dict(words))
    assert overlap.classes == (tokens if student_padding != teacher_padding else sizes[0])
    assert (overlap.student_only, overlap.teacher_only) == ((), ())


@given(st.integers(2, 50), st.integers(1, 30), st.booleans())
def test_rows_that_are_tokens_are_never_cut_off(tokens, missing, of_student):
    words = {f"w{i}": i for i in range(tokens)}
    sizes = [tokens, max(1, tokens - missing)]
    with pytest.raises(ValueError, match=rf"use ids up to {tokens - 1}: so rows beyond {min(sizes)} may be tokens"):
        vocabulary_overlap(*(sizes if of_student else sizes[::-1]), student_tokens=words, teacher_tokens=words)


@pytest.mark.parametrize(("mine", "theirs", "side"), [(None, {"a": 0}, "student"), ({"a": 0}, None, "teacher")])
def test_sizes_that_differ_need_both_tokenizers(mine, theirs, side):
    with pytest.raises(ValueError, match=f"the {side}'s tokenizer is not known"):
        vocabulary_overlap(8, 9, student_tokens=mine, teacher_tokens=theirs)


def test_equal_sizes_are_trusted_where_a_tokenizer_is_not_known():
    assert vocabulary_overlap(8, 8).classes == 8
    assert vocabulary_overlap(8, 8, student_tokens={"a": 0}).is_whole


def test_equal_sizes_do_not_hide_other_tokens():
    with pytest.raises(ValueError, match=r"0 shared tokens have another id\. Logits"):
        vocabulary_overlap(8, 8, student_tokens={"a": 0}, teacher_tokens={"b": 0})
    with pytest.raises(ValueError, match=r"1 shared tokens have another id \('a': 0 and 1\)"):
        vocabulary_overlap(8, 8, student_tokens={"a": 0, "b": 2}, teacher_tokens={"a": 1, "b": 2})


def test_a_long_difference_is_shortened():
    words = {f"w{i:02}": i for i in range(30)}
    with pytest.raises(ValueError, match=r"only the student has w00, .*w07 and 22 more"):
        vocabulary_overlap(30, 30, student_tokens=words, teacher_tokens={f"x{i}": i for i in range(30)})


def test_cutting_classes_is_the_softmax_without_them():
    logits = torch.randn(3, 10)
    cut = ordered_classes(logits, order=None, classes=6).log_softmax(-1)
    masked = logits.clone()
    masked[:, 6:] = -torch.inf
    torch.testing.assert_close(cut, masked.log_softmax(-1)[:, :6])
    assert ordered_classes(logits, order=None, classes=10) is logits
