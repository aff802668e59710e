"""What a data set lacks for the weights asked for is said before the first step, and nothing of it is used up."""

import random
import warnings

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream

from hf_distill.demo.corpus import load_corpus
from hf_distill.weighting import ColumnWeights, GroupWeights, PhraseWeights, TeacherWeights
from hf_distill.weighting_checks import check_phrases, check_weights, find_groups, group_sizes

ROWS = [
    {"text": "a stroke", "g": "en", "w": 1},
    {"text": "a heart attack", "g": "de", "w": 2},
    {"text": "x", "g": "en"},
]
PHRASES = PhraseWeights(("heart attack",))


class Torch:
    """A torch data set, whose rows are made when they are asked for."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, place):
        random.random()
        return ROWS[place]


class Once(TorchStream):
    """Rows that can be read but once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("kind", [list, Dataset.from_list, lambda rows: Torch()])
def test_groups_are_counted(kind):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    assert group_sizes(kind(ROWS), "g") == {"de": 1, "en": 2}
    assert random.random() == expected


def test_a_streams_groups_are_not_counted():
    for stream in (Once(ROWS), IterableDataset.from_generator(lambda: iter(ROWS))):
        with pytest.raises(ValueError, match="groups of 'g' are to be counted, but train_dataset is a stream"):
            group_sizes(stream, "g")


def test_sizes_are_the_training_sets_and_groups_to_follow_the_evaluation_sets():
    train = Dataset.from_list(ROWS)
    dev = {"a": Dataset.from_list([{"g": "sw"}]), "b": Dataset.from_list([{"g": "de"}])}
    by_size, follow = GroupWeights("g", size_power=0.5), GroupWeights("g", follow="loss")
    assert find_groups([by_size], train) == {"g": {"de": 1, "en": 2}}
    assert find_groups([follow], Once([]), dev) == {"g": {"de": 0, "sw": 0}}
    assert find_groups([follow, by_size], train, dev) == {"g": {"de": 1, "en": 2, "sw": 0}}
    assert find_groups([by_size, follow], train, dev) == {"g": {"de": 1, "en": 2, "sw": 0}}
    assert find_groups([PHRASES, GroupWeights("g", weights=(("en", 1),))], Once([])) == {}
    with pytest.raises(ValueError, match="weights of 'g' are to follow the loss of each group, but there is no eval_"):
        find_groups([follow], train)
    for lacking, name in ((Dataset.from_list([{"text": "a"}]), "eval_dataset"), ({"x": [{"a": 1}]}, r"eval.*\['x'\]")):
        with pytest.raises(ValueError, match=f"column 'g', which {name} does not have"):
            find_groups([follow], train, lacking)


@pytest.mark.parametrize(
    "kind", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))]
)
def test_a_missing_column_is_refused_with_those_there_are(kind):
    rows = [{"text": "a", "label": 1}] * 3
    with pytest.raises(ValueError, match=r"column 'w', which train_dataset does not have \(it has text, label\)"):
        check_weights([ColumnWeights("w")], kind(rows))
    check_weights([ColumnWeights("label")], kind(rows))


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_phrases_that_occur_nowhere_are_warned_about_once(kind):
    rows = kind([{"text": "art"}] * 20)
    with pytest.warns(UserWarning, match="None of the 20 rows holds any of the phrases in 'text'") as caught:
        check_weights([PHRASES], rows)
    assert len(caught) == 1


def test_of_a_long_data_set_the_first_rows_are_looked_at():
    with pytest.warns(UserWarning, match="None of the first 1000 rows"):
        check_phrases([{"text": "art"}] * 1000 + [{"text": "heart attack"}], PHRASES)


def test_phrases_that_occur_are_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights([PHRASES], Dataset.from_list(ROWS))
        check_weights([PHRASES], [{"text": ["a", "heart", "attack"]}])


def test_rows_that_can_be_read_but_once_are_left_for_the_training():
    stream = Once([{"text": "art"}] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights([PHRASES, ColumnWeights("w")], stream)
    assert len([*stream]) == 3


def _shuffled(rows):
    return Dataset.from_list([*reversed(rows)]).select(range(len(rows) - 1, -1, -1))


@pytest.mark.parametrize("kind", [list, Dataset.from_list, _shuffled])
@pytest.mark.parametrize("number", [0, 40, 12_000])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None])
def test_a_row_without_a_weight_is_named_however_late_it_comes(kind, number, value):
    rows = [{"w": 1.0}] * 12_001
    check_weights([ColumnWeights("w")], kind(rows))
    rows[number] = {"w": value}
    with pytest.raises(
        ValueError, match=rf"^Row {number} of train_dataset \(the first is 0\): 'w' is {value}, but wei"
    ):
        check_weights([ColumnWeights("w")], kind(rows))


