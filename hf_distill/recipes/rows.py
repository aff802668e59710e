"""Rows as a data set holds them, as the columns that models read: one class a kind of row, for `Dataset.map`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Audio, Dataset, Image, Value

from hf_distill.collator import TEACHER_PREFIX
from hf_distill.items import IGNORE_INDEX
from hf_distill.token_alignment import tokenize_for_teacher

Columns = dict[str, list[Any]]


def _for_both(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> Columns:
    return {**student, **{f"{TEACHER_PREFIX}{name}": value for name, value in (teacher or {}).items()}}


def _texts(rows: Mapping[str, Sequence[Any]], column: str) -> list[str]:
    """A column's texts.

    Raises:
        ValueError: a cell that holds none.
    """
    for value in rows[column]:
        if not isinstance(value, str):
            raise ValueError(f"The column {column!r} has {value!r}, expected a text. Fill it in, or drop the row.")
    return [*rows[column]]


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of texts, as tokens of the student and, where it reads others, of the teacher.

    Attributes:
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, or None.
        max_length: tokens kept; None keeps all.
        paired: whether a second text follows.
    """

    tokenizer: Any
    teacher_tokenizer: Any | None
    max_length: int | None
    paired: bool = False

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        texts = [_texts(rows, name) for name in (("text", "text_pair") if self.paired else ("text",))]
        options = _cut(self.max_length)
        other = None if self.teacher_tokenizer is None else self.teacher_tokenizer(*texts, **options)
        return _for_both(self.tokenizer(*texts, **options), other)


def _cut(max_length: int | None) -> dict[str, Any]:
    return {} if max_length is None else {"truncation": True, "max_length": max_length}


@dataclass(frozen=True)
class Words:
    """Words with a tag each, which their first token has; `tokens` is a list of words, or a text of them.

    Attributes:
        tokenizer: a fast one.
        max_length: tokens kept; None keeps all.
    """

    tokenizer: Any
    max_length: int | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        words = [value.split() if isinstance(value, str) else value for value in rows["tokens"]]
        encoded = self.tokenizer(words, is_split_into_words=True, **_cut(self.max_length))
        if "tags" not in rows:
            return dict(encoded)
        labels = []
        for number, (own, tags) in enumerate(zip(words, rows["tags"], strict=True)):
            if tags is not None and len(tags) != len(own):
                raise ValueError(f"{own} are {len(own)} words, with {len(tags)} tags: {tags}.")
            labels.append(None if tags is None else _on_first_tokens(encoded.word_ids(number), tags))
        return {**encoded, "labels": labels}


def _on_first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    before = [None, *words]
    return [
        IGNORE_INDEX if word is None or word == last else tags[word] for word, last in zip(words, before, strict=False)
    ]


