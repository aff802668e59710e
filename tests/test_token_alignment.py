"""Positions that have read the same text, and tokens that spell the same, of every kind of tokenizer."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_distill.shared_tokens import SharedTokens, token_bytes
from hf_distill.token_alignment import paired_positions, read_prefixes, tokenize_for_teacher
from tests.tokenizers_of_text import byte_level, sentence_piece, word_piece

TOKENIZERS = {
    "byte level": byte_level(),
    "trimmed": byte_level(290, trim_offsets=True, wide=True),
    "pieces": sentence_piece(),
    "words": word_piece(),
}
BYTE_LEVEL = ("byte level", "trimmed")
PIECES = [
    "the",
    " the",
    "  ",
    "; ",
    ";\n",
    "\n\n",
    "ü",
    "é",
    "e\u0301",
    "今天",
    "😀",
    "👩\u200d🚀",
    "x",
    " Schüler",
    "🎉",
]
TEXTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)
every_pair = pytest.mark.parametrize(
    ("mine", "theirs"), [(mine, theirs) for mine in TOKENIZERS for theirs in TOKENIZERS if mine != theirs]
)


def columns(text, mine, theirs, **options):
    rows = tokenize_for_teacher(text, TOKENIZERS[mine], TOKENIZERS[theirs], **options)
    return {name: row for name, (row,) in rows.items()}


def raw(kind, ids):
    """The bytes of the text that tokens were made of."""
    tokens = TOKENIZERS[kind].convert_ids_to_tokens(ids, skip_special_tokens=True)
    if kind == "pieces":  # which put a space in front of every text
        parts = [bytes([int(t[1:-1], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens]
        return b"".join(parts)[1:]
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(table[character] for token in tokens for character in token)


@every_kind
@settings(deadline=None, max_examples=40)
@given(TEXTS)
def test_a_tokenizer_is_aligned_with_itself_position_by_position(kind, text):
    row = columns(text, kind, kind)
    assert row["teacher_positions"] == [*range(len(row["input_ids"]))]
    assert row["teacher_input_ids"][: len(row["input_ids"])] == row["input_ids"]


@pytest.mark.parametrize(("mine", "theirs"), [BYTE_LEVEL, BYTE_LEVEL[::-1]])
@settings(deadline=None, max_examples=40)
@given(TEXTS)
@example("😀;\n the  今天;\nx")
def test_between_byte_level_tokenizers_just_the_equal_prefixes_are_paired(mine, theirs, text):
    row = columns(text, mine, theirs)
    own, others = (TOKENIZERS[kind](text)["input_ids"] for kind in (mine, theirs))
    places = {raw(theirs, others[: end + 1]): end for end in range(len(others))}
    assert row["teacher_positions"] == [places.get(raw(mine, own[: end + 1]), -1) for end in range(len(own))]


@pytest.mark.parametrize(("mine", "theirs"), [("byte level", "pieces"), ("pieces", "trimmed")])
@settings(deadline=None, max_examples=40)
@given(TEXTS)
@example("今天 👩\u200d🚀 the ;\n")
@example(";\n")
@example(" Sch")
def test_paired_positions_have_read_the_same_text(mine, theirs, text):
    row = columns(text, mine, theirs)
    for place, other in enumerate(row["teacher_positions"]):
        if other >= 0:
            read = raw(mine, row["input_ids"][: place + 1])
            assert read == raw(theirs, row["teacher_input_ids"][: other + 1])
            assert text.encode().startswith(read)


@every_pair
@settings(deadline=None, max_examples=40)
@given(TEXTS)
def test_pairs_are_in_order_and_within_both_rows(mine, theirs, text):
    row = columns(text, mine, theirs)
    paired = [place for place in row["teacher_positions"] if place >= 0]
    assert paired == sorted({*paired})
    assert len(row["teacher_positions"]) == len(row["input_ids"]) == len(row["attention_mask"])
    if row["teacher_input_ids"]:
        assert len(row["teacher_input_ids"]) == max([*paired, 0]) + 1 == len(row["teacher_attention_mask"])


@every_pair
def test_at_the_end_of_every_word_both_have_read_the_same(mine, theirs):
    text = "the cat sat on the mat"
    row = columns(text, mine, theirs)
    inside = 1 if mine in ("pieces", "words") and theirs in ("pieces", "words") else 0
    assert sum(place >= 0 for place in row["teacher_positions"]) >= 6 + 2 * inside


def test_a_beginning_that_only_one_side_has_is_left_alone():
    row = columns("the cat", "pieces", "byte level")
    assert row["teacher_positions"][0] == -1
    assert row["teacher_positions"][-1] == -1
    last_word = row["teacher_positions"][-2]
    assert raw("byte level", row["teacher_input_ids"][: last_word + 1]) == b"the cat"
    assert columns("the cat", "pieces", "words")["teacher_positions"][0] == 0


def test_pieces_of_a_character_are_paired_with_equal_pieces_only():
    emoji = "😀".encode()
    whole = read_prefixes("a😀", [b"a", emoji], [(0, 1), (1, 2)], [False, False])
    halves = read_prefixes("a😀", [b"a", emoji[:2], emoji[2:]], [(0, 1), (1, 2), (1, 2)], [False] * 3)
    other = read_prefixes("a😀", [b"a", emoji[:1], emoji[1:]], [(0, 1), (1, 2), (1, 2)], [False] * 3)
    assert paired_positions(halves, whole) == [0, -1, 1]
    assert paired_positions(halves, other) == [0, -1, 2]
    assert paired_positions(halves, halves) == [0, 1, 2]


@every_pair
@pytest.mark.parametrize("length", [1, 4, 9])
def test_cut_rows_are_the_beginnings_of_whole_ones(mine, theirs, length):
    text = "the cat 😀 sat on the 今天 mat; \n and the dog"
    whole = columns(text, mine, theirs)
    cut = columns(text, mine, theirs, max_length=length, teacher_max_length=length)
    for name, row in cut.items():
        assert (
            row
            == [-1 if name == "teacher_positions" and place >= length else place for place in whole[name]][: len(row)]
        )
    assert len(cut["input_ids"]) == length
    assert len(cut["teacher_input_ids"]) <= length
    assert all(place < len(cut["teacher_input_ids"]) for place in cut["teacher_positions"])


def test_several_texts_are_rows_and_special_tokens_can_be_left_out():
    texts = ["the cat", "", "今天"]
    rows = tokenize_for_teacher(texts, TOKENIZERS["pieces"], TOKENIZERS["words"], add_special_tokens=False)
    assert [len(row) for row in rows.values()] == [3] * 6
    assert rows["labels"] == rows["input_ids"]
    assert rows["input_ids"] == TOKENIZERS["pieces"](texts, add_special_tokens=False)["input_ids"]
    assert rows["teacher_positions"][1] == []


@pytest.mark.parametrize("text", ["the cat", ""])
def test_the_end_of_a_text_is_that_of_each_tokenizer_and_stands_once(text):
    for mine, theirs in (("byte level", "pieces"), ("pieces", "byte level"), ("trimmed", "byte level")):
        row = columns(text, mine, theirs, append_eos=True)
        ends = [TOKENIZERS[kind].eos_token_id for kind in (mine, theirs)]
        assert row["input_ids"][-1] == ends[0]
        assert row["input_ids"].count(ends[0]) == 1
        assert row["teacher_input_ids"][row["teacher_positions"][-1]] == ends[1]
        if text:
            assert row["teacher_positions"][-2] == row["teacher_positions"][-1] - 1


def test_a_tokenizer_without_an_end_of_text_cannot_append_it():
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match="teacher's tokenizer has no eos_token"):
        tokenize_for_teacher("a", TOKENIZERS["pieces"], endless, append_eos=True)


def test_a_tokenizer_that_tells_no_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"teacher's tokenizer is a Slow.*Load a fast one"):
        tokenize_for_teacher("a", TOKENIZERS["words"], Slow())


@pytest.mark.parametrize(
    ("kind", "token", "spelled"),
    [
        ("byte level", "Ġthe", b" the"),
        ("byte level", "Ã", "ü".encode()[:1]),
        ("pieces", "▁the", b" the"),
        ("pieces", "<0x0A>", b"\n"),
        ("words", "the", b" the"),
        ("words", ",", b","),
        ("words", "今", "今".encode()),
    ],
)
def test_a_token_spells_bytes_whatever_its_kind_marks_them_with(kind, token, spelled):
    tokenizer = TOKENIZERS[kind]
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids(token)] == spelled


def test_the_continuation_of_a_word_has_no_space():
    tokenizer = TOKENIZERS["words"]
    (token, *_) = (token for token in tokenizer.get_vocab() if token.startswith("##"))
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids(token)] == token[2:].encode()


@every_pair
def test_shared_tokens_spell_the_same_and_every_token_has_one_place(mine, theirs):
    tokenizers = TOKENIZERS[mine], TOKENIZERS[theirs]
    sizes = [len(tokenizer) + 7 for tokenizer in tokenizers]
    shared = SharedTokens.of(*tokenizers, student_size=sizes[0], teacher_size=sizes[1])
    own, others = (token_bytes(tokenizer) for tokenizer in tokenizers)
    for ids in zip(shared.student.tolist(), shared.teacher.tolist(), strict=True):
        end = tuple(tokenizer.eos_token_id for tokenizer in tokenizers)
        assert ids == end or own.get(ids[0]) == others.get(ids[1])
    for tokenizer, parts in zip(
        tokenizers, ((shared.student, shared.student_rest), (shared.teacher, shared.teacher_rest)), strict=True
    ):
        assert sorted(torch.cat(parts).tolist()) == [*range(len(tokenizer))]
    assert b" the" in {own[i] for i in shared.student.tolist() if i in own}


@every_kind
def test_the_tokens_of_one_tokenizer_are_shared_with_themselves(kind):
    tokenizer = TOKENIZERS[kind]
    shared = SharedTokens.of(tokenizer, tokenizer, student_size=len(tokenizer), teacher_size=len(tokenizer) + 9)
    assert torch.equal(shared.student, shared.teacher)
    assert len(shared.student) == len(tokenizer)
    student = torch.randn(3, len(tokenizer))
    teacher = torch.cat([student, torch.randn(3, 9)], -1)
    for own, others in (shared.compared(student, teacher), shared.all_tokens(student, teacher)):
        assert torch.equal(own, others)
        assert torch.equal(own, student)


def test_no_probability_of_a_token_is_lost_and_padding_has_none():
    tokenizers = TOKENIZERS["pieces"], TOKENIZERS["byte level"]
    shared = SharedTokens.of(*tokenizers, student_size=500, teacher_size=500)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 500, generator=generator) * 3 for _ in tokenizers]
    for tokenizer, each, compared, ids in zip(
        tokenizers, logits, shared.compared(*logits), (shared.student, shared.teacher), strict=True
    ):
        probabilities = each[:, : len(tokenizer)].softmax(-1)
        torch.testing.assert_close(compared.softmax(-1)[:, :-1], probabilities[:, ids])
        torch.testing.assert_close(
            compared.softmax(-1)[:, -1], 1 - probabilities[:, ids].sum(-1), rtol=1e-4, atol=1e-6
        )
    assert [each.shape[-1] for each in shared.all_tokens(*logits)] == [len(tokenizer) for tokenizer in tokenizers]


def test_where_one_side_has_no_further_token_only_the_shared_ones_are_compared():
    small, large = byte_level(300), byte_level(320)
    shared = SharedTokens.of(small, large, student_size=300, teacher_size=320)
    own, others = shared.compared(torch.zeros(2, 300), torch.zeros(2, 320))
    assert own.shape == others.shape == (2, 300)
