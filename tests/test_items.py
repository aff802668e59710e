"""Which items of a batch count, for every task, against rules spelt out row by row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.items import LABEL_MASK, Items, batch_size, find_items
from hf_distill.signals import Task

SPECIAL = torch.tensor([0, 1, 2])
POSITION_TASKS = [Task.TOKEN_CLASSIFICATION, Task.MASKED_LM, Task.CAUSAL_LM, Task.SEQ2SEQ_LM]


@st.composite
def text_batches(draw):
    """A batch of padded token rows with labels, some of them -100, as plain lists."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    real = [draw(st.integers(1, length)) for _ in range(rows)]
    tokens = [[draw(st.integers(0, 6)) if i < n else 0 for i in range(length)] for n in real]
    labels = [[draw(st.sampled_from([-100, 0, 3])) if i < n else -100 for i in range(length)] for n in real]
    mask = [[int(i < n) for i in range(length)] for n in real]
    return tokens, mask, labels


def tensors(tokens, mask, labels=None):
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    return inputs if labels is None else {**inputs, "labels": torch.tensor(labels)}


@given(text_batches(), st.sampled_from(POSITION_TASKS))
def test_the_items_of_the_task_are_the_labels_that_are_not_ignored(batch, task):
    tokens, mask, labels = batch
    items = find_items(task, tensors(tokens, mask, labels), special_tokens=SPECIAL)
    expected = [[label != -100 for label in row] for row in labels]
    if task is Task.CAUSAL_LM:  # position i predicts token i + 1
        expected = [[*row[1:], False] for row in expected]
    assert items.task[0].tolist() == expected
    assert items.labelled.tolist() == [any(row) for row in expected]
    counts = sum(map(sum, expected))
    assert items.counts().tolist()[:2] == [counts, counts]
    assert items.counts().tolist()[3:] == [sum(any(row) for row in expected), len(tokens)]


@given(text_batches(), st.sampled_from(POSITION_TASKS))
def test_a_language_model_is_taught_where_it_has_labels_and_a_tagger_also_in_rows_without(batch, task):
    tokens, mask, labels = batch
    items = find_items(task, tensors(tokens, mask, labels), special_tokens=SPECIAL)
    expected = [list(row) for row in items.task[0].tolist()]
    if task is Task.TOKEN_CLASSIFICATION:
        for i, row in enumerate(labels):
            if all(label == -100 for label in row):
                expected[i] = [bool(m) and t > 2 for m, t in zip(mask[i], tokens[i], strict=True)]
    assert items.kd.tolist() == expected
    assert items.counts()[2] == sum(map(sum, expected))


@given(text_batches())
def test_a_batch_without_labels_teaches_its_real_ordinary_positions(batch):
    tokens, mask, _ = batch
    inputs = tensors(tokens, mask)
    ordinary = [[bool(m) and t > 2 for m, t in zip(*row, strict=True)] for row in zip(mask, tokens, strict=True)]
    followed = [[bool(a and b) for a, b in zip(row, [*row[1:], 0], strict=True)] for row in mask]
    for task, expected in (
        (Task.TOKEN_CLASSIFICATION, ordinary),
        (Task.MASKED_LM, ordinary),
        (Task.CAUSAL_LM, followed),
    ):
        items = find_items(task, inputs, special_tokens=SPECIAL)
        assert items.kd.tolist() == expected, task
        assert not items.task[0].any()
        assert not items.labelled.any()


def test_labels_that_are_shifted_already_are_not_shifted_again():
    labels = torch.tensor([[5, -100, 7, -100]])
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "shift_labels": labels}
    items = find_items(Task.CAUSAL_LM, inputs)
    assert items.task[0].tolist() == items.kd.tolist() == [[True, False, True, False]]


def test_a_decoders_own_mask_tells_its_positions_without_labels():
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "decoder_input_ids": torch.ones(2, 3, dtype=torch.long),
    }
    assert find_items(Task.SEQ2SEQ_LM, inputs).kd.tolist() == [[True] * 3] * 2
    masked = {**inputs, "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert find_items(Task.SEQ2SEQ_LM, masked).kd.tolist() == [[True, True, False], [True, False, False]]


def test_a_decoder_with_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="neither labels nor decoder_input_ids"):
        find_items(Task.SEQ2SEQ_LM, {"input_ids": torch.ones(2, 5, dtype=torch.long)})


