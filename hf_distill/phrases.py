"""Weights of tokens, by the phrases of their text that they belong to."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_distill.items import IGNORE_INDEX
from hf_distill.phrase_index import PhraseIndex, is_unspaced
from hf_distill.weighting import PhraseWeights

_SHOWN = 8  # tokens of each side in an error
_LARGE_BOOST = 10  # above which a percentage may be meant


def phrase_weights(text: str, offsets: Iterable[Sequence[int]], phrases: PhraseIndex) -> list[float]:
    """The weight of each token: 1, and the largest boost of the phrases that it is a part of.

    Args:
        text: what was tokenized.
        offsets: (start, end) of each token in the text, as a fast tokenizer gives them; (0, 0) of special tokens.
        phrases: what to look for.
    """
    spans = phrases.spans(text)
    if not spans:
        return [1.0 for _ in offsets]
    boosts = np.zeros(len(text))
    for start, end, boost in spans:
        boosts[start:end] = np.maximum(boosts[start:end], boost)
    return [1.0 + float(boosts[start:end].max(initial=0.0)) for start, end in offsets]


def token_weights(
    ids: Sequence[Any], texts: Sequence[Any], tokenizer: Any, phrases: PhraseIndex, *, columns: tuple[str, str]
) -> list[list[float]]:
    """The weights of the tokens of rows, by tokenizing their texts again, with offsets.

    Args:
        ids: each row's token ids: of all its text or, cut to a length, of its beginning or end; with special tokens,
            padding and -100 before and after, or without.
        texts: each row's text, or the list of its words where those were tokenized (`is_split_into_words`).
        tokenizer: a fast one, which made the ids.
        phrases: what to look for.
        columns: the names of the ids and of the texts, for errors.

    Returns: for each row one number per id; 1 for special tokens.

    Raises:
        ValueError: the tokenizer has no offsets, or the ids are not those of the text.
    """
    _check_tokenizer(tokenizer, columns)
    for text in texts:
        if not isinstance(text, str) and not _is_words(text):
            raise ValueError(f"Column {columns[1]!r} holds {text!r}; expected a text, or a list of words.")
    special = _special_ids(tokenizer)
    weights = []
    for own, text in zip(ids, texts, strict=True):
        found, offsets, whole = _encoded(text, tokenizer)
        of_text = phrase_weights(whole, offsets, phrases)
        own = own.tolist() if hasattr(own, "tolist") else [*own]
        placed = _placed(own, found, of_text, special, from_end=tokenizer.truncation_side == "left")
        if placed is None:
            raise ValueError(_mismatch(own, found, whole, tokenizer, columns))
        weights.append(placed)
    return weights


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and all(isinstance(word, str) for word in value)


def _check_tokenizer(tokenizer: Any, columns: tuple[str, str]) -> None:
    if getattr(tokenizer, "is_fast", False):
        return
    given = "no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__}, which is no fast tokenizer"
    raise ValueError(
        f"Finding the phrases of {columns[1]!r} among the tokens of {columns[0]!r} needs offsets, and there is "
        f"{given}. Pass a fast one as processing_class (AutoTokenizer.from_pretrained gives one where there is one), "
        "or make a column of weights yourself and weigh by that: {by: column}."
    )


def _encoded(text: Any, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]], str]:
    """A text's ids, with their offsets in the text that is returned, which joins words given apart."""
    is_split = not isinstance(text, str)
    encoded = tokenizer(
        [*text] if is_split else text, is_split_into_words=is_split, return_offsets_mapping=True, verbose=False
    )
    offsets = [(start, end) for start, end in encoded["offset_mapping"]]
    if not is_split:
        return encoded["input_ids"], offsets, text
    whole, starts = "", []
    for word in text:
        # Texts of unspaced scripts are often given one character at a time.
        is_apart = whole and word and not (is_unspaced(whole[-1]) and is_unspaced(word[0]))
        whole += " " if is_apart else ""
        starts.append(len(whole))
        whole += word
    words = encoded.word_ids(0)
    shifts = [0 if word is None else starts[word] for word in words]
    return (
        encoded["input_ids"],
        [(start + by, end + by) for (start, end), by in zip(offsets, shifts, strict=True)],
        whole,
    )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    # An unknown word is of the text, unless the token has another part too, as in GPT-2.
    unknown = {tokenizer.unk_token_id} - ends
    return frozenset((special | {*tokenizer.all_special_ids} | {IGNORE_INDEX}) - unknown)


def _placed(
    own: list[int], found: list[int], weights: list[float], special: frozenset[int], *, from_end: bool
) -> list[float] | None:
    """The weights of `found`, a whole text's ids, for a row's own ids; None where these are of another text."""
    first, last = _inside(own, special)
    begin, end = _inside(found, special)
    count = last - first
    places = [place for place in (begin, end - count) if place >= begin]
    for place in reversed(places) if from_end else places:
        if found[place : place + count] == own[first:last]:
            return [1.0] * first + weights[place : place + count] + [1.0] * (len(own) - last)
    return None


