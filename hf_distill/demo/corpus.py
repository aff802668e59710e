"""Labelled texts with a training and a test part: the bundled SNIPS, or any dataset by name or path."""

import csv
import gzip
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

from hf_distill.collator import LABEL_COLUMNS
from hf_distill.recipes.labels import class_number, is_missing
from hf_distill.sources import load_splits

TEST_FRACTION = 0.1


@dataclass(frozen=True)
class Corpus:
    """Training and test rows with `text` and `label`, an index into `label_names` or None; maybe other columns."""

    train: Dataset
    test: Dataset
    label_names: tuple[str, ...]


def load_corpus(
    name: str, *, text_column: str = "text", label_column: str = "label", keeps_others: bool = False
) -> Corpus:
    """Returns 'snips' from the package, else what `load_splits` finds under the name or path.

    A dataset with a `test` split is tested there, else on `validation`, else on a tenth of `train` drawn with seed 0.

    Args:
        name: of the data set.
        text_column: becomes `text`.
        label_column: becomes `label`.
        keeps_others: whether all columns stay, under their own names too, but those that would pass for labels.
    """
    if name == "snips":
        return _corpus(_read_snips("train"), _read_snips("test"), "text", "label", keeps_others=keeps_others)
    train, test = _train_and_test(load_splits(name))
    return _corpus(train, test, text_column, label_column, keeps_others=keeps_others)


def keep_labels(corpus: Corpus, *, per_class: int, seed: int) -> Dataset:
    """Returns the training rows with `label` None in all but `per_class` rows of each class, drawn with `seed`."""
    shuffled = corpus.train.shuffle(seed=seed)
    kept = [0] * len(corpus.label_names)
    labels: list[int | None] = []
    for label in shuffled["label"]:
        if label is None or kept[label] == per_class:
            labels.append(None)
        else:
            labels.append(label)
            kept[label] += 1
    return shuffled.remove_columns("label").add_column("label", labels)


def labelled_rows(rows: Dataset) -> Dataset:
    """Returns the rows whose `label` is not None."""
    return rows.select([index for index, label in enumerate(rows["label"]) if label is not None])


def _with_numbers(rows: Dataset, column: str) -> Dataset:
    numbers = [None if is_missing(label) else class_number(label) for label in rows[column]]
    return rows.remove_columns(column).add_column(column, numbers)


def _read_snips(split: str) -> Dataset:
    packed = (files("hf_distill.demo") / "data" / "snips" / f"{split}.csv.gz").read_bytes()
    rows = list(csv.DictReader(gzip.decompress(packed).decode("utf-8").splitlines()))
    return Dataset.from_dict({column: [row[column] for row in rows] for column in ("text", "label")})


def _train_and_test(splits: DatasetDict) -> tuple[Dataset, Dataset]:
    if "train" not in splits:
        raise ValueError(f"The dataset has no 'train' split; it has {sorted(splits)}.")
    for name in ("test", "validation"):
        if name in splits:
            return splits["train"], splits[name]
    halves = splits["train"].train_test_split(test_size=TEST_FRACTION, seed=0)
    return halves["train"], halves["test"]


def _corpus(train: Dataset, test: Dataset, text_column: str, label_column: str, *, keeps_others: bool) -> Corpus:
    for column in (text_column, label_column):
        if column not in train.column_names:
            raise ValueError(f"The dataset has no column '{column}'; it has {train.column_names}.")
    feature = train.features[label_column]
    if isinstance(feature, ClassLabel):
        values, names = list(range(feature.num_classes)), tuple(feature.names)
    else:
        values = sorted({value for value in train[label_column] if not is_missing(value)})
        numbers = [number for number in map(class_number, values) if number is not None]
        names = tuple(str(value) for value in values)
        if numbers and len(numbers) == len(values):  # numbers are the classes' own, also where one has no row here
            names = tuple(str(number) for number in range(max(numbers) + 1))
            train, test = (_with_numbers(rows, label_column) for rows in (train, test))
            values = [*range(len(names))]
    index_of: dict[Any, int] = {value: index for index, value in enumerate(values)}

    def indexed(rows: Dataset) -> Dataset:
        labels = [None if is_missing(value) else value for value in rows[label_column]]
        unknown = {*labels} - {None, *index_of}
        if unknown:
            raise ValueError(
                f"Labels {sorted(map(str, unknown))} do not occur in the training rows; known: {list(names)}."
            )
        own = {"text": rows[text_column], "label": [index_of.get(value) for value in labels]}
        if not keeps_others:
            return Dataset.from_dict(own)
        kept = rows.select_columns([name for name in rows.column_names if name not in {*own, *LABEL_COLUMNS}])
        made = Dataset.from_dict(own)
        return concatenate_datasets([made, kept], axis=1) if kept.column_names else made

    return Corpus(train=indexed(train), test=indexed(test), label_names=names)