def test_embeddings_alone_do_not_tell_the_positions_of_a_batch_without_labels():
    with pytest.raises(ValueError, match="needs input_ids or a 2-D attention_mask"):
        find_items(Task.CAUSAL_LM, {"inputs_embeds": torch.zeros(2, 3, 4)})
    inputs = {"inputs_embeds": torch.zeros(1, 3, 4), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert find_items(Task.CAUSAL_LM, inputs).kd.tolist() == [[True, False, False]]


def test_a_mask_of_more_dimensions_leaves_every_position_real():
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 1, 3, 3)}
    assert find_items(Task.CAUSAL_LM, inputs).kd.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        (torch.tensor([2, -100, 0]), [True, False, True]),
        (torch.tensor([[2], [-100], [0]]), [True, False, True]),
        (torch.tensor([0.5, math.nan, -100.0]), [True, False, False]),
        (torch.tensor([[0.0, 1.0], [1.0, math.nan], [-100.0, -100.0]]), [True, False, False]),
    ],
)
@pytest.mark.parametrize("task", [Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE])
def test_a_row_is_an_item_of_the_task_if_it_has_a_label_and_of_the_teacher_anyway(task, labels, labelled):
    items = find_items(task, {"input_ids": torch.ones(3, 4), "labels": labels})
    assert items.task[0].tolist() == items.labelled.tolist() == labelled
    assert items.kd.tolist() == [True] * 3
    without = find_items(task, {"input_ids": torch.ones(3, 4)})
    assert not without.labelled.any()
    assert without.kd.all()


@given(st.lists(st.tuples(st.integers(-101, 9), st.integers(-101, 9)), min_size=1, max_size=5))
def test_a_span_counts_where_its_ends_lie_inside_the_input(spans):
    starts, ends = (torch.tensor(side) for side in zip(*spans, strict=True))
    inputs = {"input_ids": torch.ones(len(spans), 6), "start_positions": starts, "end_positions": ends[:, None]}
    items = find_items(Task.QUESTION_ANSWERING, inputs)
    inside = [[0 <= place < 6 for place in side] for side in zip(*spans, strict=True)]
    assert [mask.tolist() for mask in items.task] == inside
    assert items.labelled.tolist() == [a or b for a, b in zip(*inside, strict=True)]
    assert items.kd.all()
    assert items.counts().tolist() == [sum(inside[0]), sum(inside[1]), len(spans), items.labelled.sum(), len(spans)]


def test_frames_are_taught_and_rows_are_counted_in_ctc():
    frames = torch.tensor([[True, True, False], [True, False, False]])
    labels = torch.tensor([[3, 4], [-100, -100]])
    items = find_items(Task.CTC, {"input_values": torch.zeros(2, 9), "labels": labels}, frames=frames)
    assert items.task[0].tolist() == [True, False]
    assert torch.equal(items.kd, frames)
    with pytest.raises(ValueError, match="pass frames=frame_mask"):
        find_items(Task.CTC, {"input_values": torch.zeros(2, 9), "labels": labels})


@pytest.mark.parametrize("task", [*Task])
def test_a_masked_row_is_no_item_of_the_task_and_still_taught(task):
    inputs = {
        "input_ids": torch.full((2, 4), 5),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "labels": torch.full((2,) if task.one_item_per_row else (2, 4), 1),
        "start_positions": torch.tensor([1, 1]),
        "end_positions": torch.tensor([1, 1]),
    }
    frames = torch.ones(2, 4, dtype=torch.bool)
    full = find_items(task, inputs, frames=frames)
    items = find_items(task, {**inputs, LABEL_MASK: torch.tensor([True, False])}, frames=frames)
    assert torch.equal(items.kd, full.kd)
    for mask, whole in zip((*items.task, items.labelled), (*full.task, full.labelled), strict=True):
        assert torch.equal(mask[0], whole[0])
        assert whole[1].any()
        assert not mask[1].any()


@given(text_batches(), st.data())
def test_leaving_rows_out_counts_what_the_other_rows_count_alone(batch, data):
    tokens, mask, labels = batch
    kept = torch.tensor([data.draw(st.booleans()) for _ in tokens])
    whole = find_items(Task.CAUSAL_LM, tensors(tokens, mask, labels))
    left = whole.of_rows(kept)
    alone = Items(tuple(part[kept] for part in whole.task), whole.kd[kept], whole.labelled[kept])
    assert left.counts().tolist()[:4] == alone.counts().tolist()[:4]


def test_the_batch_size_is_read_from_the_first_tensor_with_rows():
    assert batch_size({"return_dict": True, "scale": torch.tensor(1.0), "input_ids": torch.ones(3, 2)}) == 3
