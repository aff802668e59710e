"""What a data set lacks for the weights asked for is said before the first step, and nothing of it is used up."""

import random
import warnings

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream

from hf_distill.weighting import ColumnWeights, GroupWeights, PhraseWeights
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
        with pytest.raises(ValueError, match="groups of 'g' are to be counted, but the data set is a stream"):
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
    with pytest.raises(ValueError, match="column 'g', which the data set does not have"):
        find_groups([follow], train, Dataset.from_list([{"text": "a"}]))


@pytest.mark.parametrize(
    "kind", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))]
)
def test_a_missing_column_is_refused_with_those_there_are(kind):
    rows = [{"text": "a", "label": 1}] * 3
    with pytest.raises(ValueError, match=r"column 'w', which the data set does not have \(it has text, label\)"):
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
