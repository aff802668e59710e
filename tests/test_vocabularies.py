"""One tokenizer under heads of other sizes, or with tokens added on one side: what is compared, and what is told."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_distill.alignment import VocabularyOverlap, vocabulary_overlap
from hf_distill.pairing import pair_models
from hf_distill.shared_tokens import cut_otherwise
from tests import tiny
from tests.tiny import VOCABULARY, rows
from tests.tokenizers_of_text import byte_level, sentence_piece, word_piece
from tests.training import logged, make_trainer

PADDED = [(104, 120), (120, 104), (97, 128), (128, 97)]


def heads(student_rows, teacher_rows):
    """Two models with heads of these sizes, in whose further rows stands what would matter."""
    models = []
    for seed, count in enumerate((student_rows, teacher_rows)):
        torch.manual_seed(seed)
        models.append(tiny.llama(vocab_size=count))
        with torch.no_grad():
            models[-1].lm_head.weight.mul_(20)
            models[-1].lm_head.weight[VOCABULARY:].mul_(5)
    return models


def tokenizer(*added):
    """The 97 words of the rows, and further ones."""
    found = tiny.tokenizer()
    found.add_tokens([*added])
    return found


def pair(sizes, mine=(), theirs=()):
    student, teacher = heads(*sizes)
    return pair_models(student, teacher, student_tokenizer=tokenizer(*mine), teacher_tokenizer=tokenizer(*theirs))


def divergence(models, classes, temperature):
    """The mean forward KL over the leading classes, in float64."""
    batch = {name: torch.stack([row[name] for row in rows("causal")[:4]]) for name in rows("causal")[0]}
    kept = torch.nn.functional.pad(batch.pop("labels")[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        own, others = (model(**batch).logits[..., :classes].double() / temperature for model in models)
    values = (others.softmax(-1) * (others.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
    return temperature**2 * values[kept].mean().item()


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("sizes", "mine", "theirs"),
    [*((sizes, (), ()) for sizes in PADDED), ((120, 120), ("<a>", "<b>"), ()), ((104, 120), (), ("<a>",))],
)
def test_only_the_tokens_of_both_have_a_probability(tmp_path, sizes, mine, theirs, task_weight):
    models = heads(*sizes)
    expected = divergence(models, VOCABULARY, 3.0)
    trainer = make_trainer(
        tmp_path,
        "llama",
        models=models,
        kd_weight=1.0,
        task_weight=task_weight,
        max_steps=1,
        temperature=3.0,
        processing_class=tokenizer(*mine),
        teacher_processing_class=tokenizer(*theirs),
        data_collator=default_data_collator,
    )
    trainer.train()
    assert logged(trainer, "loss_kd") == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("knows", [True, False])
def test_rows_of_padding_that_both_have_are_compared_whether_the_tokenizer_is_known_or_not(tmp_path, knows):
    models = heads(120, 120)
    expected = divergence(models, 120, 2.0)
    options = {"processing_class": tokenizer(), "teacher_processing_class": tokenizer()} if knows else {}
    trainer = make_trainer(
        tmp_path, "llama", models=models, max_steps=1, data_collator=default_data_collator, **options
    )
    trainer.train()
    assert logged(trainer, "loss_kd") == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("sizes", PADDED)
def test_the_report_counts_the_rows_that_are_left_out(sizes, caplog):
    with caplog.at_level(logging.INFO):
        found = pair(sizes)
    assert found.vocabulary == VocabularyOverlap(*sizes, VOCABULARY)
    assert found.classes == VOCABULARY
    (message,) = (record for record in caplog.records if record.name == "hf_distill.pairing")
    assert message.levelno == logging.INFO
    assert f"student's head has {sizes[0]} classes, the teacher's {sizes[1]}: 97 leading" in message.getMessage()
    for side, size in zip(("student", "teacher"), sizes, strict=True):
        told = f"{size - VOCABULARY} rows of the {side}'s that are no token"
        assert (told in message.getMessage()) == (size > VOCABULARY)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_report_names_the_tokens_that_one_side_alone_has(side, caplog):
    names = tuple(f"<{number}>" for number in range(12))
    with caplog.at_level(logging.INFO):
        found = pair((120, 120), *((names, ()) if side == "student" else ((), names)))
    assert getattr(found.vocabulary, f"{side}_only") == names
    assert found.vocabulary.padding(side) == 120 - VOCABULARY - 12
    assert found.classes == VOCABULARY
    (message,) = (record for record in caplog.records if record.name == "hf_distill.pairing")
    assert message.levelno == logging.WARNING
    assert f"12 tokens that only the {side} has (<0>, <1>, <2>" in message.getMessage()
    assert "<7> and 4 more)" in message.getMessage()


def test_nothing_is_told_where_nothing_is_left_out(caplog):
    with caplog.at_level(logging.INFO):
        assert pair((120, 120)).classes is None
        assert pair((VOCABULARY, VOCABULARY)).vocabulary.is_whole
    assert not [record for record in caplog.records if record.name == "hf_distill.pairing"]


def test_classifiers_have_no_vocabulary_to_report():
    student, teacher = tiny.pair("bert")
    assert pair_models(student, teacher, student_tokenizer=tokenizer("<a>")).vocabulary is None


def test_a_teacher_without_a_row_for_a_token_of_the_students_is_refused_with_the_way_to_make_one():
    with pytest.raises(ValueError, match=r"<a>, for which the teacher's 97 rows.*resize_token_embeddings\(98\)"):
        pair((98, 97), ("<a>",))
    student, teacher = heads(98, 97)
    teacher.resize_token_embeddings(98)
    found = pair_models(student, teacher, student_tokenizer=tokenizer("<a>"), teacher_tokenizer=tokenizer())
    assert found.classes == VOCABULARY


def test_tokens_in_another_order_are_refused_with_what_remains():
    student, teacher = heads(VOCABULARY, VOCABULARY)
    words = [f"w{number}" for number in range(92)]
    with pytest.raises(ValueError, match=r"92 shared tokens have another id.*token_alignment='offsets'.*'uld'"):
        pair_models(
            student, teacher, student_tokenizer=tiny.tokenizer(words), teacher_tokenizer=tiny.tokenizer(words[::-1])
        )


def test_tokens_added_on_both_sides_are_refused():
    with pytest.raises(ValueError, match="only the student has <a>; only the teacher has <b>"):
        pair((120, 120), ("<a>",), ("<b>",))


def test_a_token_of_one_side_among_the_ids_of_both_is_refused():
    with pytest.raises(ValueError, match=r"Only one of the tokenizers has b \(ids 1\)"):
        vocabulary_overlap(8, 8, student_tokens={"a": 0, "b": 1, "c": 2}, teacher_tokens={"a": 0, "c": 2})


@given(st.integers(1, 60), st.integers(0, 9), st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_classes_tokens_and_padding_add_up_to_the_rows(tokens, added, padding, other_padding, of_student):
    base = {f"w{number}": number for number in range(tokens)}
    tables = [{**base, **{f"<{number}>": tokens + number for number in range(added)}}, base]
    sizes = [tokens + added + padding, tokens + added + other_padding]
    if not of_student:
        tables, sizes = tables[::-1], sizes[::-1]
    found = vocabulary_overlap(*sizes, student_tokens=tables[0], teacher_tokens=tables[1])
    for side, size in zip(("student", "teacher"), sizes, strict=True):
        assert found.classes + len(getattr(found, f"{side}_only")) + found.padding(side) == size
    assert found.classes == (tokens if added or sizes[0] != sizes[1] else sizes[0])


def changed(made, change):
    """A tokenizer with the same ids and something else about it."""
    state = json.loads(made.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


@pytest.mark.parametrize("make", [byte_level, sentence_piece, word_piece])
def test_one_tokenizer_loaded_twice_or_given_further_tokens_cuts_alike(make):
    mine, theirs = make(), make()
    assert cut_otherwise(mine, theirs) is None
    theirs.add_tokens(["<think>", "e c"])
    assert cut_otherwise(mine, theirs) is None
    assert cut_otherwise(theirs, mine) is None


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (byte_level, lambda state: state["model"]["merges"].reverse()),
        (sentence_piece, lambda state: state["model"]["merges"].reverse()),
        (byte_level, lambda state: state.update(normalizer={"type": "Prepend", "prepend": "x"})),
        (word_piece, lambda state: state["model"].update(max_input_chars_per_word=2)),
    ],
    ids=["merges of bytes", "merges", "normaliser", "long words"],
)
def test_the_same_ids_with_another_way_to_cut_are_told_by_a_text(make, change):
    mine = make()
    theirs = changed(mine, change)
    assert mine.get_vocab() == theirs.get_vocab()
    text = cut_otherwise(mine, theirs).split("' is ")[0].strip("'")
    assert mine.tokenize(text) != theirs.tokenize(text)


def test_what_has_no_backend_is_not_tried():
    assert cut_otherwise(None, byte_level()) is None
    assert cut_otherwise(byte_level(), object()) is None


@pytest.mark.parametrize("alike", [True, False])
def test_a_pair_whose_tokenizers_cut_texts_otherwise_is_told_once(alike, caplog):
    mine = byte_level()
    theirs = changed(mine, (lambda state: None) if alike else (lambda state: state["model"]["merges"].reverse()))
    student, teacher = heads(len(mine), len(mine))
    with caplog.at_level(logging.WARNING):
        pair_models(student, teacher, student_tokenizer=mine, teacher_tokenizer=theirs)
    told = [record.message for record in caplog.records if "cut texts otherwise" in record.message]
    assert len(told) == (0 if alike else 1)
