"""The rows of a recipe, in the columns that its task has, and what makes batches of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from hf_distill.collator import LABEL_COLUMNS
from hf_distill.config.checks import did_you_mean
from hf_distill.metrics import compute_metrics_for
from hf_distill.models.heads import context_length, problem_type, task_model
from hf_distill.recipes import rows as made
from hf_distill.recipes.labels import Labels
from hf_distill.recipes.models import Models
from hf_distill.recipes.recipe import DataPart
from hf_distill.sources import load_rows, load_splits

# Task -> the columns a row must have, and those it may have.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text-classification": (("text",), ("text_pair", "label")),
    "token-classification": (("tokens",), ("tags",)),
    "question-answering": (("question", "context"), ("answers", "answer", "answer_start")),
    "multiple-choice": (("question", "choices"), ("label",)),
    "fill-mask": (("text",), ()),
    "text-generation": ((), ("text", "prompt", "completion", "messages")),
    "text2text-generation": (("source",), ("target",)),
    "image-classification": (("image",), ("label",)),
    "audio-classification": (("audio",), ("label",)),
}
_HELD_OUT = ("validation", "test")
_NO_LENGTH = 10**9  # tokenizers that know no length say a larger number


@dataclass(frozen=True)
class Prepared:
    """Rows ready for a trainer.

    Attributes:
        train: to train on; None where only an evaluation is wanted.
        eval: to evaluate on; None where there are none.
        collator: makes batches; None for the trainer's own.
        is_lazy: whether rows are made when they are read, so that no column may be removed before.
    """

    train: Any
    eval: Any
    collator: Any | None
    is_lazy: bool


@dataclass(frozen=True)
class Split:
    """Rows as they were written.

    Attributes:
        train: to train on.
        eval: to evaluate on; None where there are none.
        is_held_out: whether `eval` was taken out of the split to train on, for want of others.
    """

    train: Dataset
    eval: Dataset | None
    is_held_out: bool = False


def split_rows(data: DataPart) -> Split:
    """The rows to train on and to evaluate on, as they were written.

    Raises:
        ValueError: no such file or split; with those there are.
    """
    train_split = data.train_split or "train"
    if data.eval is not None:
        return Split(load_rows(data.train, train_split, data.config), eval_rows(data))
    if data.eval_split is not None:
        return Split(*(load_rows(data.train, split, data.config) for split in (train_split, data.eval_split)))
    splits = load_splits(data.train, data.config)
    train = load_rows(data.train, train_split, data.config) if train_split not in splits else splits[train_split]
    name = _own_split(data, splits)
    if name is not None:
        return Split(train, splits[name])
    if data.test_fraction == 0:
        return Split(train, None)
    if len(train) < 2:
        raise ValueError(
            f"{data.train} has {len(train)} row, of which none can be held out to evaluate on. Set data.eval, or "
            "data.test_fraction: 0."
        )
    halves = train.train_test_split(test_size=data.test_fraction, seed=0)
    return Split(halves["train"], halves["test"], is_held_out=True)


def _own_split(data: DataPart, splits: DatasetDict) -> str | None:
    """The split to evaluate on where none is named."""
    return next((name for name in _HELD_OUT if name in splits and name != data.train_split), None)


def eval_rows(data: DataPart) -> Dataset:
    """The rows of `eval` to evaluate on: of the split that is named, else of validation or test, else all.

    Raises:
        ValueError: no such file or split.
    """
    assert data.eval is not None
    if data.eval_split is not None:
        return load_rows(data.eval, data.eval_split, data.config)
    splits = load_splits(data.eval, data.config)
    return splits[next((name for name in _HELD_OUT if name in splits), next(iter(splits)))]


def named_columns(rows: Dataset, task: str, columns: Mapping[str, str]) -> Dataset:
    """The rows with their columns called as the task calls them; others stay.

    Args:
        rows: as they were written.
        task: as the Hub calls it.
        columns: what the task's columns are called in the data, where it is otherwise.

    Raises:
        ValueError: a column that the task has not, or that the data has not; with those there are.
    """
    needed, more = COLUMNS[task]
    for role, column in columns.items():
        if role not in (*needed, *more):
            raise ValueError(
                f"data.columns.{role}: {task} has no such column.{did_you_mean(role, (*needed, *more))} It has "
                f"{', '.join((*needed, *more))}."
            )
        if column not in rows.column_names:
            raise ValueError(
                f"The data has no column {column!r} (data.columns.{role}).{did_you_mean(column, rows.column_names)} "
                f"It has {', '.join(rows.column_names)}."
            )
        if column != role:
            rows = rows.remove_columns(role) if role in rows.column_names else rows
            rows = rows.rename_column(column, role)
    others = [name for name in LABEL_COLUMNS if name in rows.column_names]
    if "label" in more and others and "label" not in others:
        rows = rows.rename_column(others[0], "label")  # as Trainer takes it for the labels
    for role in needed:
        if role not in rows.column_names:
            raise ValueError(
                f"{task} needs the column {role!r}, and the data has {', '.join(rows.column_names)}. Say what it is "
                f"called: data.columns: {{{role}: ...}}."
            )
    return rows


def prepare(train: Dataset | None, held_out: Dataset | None, data: DataPart, models: Models, args: Any) -> Prepared:
    """The rows with the inputs of both models.

    Args:
        train: to train on, as written.
        held_out: to evaluate on, as written.
        data: the columns and lengths.
        models: what reads them.
        args: the training arguments; the main process goes first.

    Raises:
        ValueError: a column or label that is wrong, or a setting that the task does not read.
    """
    _check_read(data, models.task, args)
    parts = [None if part is None else named_columns(part, models.task, data.columns) for part in (train, held_out)]
    maker = _MAKERS[models.task](data, models, args)
    with args.main_process_first(desc="preparing the rows"):
        train, held_out = (None if part is None else maker(part) for part in parts)
    return Prepared(train, held_out, _collator(data, models), models.task in _LAZY)


def _check_read(data: DataPart, task: str, args: Any) -> None:
    if data.mask_probability is not None and task != "fill-mask":
        raise ValueError(f"data.mask_probability is of fill-mask alone, and the task is {task}. Drop it.")
    if data.max_length is not None and task == "text-generation" and args.token_alignment != "offsets":
        raise ValueError(f"data.max_length: of text-generation it is arguments.max_length: {data.max_length}.")
    if data.max_length is not None and task in _LAZY:
        raise ValueError(f"data.max_length counts tokens, and the task is {task}. Drop it.")


def text_length(data: DataPart, models: Models) -> int | None:
    """How many tokens of a text are kept: as said, or what the tokenizer and the models read; None for all."""
    if data.max_length is not None:
        return data.max_length
    said = [getattr(models.processor, "model_max_length", None)]
    said += [context_length(model) for model in (models.student, models.teacher) if model is not None]
    lengths = [length for length in said if length is not None and length < _NO_LENGTH]
    return min(lengths, default=None)


def _labels(models: Models) -> Labels:
    return Labels(models.labels, kind_of(models))


def kind_of(models: Models) -> str:
    """What the labels of a classifier are, by the models' configs."""
    configs = [task_model(model).config for model in (models.teacher, models.student) if model is not None]
    named = next((config.problem_type for config in configs if config.problem_type is not None), None)
    return named or problem_type(configs[0], None)