@dataclass(frozen=True)
class Spans:
    """Questions about a context, as windows of it that overlap by a quarter, with the tokens of the answer.

    A window without the whole answer has its first token for one, as models for SQuAD do.

    Attributes:
        tokenizer: a fast one.
        max_length: tokens of a window; None for one window.
    """

    tokenizer: Any
    max_length: int | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of windows."""
        options: dict[str, Any] = {}
        if self.max_length is not None:
            options = {"truncation": "only_second", "max_length": self.max_length, "stride": self.max_length // 4}
            options["return_overflowing_tokens"] = True
        questions, contexts = (_texts(rows, name) for name in ("question", "context"))
        encoded = self.tokenizer(questions, contexts, return_offsets_mapping=True, **options)
        offsets = encoded.pop("offset_mapping")
        origins = encoded.pop("overflow_to_sample_mapping", [*range(len(offsets))])
        answers = _answers(rows)
        if answers is None:
            return dict(encoded)
        found = [
            _span(encoded.sequence_ids(window), offsets[window], answers[row]) for window, row in enumerate(origins)
        ]
        starts, ends = zip(*found, strict=True)
        return {**encoded, "start_positions": [*starts], "end_positions": [*ends]}


def _answers(rows: Mapping[str, Sequence[Any]]) -> list[tuple[int, int] | None] | None:
    """The characters of each first answer: from, and to before which; None for an unanswerable question."""
    if "answers" in rows:
        first = [
            (value["text"][0], value["answer_start"][0]) if value and value["text"] else None
            for value in rows["answers"]
        ]
    elif "answer" in rows and "answer_start" in rows:
        pairs = zip(rows["answer"], rows["answer_start"], strict=True)
        first = [(text, int(start)) if text and start is not None else None for text, start in pairs]
    else:
        return None
    return [None if answer is None else (answer[1], answer[1] + len(answer[0])) for answer in first]


def _span(
    sequences: Sequence[int | None], offsets: Sequence[Sequence[int]], answer: tuple[int, int] | None
) -> tuple[int, int]:
    inside = [place for place, sequence in enumerate(sequences) if sequence == 1]
    if answer is None or not inside or offsets[inside[0]][0] > answer[0] or offsets[inside[-1]][1] < answer[1]:
        return 0, 0
    start = max(place for place in inside if offsets[place][0] <= answer[0])
    end = min(place for place in inside if offsets[place][1] >= answer[1])
    return start, max(start, end)


@dataclass(frozen=True)
class Choices:
    """A question with several answers to choose from, each of them beside it.

    Attributes:
        tokenizer: the one of both models.
        max_length: tokens kept; None keeps all.
    """

    tokenizer: Any
    max_length: int | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        questions = [
            [question] * len(choices)
            for question, choices in zip(_texts(rows, "question"), rows["choices"], strict=True)
        ]
        encoded = [
            self.tokenizer(own, list(choices), **_cut(self.max_length))
            for own, choices in zip(questions, rows["choices"], strict=True)
        ]
        return {name: [row[name] for row in encoded] for name in encoded[0]}


@dataclass(frozen=True)
class Sequences:
    """Texts to read and texts to write.

    Attributes:
        tokenizer: the one of both models.
        max_length: tokens kept of either; None keeps all.
    """

    tokenizer: Any
    max_length: int | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        columns = dict(self.tokenizer(_texts(rows, "source"), **_cut(self.max_length)))
        if "target" in rows:
            columns["labels"] = self.tokenizer(text_target=_texts(rows, "target"), **_cut(self.max_length))[
                "input_ids"
            ]
        return columns


@dataclass(frozen=True)
class BothTokens:
    """Text in the tokens of both models, aligned by what they have read.

    Attributes:
        tokenizer: the student's.
        teacher_tokenizer: the teacher's.
        max_length: tokens of the student kept; None keeps all.
    """

    tokenizer: Any
    teacher_tokenizer: Any
    max_length: int | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows.

        Raises:
            ValueError: the rows hold no plain text.
        """
        if "text" not in rows:
            raise ValueError(
                "token_alignment: offsets reads plain text, in a column text. Say what it is called: data.columns: "
                "{text: ...}."
            )
        ends = all(tokenizer.eos_token_id is not None for tokenizer in (self.tokenizer, self.teacher_tokenizer))
        return tokenize_for_teacher(
            _texts(rows, "text"), self.tokenizer, self.teacher_tokenizer, max_length=self.max_length, append_eos=ends
        )


@dataclass(frozen=True)
class Images:
    """Images as pixels, made when a row is read; `image` holds images, or their paths.

    Attributes:
        processor: the student's.
        teacher_processor: the teacher's, where it makes other pixels.
    """

    processor: Any
    teacher_processor: Any | None

    def typed(self, rows: Dataset) -> Dataset:
        """The rows with images in place of their paths."""
        return rows.cast_column("image", Image()) if rows.features["image"] == Value("string") else rows

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        images = [image.convert("RGB") for image in rows["image"]]
        made = (
            None if processor is None else {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
            for processor in (self.processor, self.teacher_processor)
        )
        student, teacher = made
        return {**_labels_of(rows), **_for_both(student or {}, teacher)}


@dataclass(frozen=True)
class Sounds:
    """Sounds as what a feature extractor makes of them, when a row is read.

    `audio` holds sounds of `datasets`, their paths, or lists of samples at the extractor's rate.

    Attributes:
        processor: the student's.
        teacher_processor: the teacher's, where it makes other inputs.
    """

    processor: Any
    teacher_processor: Any | None

    def typed(self, rows: Dataset) -> Dataset:
        """The rows with sounds at the extractor's rate."""
        feature = rows.features["audio"]
        if feature == Value("string") or isinstance(feature, Audio):
            return rows.cast_column("audio", Audio(sampling_rate=self.processor.sampling_rate))
        return rows

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> Columns:
        """The columns of a batch of rows."""
        samples = [np.asarray(sound if isinstance(sound, list) else sound["array"]) for sound in rows["audio"]]
        student, teacher = (
            None if processor is None else processor(samples, sampling_rate=processor.sampling_rate)
            for processor in (self.processor, self.teacher_processor)
        )
        return {**_labels_of(rows), **_for_both(student or {}, teacher)}


def _labels_of(rows: Mapping[str, Sequence[Any]]) -> Columns:
    return {"label": [*rows["label"]]} if "label" in rows else {}
