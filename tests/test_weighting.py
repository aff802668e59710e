"""The settings of item weights: what is written is read back, and what nobody would read is refused."""

import pickle

import pytest
import yaml

from hf_distill.weighting import (
    ITEM_GROUP,
    ITEM_WEIGHT,
    ColumnWeights,
    GroupWeights,
    PhraseWeights,
    TeacherWeights,
    batch_weight_columns,
    follows,
    read_item_weights,
    weighting_columns,
    write_item_weights,
)

WRITTEN = """
- {by: phrases, phrases: [heart attack, 心肌梗死], boost: 0.3}
- {by: phrases, file: terms.txt, boost: 1, text_column: target, match_case: true}
- {by: column, column: quality}
- {by: group, column: language, weights: {en: 1, de: 2.5}, default: 0}
- {by: group, column: language, size_power: 0.5}
- {by: group, column: domain, follow: loss, power: 2}
- {by: teacher, signal: confidence, power: 2, threshold: 0.5}
- {by: teacher, signal: correctness, wrong: 0.1}
"""
READ = (
    PhraseWeights(("heart attack", "心肌梗死"), boost=0.3),
    PhraseWeights(file="terms.txt", boost=1, text_column="target", match_case=True),
    ColumnWeights("quality"),
    GroupWeights("language", weights=(("en", 1), ("de", 2.5)), default=0),
    GroupWeights("language", size_power=0.5),
    GroupWeights("domain", follow="loss", power=2),
    TeacherWeights("confidence", power=2, threshold=0.5),
    TeacherWeights("correctness", wrong=0.1),
)


def test_what_is_written_is_read_and_written_again():
    assert read_item_weights(yaml.safe_load(WRITTEN)) == READ
    assert read_item_weights(yaml.safe_load(yaml.safe_dump(write_item_weights(READ)))) == READ
    assert read_item_weights(READ) == READ
    assert len({*READ}) == len(READ) == len({*pickle.loads(pickle.dumps(READ))} & {*READ})


@pytest.mark.parametrize("kind", ["phrases", "column", "group", "teacher"])
def test_what_is_as_by_default_is_left_out(kind):
    needed = {"phrases": {"phrases": ["a"], "boost": 0.3}, "group": {"column": "c", "size_power": 0.0}}
    plain = {"by": kind, **needed.get(kind, {})}
    assert write_item_weights(read_item_weights(plain)) == [plain]


