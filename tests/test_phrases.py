"""Phrases are found as people mean them, and the tokens they cover weigh more, whatever the tokenizer."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_distill.phrase_index import PhraseIndex
from hf_distill.phrases import phrase_weights, token_weights, weigh_phrases

CORPUS = ["the patient had a heart attack last night", "art is in the heart", "急性心肌梗死患者的治疗"]
COLUMNS = ("input_ids", "text")


def wordpiece(**options):
    """BERT's kind: words and Chinese characters apart, words in pieces, [CLS] and [SEP] around."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*special, "heart", "at", "##tack", "last", *letters, *(f"##{letter}" for letter in letters), *CORPUS[2]]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def byte_bpe(**options):
    """GPT-2's kind: bytes, so that a Chinese character is three tokens, and one special token for everything."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS[:2],
        trainers.BpeTrainer(
            vocab_size=285,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=options.pop("trim_offsets", True))
    names = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def sentencepiece():
    """Llama's kind: ▁ for the space before a word, and bytes for characters that it does not know."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁heartck", "▁h", "▁a", "tt"]
    merges = [("▁", "h"), ("▁", "a"), ("t", "t")]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def found(text, *phrases, **options):
    return [text[start:end] for start, end, _ in PhraseIndex(dict.fromkeys(phrases, 0.3), **options).spans(text)]


@pytest.mark.parametrize(
    ("text", "phrase", "places"),
    [
        ("art in the heart of art", "art", ["art", "art"]),
        ("articles, smart, art_work, art2, 2art", "art", []),
        ("(art) art's Art-", "art", ["art", "art", "Art"]),
        ("A Heart \n\t attack.", "heart  attack", ["Heart \n\t attack"]),
        ("heart attacks", "heart attack", []),
        ("急性心肌梗死DNA检测", "心肌梗死", ["心肌梗死"]),
        ("急性心肌梗死DNA检测", "dna", ["DNA"]),
        ("東京タワー", "タワー", ["タワー"]),
        ("ไม่เป็นไร", "เป็น", ["เป็น"]),
        ("심근경색을 앓다", "심근경색", ["심근경색"]),
        ("инфаркты инфаркт", "Инфаркт", ["инфаркт"]),
        ("रोगी रोग", "रोग", ["रोग"]),
        ("cafe\u0301 CAFÉ cafe", "café", ["cafe\u0301", "CAFÉ"]),
        ("straße Straße", "STRAßE", ["straße", "Straße"]),
        ("İstanbul art", "art", ["art"]),
        ("C++, c", "c++", ["C++"]),
        ("", "art", []),
    ],
)
def test_a_phrase_is_found_as_whole_words_where_there_are_spaces_between_words(text, phrase, places):
    assert found(text, phrase) == places


def test_case_matters_where_it_is_asked_to():
    assert found("US us", "US", match_case=True) == ["US"]
    assert found("US us", "US") == ["US", "us"]


def test_phrases_that_overlap_are_all_found():
    assert found("acute heart attack", "acute heart", "heart attack", "heart") == [
        "acute heart",
        "heart",
        "heart attack",
    ]


def test_no_phrase_and_empty_ones_are_refused():
    with pytest.raises(ValueError, match="There is no phrase"):
        PhraseIndex({})
    with pytest.raises(ValueError, match=r"A phrase is ' \\n', which is empty"):
        PhraseIndex({" \n": 1})