Maker = Callable[[Dataset], Dataset]


def _classes(data: DataPart, models: Models, args: Any) -> Maker:
    length, labels = text_length(data, models), _labels(models)

    def make(rows: Dataset) -> Dataset:
        tokenise = made.Texts(
            models.processor, models.teacher_processor, length, paired="text_pair" in rows.column_names
        )
        return _with_labels(rows, labels).map(tokenise, batched=True)

    return make


def _with_labels(rows: Dataset, labels: Labels) -> Dataset:
    others = [name for name in LABEL_COLUMNS if name != "label" and name in rows.column_names]
    rows = rows.remove_columns(others)  # they would pass for labels
    if "label" not in rows.column_names:
        return rows
    return rows.remove_columns("label").add_column("label", labels.of_column(rows, "label"))


def _tags(data: DataPart, models: Models, args: Any) -> Maker:
    tokenise = made.Words(models.processor, text_length(data, models))

    def make(rows: Dataset) -> Dataset:
        if "tags" in rows.column_names:
            tags = Labels(models.labels).of_words(rows, "tags")
            rows = rows.remove_columns("tags").add_column("tags", tags)
        return rows.map(tokenise, batched=True, remove_columns=rows.column_names)

    return make


def _spans(data: DataPart, models: Models, args: Any) -> Maker:
    tokenise = made.Spans(models.processor, text_length(data, models))
    return lambda rows: rows.map(tokenise, batched=True, remove_columns=rows.column_names)


