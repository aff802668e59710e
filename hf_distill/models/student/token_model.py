"""A fast tokenizer of fewer tokens: its own description, edited."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

_MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_BYTE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


def needed_ids(tokenizer: Any, used: Iterable[int]) -> set[int]:
    """The ids that a tokenizer needs to go on writing `used` as it does, and any other text at all.

    These are the used ones, added and special tokens, single characters and bytes, and for BPE every token that is on
    the way to a kept one.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: its model is not WordPiece, BPE, Unigram or WordLevel, or is BPE that marks the inside of words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its vocabulary cannot be trimmed. Load it with "
            "AutoTokenizer (use_fast=True), or keep the vocabulary."
        )
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] not in _MODELS or (model.get("continuing_subword_prefix") and model["type"] == "BPE"):
        raise ValueError(
            f"A {model['type']} tokenizer{' with continuing_subword_prefix' if model['type'] == 'BPE' else ''} "
            f"cannot be trimmed; {', '.join(_MODELS)} can. Keep the vocabulary."
        )
    vocabulary = _vocabulary(model)
    affixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    needed = {*used, *(token["id"] for token in description["added_tokens"]), *tokenizer.all_special_ids}
    needed |= {i for token, i in vocabulary.items() if _is_single(token, affixes)}
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in vocabulary:
        needed.add(vocabulary[model["unk_token"]])
    if isinstance(model.get("unk_id"), int):
        needed.add(model["unk_id"])
    if model["type"] == "BPE":
        names = {i: token for token, i in vocabulary.items()}
        ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        for token in [names[i] for i in needed if i in names]:
            needed |= {vocabulary[part] for part in _parts(token, ranks, model.get("end_of_word_suffix") or "")}
    return needed


def trim_tokenizer(tokenizer: Any, ids: Mapping[int, int]) -> Any:
    """A copy of a tokenizer that knows only the old ids in `ids`, under their new numbers.

    Args:
        tokenizer: a fast tokenizer.
        ids: old id -> new id, in the same order.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in ids]
        model["unk_id"] = ids.get(model.get("unk_id"))
    else:
        model["vocab"] = {token: ids[i] for token, i in model["vocab"].items() if i in ids}
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [list(pair) for pair in _merges(model) if {*pair, "".join(pair)} <= vocabulary.keys()]
    for token in description["added_tokens"]:
        token["id"] = ids[token["id"]]
    if description.get("padding"):
        description["padding"]["pad_id"] = ids[description["padding"]["pad_id"]]
    _renumber_template(description.get("post_processor"), ids)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(description))
    return trimmed


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    # Older files write a merge as one string.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _is_single(token: str, affixes: Iterable[str | None]) -> bool:
    for affix in affixes:
        token = (token.removeprefix(affix).removesuffix(affix) or token) if affix else token
    return len(token) == 1 or bool(_BYTE.match(token))


def _parts(token: str, ranks: Mapping[tuple[str, str], int], suffix: str) -> Iterator[str]:
    """Every token on the way from characters to this one."""
    body = token[: -len(suffix)] if suffix and token.endswith(suffix) else token
    pieces = list(body)
    if body != token:
        pieces[-1:] = [pieces[-1] + suffix] if pieces else [suffix]
    while len(pieces) > 1:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        yield pieces[i]


def _renumber_template(processor: dict[str, Any] | None, ids: Mapping[int, int]) -> None:
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber_template(inner, ids)
    for name in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if name in processor:
            processor[name][1] = ids[processor[name][1]]
    for token in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        token["ids"] = [ids[i] for i in token["ids"]]