def test_of_weights_of_tokens_and_of_rows_made_when_asked_for_the_first_are_looked_at():
    rows = [{"w": [1, 2]}] * 2000
    rows[999] = {"w": [1, -2]}
    for kind in (list, Dataset.from_list):
        with pytest.raises(ValueError, match=r"Row 999 .*'w' is \[1, -2\]"):
            check_weights([ColumnWeights("w")], kind(rows))
        check_weights([ColumnWeights("w")], kind(rows[1000:] + rows[:1000]))
    with pytest.raises(ValueError, match=r"Row 2 .*'w' is None"):
        check_weights([ColumnWeights("w")], Torch())
    check_weights([GroupWeights("g", weights={"en": 1, "de": 1})], Torch())


def test_what_a_transform_fills_is_not_missing():
    rows = Dataset.from_list([{"w": None}]).with_transform(lambda batch: {"w": [1.0 for _ in batch["w"]]})
    check_weights([ColumnWeights("w")], rows)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_row_without_a_group_is_named_and_no_group_by_itself(kind, value):
    late = kind([{"g": 1.0}] * 40 + [{"g": value}])
    weights = GroupWeights("g", weights={1.0: 2})
    with pytest.raises(ValueError, match=r"^Row 40 .* has no 'g', .*Fill it in, or give the weights a default, or d"):
        check_weights([weights], late)
    check_weights([GroupWeights("g", weights={1.0: 2}, default=1)], late)
    with pytest.raises(ValueError, match=r"^Row 40 .* has no 'g', .*Fill it in, or drop the row"):
        find_groups([GroupWeights("g", size_power=0.5)], late)
    assert find_groups([GroupWeights("g", follow="loss")], None, late) == {"g": {"1.0": 0}}


def test_a_row_of_a_group_without_a_weight_is_named():
    late = Dataset.from_list([{"g": "en"}] * 40 + [{"g": "fr"}])
    with pytest.raises(
        ValueError, match=r"^Row 40 .* is of the 'g' group 'fr', and weights are given for de, en alone"
    ):
        check_weights([GroupWeights("g", weights={"en": 1, "de": 2})], late)


def test_weights_of_groups_that_no_row_is_of_are_warned_about_with_the_groups_there_are():
    rows = Dataset.from_list([{"g": "en"}, {"g": "de"}, {"g": "en"}, {"g": None}])
    with pytest.warns(
        UserWarning, match=r"given for 'EN', but no row .* such a 'g': it has 'en' \(2 rows\), 'de' \(1"
    ):
        check_weights([GroupWeights("g", weights={"EN": 1, "de": 2}, default=1)], rows)
    with pytest.warns(UserWarning, match="given for 'False', .*YAML reads"):
        check_weights([GroupWeights("g", weights={False: 1}, default=1)], rows)


def test_labels_that_are_known_to_be_missing_make_a_warning_where_the_teacher_is_to_be_right():
    weights = [TeacherWeights("correctness")]
    with pytest.warns(UserWarning, match="no label was found in train_dataset, so all items weigh 1"):
        check_weights(weights, ROWS, has_labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights(weights, ROWS, has_labels=True)
        check_weights(weights, ROWS)
        check_weights([TeacherWeights()], ROWS, has_labels=False)


def test_a_large_boost_is_warned_about_at_the_users_own_line(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("heart attack\t30\n")
    for setting in (PhraseWeights(("heart attack",), boost=30), PhraseWeights(file=str(path))):
        with pytest.warns(UserWarning, match=r"boost 30, .* weighs 31 times .*30 % more is a boost of 0\.3") as caught:
            check_weights([setting], ROWS)
        assert [each.filename for each in caught] == [__file__], "and not a line of the package's"


@pytest.mark.parametrize("written", ["heart attack, 0.3", "heart attack 0,3", "heart attack;3"])
def test_a_file_whose_boosts_stand_behind_no_tab_is_told_so(tmp_path, written):
    path = tmp_path / "terms.txt"
    path.write_text(written)
    with pytest.warns(
        UserWarning, match=f"None of the 3 rows .*'{written}' ends in a number: a boost stands behind a"
    ):
        check_weights([PhraseWeights(file=str(path))], ROWS)


def test_a_users_file_keeps_the_columns_that_weights_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "sentence,kind,labels,language,w\n" + "".join(f"text {i},{'ab'[i % 2]},x,en,{i}\n" for i in range(20))
    )
    columns = {"text_column": "sentence", "label_column": "kind"}
    corpus = load_corpus(str(path), **columns, keeps_others=True)
    for rows in (corpus.train, corpus.test):
        assert sorted(rows.column_names) == ["kind", "label", "language", "sentence", "text", "w"]
        assert all(row["text"] == row["sentence"] == f"text {row['w']}" for row in rows)
        assert all(corpus.label_names[row["label"]] == row["kind"] == "ab"[row["w"] % 2] for row in rows)
        check_weights([ColumnWeights("w"), GroupWeights("language", weights={"en": 1})], rows)
    assert sorted(load_corpus(str(path), **columns).train.column_names) == ["label", "text"]
