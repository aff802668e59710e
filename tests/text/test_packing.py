import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.accounting import mark_repeated_rows
from hf_distill.items import find_items
from hf_distill.signals import Task
from hf_distill.text.collation import FlatteningCollator, PackedCollator
from hf_distill.text.packing import Packing

ROOM = 8
BOTH = pytest.mark.parametrize("wraps", [False, True], ids=["bfd", "wrapped"])


def texts(lengths):
    """Rows whose tokens are all different, half of them with a label."""
    rows, token = [], 1
    for length in lengths:
        ids = [*range(token, token + length)]
        rows.append({"input_ids": ids, "labels": [i if i % 2 else -100 for i in ids]})
        token += length
    return rows


def columns(rows):
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}


def packed(lengths, *, wraps, room=ROOM):
    made = Packing(room, wraps=wraps)(columns(texts(lengths)))
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


def pieces(row):
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    return [
        row["input_ids"][start:end] for start, end in zip(starts, [*starts[1:], len(row["position_ids"])], strict=True)
    ]


def last_batch(*, rank, rows):
    """What accelerate says at the end of a data set of which `rows` rows are left for all ranks."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=rows)
    return SimpleNamespace(num_processes=3, process_index=rank, gradient_state=state)


lengths_of = st.lists(st.integers(0, ROOM), max_size=20)


@BOTH
@given(lengths=lengths_of)
def test_every_token_is_kept_once(wraps, lengths):
    rows = packed(lengths, wraps=wraps)
    assert sorted(token for row in rows for token in row["input_ids"]) == [*range(1, sum(lengths) + 1)]
    assert all(0 < len(row["input_ids"]) <= ROOM for row in rows)


@given(lengths=lengths_of)
def test_best_fit_leaves_texts_whole(lengths):
    found = [piece for row in packed(lengths, wraps=False) for piece in pieces(row)]
    assert sorted(found) == [row["input_ids"] for row in texts(lengths) if row["input_ids"]]


@given(lengths=st.lists(st.integers(0, 30), max_size=20))
def test_wrapped_rows_are_full_and_in_order(lengths):
    rows = packed(lengths, wraps=True)
    assert [token for row in rows for token in row["input_ids"]] == [*range(1, sum(lengths) + 1)]
    assert all(len(row["input_ids"]) == ROOM for row in rows[:-1])


@BOTH
@given(lengths=lengths_of)
def test_labels_are_the_texts_own_but_for_the_first_token_of_each_piece(wraps, lengths):
    label_of = {i: label for row in texts(lengths) for i, label in zip(row["input_ids"], row["labels"], strict=True)}
    for row in packed(lengths, wraps=wraps):
        for token, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True):
            assert label == (-100 if position == 0 else label_of[token])


@BOTH
@given(lengths=lengths_of)
def test_positions_count_on_within_a_piece(wraps, lengths):
    for row in packed(lengths, wraps=wraps):
        assert [p for piece in pieces(row) for p in range(len(piece))] == row["position_ids"]


@given(lengths=st.lists(st.integers(1, ROOM), min_size=1, max_size=20))
def test_best_fit_fills_rows_at_least_half(lengths):
    rows = packed(lengths, wraps=False)
    # Two rows that would fit into one exist in no best fit.
    filled = sorted(len(row["input_ids"]) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > ROOM


def test_each_text_goes_where_the_least_room_is_left():
    rows = packed([3, 5, 6, 2], wraps=False)
    assert [[len(piece) for piece in pieces(row)] for row in rows] == [[3, 5], [6, 2]]


def test_a_text_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="A text of 9 tokens does not fit into rows of 8"):
        packed([9], wraps=False)


def test_a_packing_can_be_pickled_and_maps_data_sets_and_streams():
    packing = pickle.loads(pickle.dumps(Packing(ROOM)))
    table = Dataset.from_list(texts([3, 5, 6, 2]))
    whole = table.map(packing, batched=True).to_list()
    stream = table.to_iterable_dataset().map(packing, batched=True)
    assert isinstance(stream, IterableDataset)
    assert [*stream] == whole == packed([3, 5, 6, 2], wraps=False)


class TestCollators:
    def test_flattened_rows_are_one(self):
        rows = packed([3, 5, 6], wraps=False)
        batch = FlatteningCollator()(rows)
        assert batch["input_ids"].tolist() == [rows[0]["input_ids"] + rows[1]["input_ids"]]
        assert batch["position_ids"].tolist() == [rows[0]["position_ids"] + rows[1]["position_ids"]]
        assert batch["labels"].tolist() == [rows[0]["labels"] + rows[1]["labels"]]
        assert "attention_mask" not in batch

    def test_flattened_texts_lose_their_first_label(self):
        batch = FlatteningCollator(counts_rows=True)(texts([3, 2]))
        assert batch["labels"].tolist() == [[-100, -100, 3, -100, 5]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
        assert batch["row_lengths"] == [3, 2]

    def test_packed_rows_are_filled_up_behind_their_last_text(self):
        batch = PackedCollator(77, pad_to_multiple_of=4)(packed([3, 2, 8], wraps=False)[::-1])
        assert batch["input_ids"].tolist() == [[6, 7, 8, 9, 10, 11, 12, 13], [1, 2, 3, 4, 5, 77, 77, 77]]
        assert batch["position_ids"].tolist()[1] == [0, 1, 2, 0, 1, 1, 1, 1]
        assert batch["labels"].tolist()[1][5:] == [-100] * 3

    @pytest.mark.parametrize("collator", [FlatteningCollator(), PackedCollator(0, pad_to_multiple_of=16)])
    def test_rows_are_counted_by_their_texts(self, collator):
        rows = [{**row, "position_ids": [*range(len(row["input_ids"]))]} for row in texts([3, 5])]
        unlabelled = {"input_ids": [90, 91], "labels": [-100, -100], "position_ids": [0, 1]}
        both = {name: rows[1][name] + unlabelled[name] for name in unlabelled}
        counts = find_items(Task.CAUSAL_LM, collator([rows[0], both])).counts()
        assert counts.tolist()[3:] == [2, 3]

    @pytest.mark.parametrize(("rank", "kept"), [(0, [1, 2, 3, 4, 5]), (1, [1, 2, 3])])
    def test_rows_that_a_rank_repeats_are_cut_off_a_flattened_batch(self, rank, kept):
        batch = {**FlatteningCollator(counts_rows=True)(texts([3, 2])), "item_weight": torch.ones(1, 5)}
        marked = mark_repeated_rows(batch, last_batch(rank=rank, rows=3))
        assert marked["input_ids"].tolist() == [kept]
        assert {value.shape[1] for value in marked.values() if isinstance(value, torch.Tensor)} == {len(kept)}

    def test_a_flattened_batch_of_repeated_rows_alone_counts_for_nothing(self):
        batch = FlatteningCollator(counts_rows=True)(texts([3, 2]))
        marked = mark_repeated_rows(batch, last_batch(rank=2, rows=3))
        assert marked["row_mask"].tolist() == [False]
        assert marked["input_ids"].shape == (1, 5)

    def test_rows_that_a_rank_repeats_count_for_no_text(self):
        batch = PackedCollator(0)(packed([3, 2, 8], wraps=False))
        items = find_items(Task.CAUSAL_LM, batch).of_rows(torch.tensor([True, False]))
        assert items.counts().tolist()[4] == 2