def _inside(ids: list[int], special: frozenset[int]) -> tuple[int, int]:
    """From where to where ids are left when special ones are taken off both ends."""
    plain = [place for place, number in enumerate(ids) if number not in special]
    return (plain[0], plain[-1] + 1) if plain else (0, 0)


def _mismatch(own: list[int], found: list[int], text: str, tokenizer: Any, columns: tuple[str, str]) -> str:
    tokens = [tokenizer.convert_ids_to_tokens([i for i in ids if i >= 0][:_SHOWN]) for ids in (own, found)]
    ids, column = columns
    return (
        f"The row's {ids} are not the tokens of its {column!r}: they begin with {tokens[0]}, the text "
        f"{text[:60]!r} with {tokens[1]}. Name the column that was tokenized (text_column), with this very tokenizer. "
        "Where texts were joined, cut into blocks or put into a template, weigh them before: weigh_phrases(dataset, "
        "tokenizer, phrases), group its column of weights as the ids, and weigh by that: {by: column}."
    )


def weigh_phrases(
    dataset: Any,
    tokenizer: Any,
    phrases: Iterable[str] | Mapping[str, float] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    boost: float = 0.3,
    text_column: str = "text",
    column: str = "distill_weight",
    ids_column: str = "input_ids",
    match_case: bool = False,
) -> Any:
    """The data set with a column of weights, one for each token: 1 + boost where it belongs to a phrase, else 1.

    For language models whose texts are joined or cut into blocks afterwards, the weights with the ids; train with
    `item_weights: [{by: column, column: distill_weight}]`.

    Args:
        dataset: a `datasets` data set of any kind, or a list of rows, already tokenized.
        tokenizer: the fast tokenizer that did it.
        phrases: what to look for; a mapping gives each a boost of its own.
        file: in place of `phrases`, a UTF-8 text file of them, one on a line, each with a tab and a boost of its own
            behind it if wanted.
        boost: >= 0, of phrases without their own; of overlapping phrases the largest counts.
        text_column: the text.
        column: the name of the new column.
        ids_column: the token ids; `labels` for the targets of encoder-decoder models.
        match_case: whether upper and lower case differ.

    Raises:
        ValueError: the phrases or boosts are none, or given twice; the tokenizer is not fast, the rows are not
            tokenized, a column is missing, or ids are not those of the text.
    """
    boosts = _boosts(phrases, file, boost)
    if large := large_boost(boosts):
        warnings.warn(large, stacklevel=2)
    index = PhraseIndex(boosts, match_case=match_case)
    names = (ids_column, text_column)
    _check_tokenizer(tokenizer, names)

    def weigh(rows: Mapping[str, Any]) -> dict[str, Any]:
        if missing := [name for name in names if name not in rows]:
            raise ValueError(f"The data set has no column {missing[0]!r}; it has {', '.join(rows)}.")
        return {column: token_weights(rows[ids_column], rows[text_column], tokenizer, index, columns=names)}

    if hasattr(dataset, "map"):
        return dataset.map(weigh, batched=True)
    made = []
    for row in dataset:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"The data set holds {row!r} in place of a row. Give tokenized rows with their text: "
                f"{{'{text_column}': text, **tokenizer(text)}} for each."
            )
        made.append({**row, column: weigh({name: [value] for name, value in row.items()})[column][0]})
    return made


def large_boost(boosts: Mapping[str, float]) -> str | None:
    """What to warn of where a boost looks like a percentage."""
    phrase = max(boosts, key=boosts.__getitem__)
    if (boost := boosts[phrase]) <= _LARGE_BOOST:
        return None
    return (
        f"{phrase!r} has the boost {boost:g}, which is added to the weight 1: it weighs {1 + boost:g} times as much "
        "as what is in no phrase. 30 % more is a boost of 0.3."
    )


def _boosts(phrases: Any, file: Any, boost: float) -> dict[str, float]:
    """Each phrase with its boost, checked as those of `PhraseWeights`."""
    path = None if file is None else os.fspath(file)
    if not (isinstance(phrases, Mapping) and phrases and path is None):
        listed: Any = () if phrases is None else phrases if isinstance(phrases, str) else tuple(phrases)
        return PhraseWeights(listed, file=path, boost=boost).boosts()
    boosts: dict[str, float] = {}
    for phrase, own in phrases.items():
        try:
            boosts |= PhraseWeights((phrase,), boost=own).boosts()
        except ValueError as error:
            raise ValueError(f"phrases[{phrase!r}]: {error}") from None
    return boosts