@given(st.text("ab c", max_size=12), st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_found_is_what_comparing_at_every_place_finds(text, phrases):
    phrases = [" ".join(phrase.split()) for phrase in phrases if phrase.strip()]
    text = " ".join(text.split())
    if not phrases:
        return
    padded = f" {text} "
    expected = {
        (start, start + len(phrase))
        for phrase in phrases
        for start in range(len(text))
        if padded[start : start + len(phrase) + 2] == f" {phrase} "
    }
    spans = PhraseIndex(dict.fromkeys(phrases, 1.0)).spans(text)
    assert {(start, end) for start, end, _ in spans} == expected


def test_a_boost_of_three_tenths_is_a_weight_of_exactly_1_3_and_the_largest_boost_counts():
    phrases = PhraseIndex({"heart attack": 0.3, "attack": 2.0, "acute heart": 0.1})
    text = "acute heart attack now"
    offsets = [(0, 0), (0, 5), (6, 8), (8, 11), (12, 18), (19, 22), (0, 0)]
    assert phrase_weights(text, offsets, phrases) == [1.0, 1.1, 1.3, 1.3, 3.0, 1.0, 1.0]
    assert phrases.strongest(text) == 2.0
    assert phrases.strongest("nothing") == 0.0


def weighed(tokenizer, text, ids=None, *phrases):
    """[(token, weight)] of a text, or of ids that are said to be its."""
    ids = tokenizer(text)["input_ids"] if ids is None else ids
    index = PhraseIndex(dict.fromkeys(phrases or ("heart attack", "心肌梗死"), 0.3))
    (weights,) = token_weights([ids], [text], tokenizer, index, columns=COLUMNS)
    assert len(weights) == len(ids)
    return [*zip(tokenizer.convert_ids_to_tokens([max(i, 0) for i in ids]), weights, strict=True)]


def test_word_pieces_and_chinese_characters_of_a_phrase_weigh_more():
    assert weighed(wordpiece(), "A HEART attack. 心肌梗死患者")[1:-1] == [
        ("a", 1.0),
        ("heart", 1.3),
        ("at", 1.3),
        ("##tack", 1.3),
        ("[UNK]", 1.0),
        *[(character, 1.3) for character in "心肌梗死"],
        ("患", 1.0),
        ("者", 1.0),
    ]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_every_byte_of_a_phrase_weighs_more_and_the_next_word_does_not(trim_offsets):
    tokenizer = byte_bpe(trim_offsets=trim_offsets)
    pairs = weighed(tokenizer, "a heart attack then 因心肌梗死入院")
    heavy = tokenizer.convert_tokens_to_string([token for token, weight in pairs if weight == 1.3])
    assert heavy.split() == ["heart", "attack心肌梗死"]
    assert sum(weight == 1.3 for _, weight in pairs) > 4 * 3
    assert {weight for _, weight in pairs} == {1.0, 1.3}


def test_bytes_that_stand_for_unknown_characters_weigh_as_the_character():
    pairs = weighed(sentencepiece(), "the 心肌梗死 art")
    assert [token for token, weight in pairs if weight == 1.3] == [f"<0x{byte:02X}>" for byte in "心肌梗死".encode()]


@pytest.mark.parametrize("make", [wordpiece, byte_bpe])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [True, False])
def test_cut_rows_and_rows_without_special_tokens_get_the_weights_of_what_is_left(make, side, special):
    tokenizer = make(truncation_side=side)
    text = "heart attack last night 心肌梗死 heart attack"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    weights = [weight for _, weight in weighed(tokenizer, text, whole)]
    assert {*weights} == {1.0, 1.3}
    for length in range(3, len(whole)):
        ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=length)["input_ids"]
        edge = 1 if special and make is wordpiece else 0
        count = length - 2 * edge
        kept = weights[-count:] if side == "left" else weights[:count]
        assert [weight for _, weight in weighed(tokenizer, text, ids)] == [1.0] * edge + kept + [1.0] * edge


@pytest.mark.parametrize(("side", "weights"), [("left", [1.3, 1.0]), ("right", [1.0, 1.0])])
def test_the_tokenizer_tells_which_end_is_left_where_both_look_alike(side, weights):
    tokenizer = wordpiece(truncation_side=side)
    text = "heart heart attack heart heart"
    ids = tokenizer(text, truncation=True, max_length=4)["input_ids"]
    assert [weight for _, weight in weighed(tokenizer, text, ids, "attack heart")] == [1.0, *weights, 1.0]


def test_an_unknown_word_is_no_special_token():
    assert weighed(wordpiece(), "☃ art", None, "☃")[1] == ("[UNK]", 1.3)


def test_padding_and_ignored_labels_around_a_row_weigh_one():
    tokenizer = wordpiece()
    ids = tokenizer("heart")["input_ids"]
    assert [weight for _, weight in weighed(tokenizer, "heart", [0, 0, *ids, 0, -100], "heart")] == [
        *[1.0] * 3,
        1.3,
        *[1.0] * 3,
    ]


def test_words_given_apart_are_one_text_also_where_the_script_has_no_spaces():
    tokenizer = wordpiece()
    words = ["a", "heart", "attack", "心", "肌", "梗", "死", "art"]
    ids = tokenizer(words, is_split_into_words=True)["input_ids"]
    index = PhraseIndex({"heart attack": 0.3, "心肌梗死": 0.5})
    (weights,) = token_weights([ids], [words], tokenizer, index, columns=COLUMNS)
    pieces = len(tokenizer.tokenize("attack"))
    assert weights == [1.0, 1.0, *[1.3] * (1 + pieces), *[1.5] * 4, *[1.0] * (len(weights) - 7 - pieces)]