def _choices(data: DataPart, models: Models, args: Any) -> Maker:
    tokenise = made.Choices(models.processor, text_length(data, models))
    # The collator stacks the choices, so other columns would be in its way.
    return lambda rows: rows.map(
        tokenise, batched=True, remove_columns=[name for name in rows.column_names if name != "label"]
    )


def _masked(data: DataPart, models: Models, args: Any) -> Maker:
    tokenise = made.Texts(models.processor, None, text_length(data, models))
    return lambda rows: rows.map(tokenise, batched=True)


def _generated(data: DataPart, models: Models, args: Any) -> Maker:
    if args.token_alignment == "offsets" and models.teacher_processor is not None:
        tokenise = made.BothTokens(models.processor, models.teacher_processor, text_length(data, models))
        return lambda rows: rows.map(tokenise, batched=True, remove_columns=rows.column_names)
    return lambda rows: rows  # the trainer reads text itself


def _sequences(data: DataPart, models: Models, args: Any) -> Maker:
    tokenise = made.Sequences(models.processor, text_length(data, models))
    return lambda rows: rows.map(tokenise, batched=True)


def _images(data: DataPart, models: Models, args: Any) -> Maker:
    return _when_read(made.Images(models.processor, models.teacher_processor), models)


def _sounds(data: DataPart, models: Models, args: Any) -> Maker:
    return _when_read(made.Sounds(models.processor, models.teacher_processor), models)


def _when_read(read: Any, models: Models) -> Maker:
    def make(rows: Dataset) -> Dataset:
        return _with_labels(read.typed(rows), _labels(models)).with_transform(read)

    return make


_MAKERS: dict[str, Callable[[DataPart, Models, Any], Maker]] = {
    "text-classification": _classes,
    "token-classification": _tags,
    "question-answering": _spans,
    "multiple-choice": _choices,
    "fill-mask": _masked,
    "text-generation": _generated,
    "text2text-generation": _sequences,
    "image-classification": _images,
    "audio-classification": _sounds,
}
_LAZY = ("image-classification", "audio-classification")


def _collator(data: DataPart, models: Models) -> Any | None:
    """What makes batches, where the trainer would not find it by itself."""
    task, tokenizer = models.task, models.processor
    if task == "fill-mask":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=data.mask_probability or 0.15)
    if task == "text2text-generation":
        return DataCollatorForSeq2Seq(tokenizer, model=models.student)
    simple = {
        "token-classification": DataCollatorForTokenClassification,
        "multiple-choice": DataCollatorForMultipleChoice,
        "audio-classification": DataCollatorWithPadding,
    }
    return simple[task](tokenizer) if task in simple else None


def metrics_of(models: Models, options: bool | Mapping[str, Any]) -> Any | None:
    """The `compute_metrics` of a task; of language models None, whose evaluation then keeps no logits.

    Args:
        models: the task and its labels.
        options: of `compute_metrics_for`; False for none.

    Raises:
        TypeError: an option that the task's metrics do not have.
    """
    named = {
        "token-classification": "token_classification",
        "question-answering": "question_answering",
        "multiple-choice": "multiple_choice",
    }
    if options is False:
        return None
    given = {} if options is True else dict(options)
    if models.task.endswith(("image-classification", "text-classification", "audio-classification")):
        return compute_metrics_for(kind_of(models), **given)
    if models.task in named:
        labels = list(models.labels.values())
        if models.task == "token-classification" and any(label.startswith("B-") for label in labels):
            given.setdefault("label_names", labels)
        return compute_metrics_for(named[models.task], **given)
    if given:
        raise ValueError(f"metrics of {models.task} have no options: the loss and its perplexity. Drop them.")
    return None