def test_the_columns_of_the_data_and_of_the_batch_are_known_before_either():
    assert weighting_columns(READ) == {"text", "target", "quality", "language", "domain"}
    assert batch_weight_columns(READ) == {ITEM_WEIGHT, ITEM_GROUP}
    assert batch_weight_columns(READ[:5]) == {ITEM_WEIGHT}
    assert batch_weight_columns(READ[5:6]) == {ITEM_GROUP}
    assert batch_weight_columns(READ[6:]) == weighting_columns(READ[6:]) == weighting_columns(()) == frozenset()
    assert [*map(follows, READ)] == [False] * 5 + [True] + [False] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"at=3; expected a list of mappings"),
        ([3], r"at\[0\] is 3; expected a mapping with a key by: phrases, column, group, teacher"),
        ({"column": "c"}, r"expected a mapping with a key by"),
        ({"by": "phrase"}, r"at\[0\]\.by: 'phrase' is unknown. Did you mean 'phrases'\? Known"),
        ({"by": "column", "colum": "c"}, r"at\[0\]\.colum: unknown key with by: column. Did you mean 'column'\?"),
        ({"by": "column", "column": ""}, r"column='', but it is the name of a column"),
        ({"by": "phrases"}, r"phrases=\[\] and file=None: give one of them"),
        ({"by": "phrases", "phrases": ["a"], "file": "f"}, r"phrases=\['a'\] and file='f': give one"),
        ({"by": "phrases", "phrases": "a"}, r"at\[0\]\.phrases is 'a'; expected a list of texts"),
        ({"by": "phrases", "phrases": ["a", " "]}, r"phrases holds ' ', but a phrase is a text that is not empty"),
        ({"by": "phrases", "phrases": [1]}, r"phrases holds 1"),
        ({"by": "phrases", "phrases": ["a"], "boost": -0.1}, r"boost=-0\.1, but it is added to the weight 1"),
        ({"by": "phrases", "phrases": ["a"], "boost": float("nan")}, r"boost=nan"),
        ({"by": "phrases", "phrases": ["a"], "match_case": "no"}, r"match_case='no', but it must be true or false"),
        ({"by": "group", "size_power": 1}, r"at\[0\] lacks column"),
        ({"by": "group", "column": "c"}, r"'c' take one of weights, size_power, follow; given: none"),
        ({"by": "group", "column": "c", "weights": {"a": 1}, "follow": "loss"}, r"given: weights and follow"),
        ({"by": "group", "column": "c", "weights": [1]}, r"at\[0\]\.weights is \[1\]; expected a mapping"),
        ({"by": "group", "column": "c", "weights": {"a": -1}}, r"weights\['a'\]=-1, but"),
        ({"by": "group", "column": "c", "weights": {1: 1, "1": 2}}, r"weights gives '1' two weights"),
        ({"by": "group", "column": "c", "size_power": 1.5}, r"size_power=1\.5, but it must be a number from 0"),
        ({"by": "group", "column": "c", "size_power": 1, "default": 1}, r"default=1 is read beside weights only"),
        ({"by": "group", "column": "c", "weights": {"a": 1}, "power": 2}, r"power=2 is read beside follow only"),
        ({"by": "group", "column": "c", "follow": "los"}, r"follow='los' is unknown. Known: loss"),
        ({"by": "group", "column": "c", "follow": "loss", "power": 0}, r"power=0 weighs all groups alike"),
        ([{"by": "group", "column": c, "follow": "loss"} for c in "ab"], r"at: the weights of one group column can"),
        ({"by": "teacher", "signal": "entropy"}, r"signal='entropy' is unknown. Known: confidence, correctness"),
        ({"by": "teacher", "wrong": 1}, r"wrong=1 is read beside signal='correctness' only"),
        ({"by": "teacher", "signal": "correctness", "power": 2}, r"power=2 is read beside signal='confidence' only"),
        ({"by": "teacher", "threshold": 1}, r"threshold=1: a threshold of 1 leaves nothing"),
        ({"by": "teacher", "power": 0}, r"a power of 0 without a threshold weighs all alike"),
    ],
)
def test_what_means_nothing_is_refused_with_the_place_where_it_is_written(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_item_weights(value, "at")
    assert str(caught.value).startswith("at")


def test_a_file_of_phrases_has_one_on_each_line_and_boosts_behind_tabs(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("\ufeffheart attack\n\n心肌梗死\t1.5\n stroke \t\nstroke\t0.1\n", encoding="utf-8")
    assert PhraseWeights(file=str(path)).boosts() == {"heart attack": 0.3, "心肌梗死": 1.5, "stroke": 0.3}
    assert PhraseWeights(("a", "b"), boost=2).boosts() == {"a": 2.0, "b": 2.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        ("\n \n", "holds no phrase"),
        ("a\nb\tmuch", r"line 2: boost='much', but after the tab stands a number"),
        ("a\t-1", r"line 1: boost=-1\.0"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "terms.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        PhraseWeights(file=str(path)).boosts()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_refused_by_name(tmp_path, encoding):
    path = tmp_path / "terms.txt"
    path.write_text("Erkältung", encoding=encoding)
    with pytest.raises(ValueError, match=r"terms\.txt is not UTF-8: byte \d is b'.*Save it as UTF-8"):
        PhraseWeights(file=str(path)).boosts()


@pytest.mark.parametrize("phrases", ["terms.txt", {"heart attack": 0.3}])
def test_phrases_are_a_list_and_neither_a_text_nor_a_mapping(phrases):
    with pytest.raises(ValueError, match=r"^phrases=.*expected a list of texts .* its path as file"):
        PhraseWeights(phrases)
    assert hash(PhraseWeights(["a"])) == hash(PhraseWeights(("a",)))


def test_weights_of_groups_may_be_a_mapping_and_give_none_to_what_is_missing():
    assert GroupWeights("g", weights={"en": 1, 2: 3}) == GroupWeights("g", weights=(("2", 3), ("en", 1)))
    for missing in (None, float("nan")):
        with pytest.raises(ValueError, match=r"missing value\. Rows without a value take the default"):
            GroupWeights("g", weights={"en": 1, missing: 2})


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_a_groups_influence_is_its_size_to_the_power_and_the_mean_weight_is_one(power):
    sizes = {"en": 1000, "de": 100, "sw": 1}
    weights = GroupWeights("language", size_power=power).factors({**sizes, "only in the evaluation": 0})
    assert {*weights} == {*sizes}
    influence = {group: sizes[group] * weights[group] for group in sizes}
    assert sum(influence.values()) == pytest.approx(sum(sizes.values()))
    assert influence["en"] / influence["sw"] == pytest.approx(1000**power)
    assert influence["de"] / influence["sw"] == pytest.approx(100**power)
    if power == 1:
        assert [*weights.values()] == pytest.approx([1.0] * 3)


def test_sizes_that_are_needed_must_be_known():
    with pytest.raises(ValueError, match="size_power needs the sizes of the groups of 'language'"):
        GroupWeights("language", size_power=0.5).factors({})
    assert [*GroupWeights("language", follow="loss").factors({"b": 3, "a": 0})] == ["a", "b"]