@pytest.mark.parametrize("ids", [[2, 9, 9, 9, 3], [2] + [9] * 90 + [3]])
def test_ids_of_another_text_are_refused_with_what_to_do(ids):
    with pytest.raises(ValueError, match=r"row's input_ids are not the tokens of its 'text': they begin .*weigh_phr"):
        weighed(wordpiece(), "a heart attack", ids)


def test_a_tokenizer_without_offsets_is_refused_with_what_to_do():
    class Slow:
        is_fast = False

    for tokenizer, name in ((Slow(), "Slow, which is no fast tokenizer"), (None, "no tokenizer")):
        with pytest.raises(ValueError, match=rf"there is {name}.*as processing_class.*by: column"):
            token_weights([[1]], ["a"], tokenizer, PhraseIndex({"a": 1}), columns=COLUMNS)
        with pytest.raises(ValueError, match=name):
            weigh_phrases([], tokenizer, ["a"])


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="Column 'text' holds None; expected a text, or a list of words"):
        token_weights([[1]], [None], wordpiece(), PhraseIndex({"a": 1}), columns=COLUMNS)


def _list(rows):
    return [dict(row) for row in rows]


def _stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    "kind",
    [
        _list,
        Dataset.from_list,
        lambda rows: Dataset.from_list(rows).with_format("torch"),
        _stream,
        lambda rows: DatasetDict(train=Dataset.from_list(rows)),
    ],
)
def test_any_data_set_gets_a_column_as_long_as_its_ids(kind):
    tokenizer = byte_bpe()
    texts = ["a heart attack", "no 心肌梗死", "nothing"]
    rows = [{"text": text, **tokenizer(text)} for text in texts]
    made = weigh_phrases(kind(rows), tokenizer, {"Heart attack": 0.3, "心肌梗死": 1.0}, column="w")
    made = made["train"] if isinstance(made, DatasetDict) else made
    for row, made_row, heavy in zip(rows, made, (1.3, 2.0, 1.0), strict=True):
        weights = [round(float(weight), 6) for weight in made_row["w"]]
        assert len(weights) == len(row["input_ids"])
        assert max(weights) == heavy
        assert [*made_row["input_ids"]] == row["input_ids"]
    assert "w" not in rows[0], "the rows themselves are left alone"


def test_the_data_set_must_have_the_columns_and_the_boosts_be_numbers():
    rows = [{"text": "a", "labels": [5]}]
    with pytest.raises(ValueError, match="no column 'input_ids'; it has text, labels"):
        weigh_phrases(Dataset.from_list(rows), wordpiece(), ["a"])
    with pytest.raises(ValueError, match="no column 'target'"):
        weigh_phrases(rows, wordpiece(), ["a"], ids_column="labels", text_column="target")
    with pytest.raises(ValueError, match=r"boost=-1, but it is added to the weight 1 .* a number >= 0"):
        weigh_phrases(rows, wordpiece(), ["a"], boost=-1)
    with pytest.raises(ValueError, match=r"phrases\['a'\]: boost='0\.3', but it is added to the weight 1"):
        weigh_phrases(rows, wordpiece(), {"b": 1, "a": "0.3"})


def test_phrases_come_as_a_list_or_in_a_file_with_boosts_of_their_own(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("heart attack\t0.5\na\n")
    tokenizer = wordpiece()
    rows = [{"text": "a heart attack", **tokenizer("a heart attack")}]
    (row,) = weigh_phrases(rows, tokenizer, file=path, boost=2)
    assert {3.0, 1.5} < {*row["distill_weight"]} <= {3.0, 1.5, 1.0}
    for wrong in ({"phrases": ["a"], "file": path}, {"phrases": {"a": 1}, "file": path}, {}, {"phrases": {}}):
        with pytest.raises(ValueError, match=r"^phrases=.* and file=.*: give one of them"):
            weigh_phrases(rows, tokenizer, **wrong)
    with pytest.raises(ValueError, match=r"^phrases='terms\.txt'; expected a list of texts .* its path as file"):
        weigh_phrases(rows, tokenizer, "terms.txt")


@pytest.mark.parametrize("dataset", [["a heart attack"], {"text": ["a"], "input_ids": [[5]]}])
def test_what_holds_no_rows_is_refused_with_what_a_row_is(dataset):
    with pytest.raises(ValueError, match=r"holds '.*' in place of a row. Give tokenized rows .*\*\*tokenizer\(text\)"):
        weigh_phrases(dataset, wordpiece(), ["a"])


def test_a_boost_that_looks_like_a_percentage_is_warned_about():
    with pytest.warns(UserWarning, match="'b' has the boost 30, .* weighs 31 times") as caught:
        weigh_phrases([], wordpiece(), {"a": 0.3, "b": 30})
    assert [each.filename for each in caught] == [__file__]
