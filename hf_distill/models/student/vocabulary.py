"""Fewer tokens: a model and its tokenizer cut to what a corpus needs."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.models.student.axes import vocabulary_axes
from hf_distill.models.student.depth import text_config
from hf_distill.models.student.fresh import new_model, saved_tensors
from hf_distill.models.student.source import source_model
from hf_distill.models.student.token_model import needed_ids, trim_tokenizer

_BATCH = 1000


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A model and a tokenizer of fewer tokens.

    Attributes:
        model: the new model; token i of it is token `kept[i]` of the old one.
        tokenizer: the new tokenizer.
        kept: (new vocabulary,) the old ids, ascending.
    """

    model: PreTrainedModel
    tokenizer: Any
    kept: Tensor


@torch.no_grad()
def trim_vocabulary(
    model: nn.Module | str, tokenizer: Any, texts: Iterable[str], *, keep: Iterable[int] = ()
) -> TrimmedVocabulary:
    """A model whose vocabulary holds only what some texts need, with its tokenizer; both are new.

    Kept are the tokens of the texts, all special and added tokens, those that the config names, and every single
    character or byte of the tokenizer, so that other text can still be written, in more tokens. The texts themselves
    become the same tokens as before, under new ids, and the logits of kept tokens stay as they are.

    Args:
        model: a Transformers model, a Hub name or a local folder.
        tokenizer: its fast tokenizer (WordPiece, BPE, Unigram or WordLevel).
        texts: what the student will read and write.
        keep: further ids to keep.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: its model cannot be cut, it knows more tokens than the model, or the model has no vocabulary.
    """
    source = source_model(model)
    size = getattr(text_config(source.config), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(source.config).__name__} has no vocab_size, so no vocabulary to trim.")
    wanted = {*keep, *_named_tokens(source.config), *_named_tokens(getattr(source, "generation_config", None))}
    kept = needed_ids(tokenizer, _used_ids(tokenizer, texts)) | {token for token in wanted if 0 <= token < size}
    known = set(tokenizer.get_vocab().values())
    if max(known & kept) >= size:
        raise ValueError(
            f"The tokenizer has token {max(known & kept)}, the model's vocabulary is {size}: they do not belong "
            "together, or the model was not resized after tokens were added."
        )
    kept &= known
    order = torch.tensor(sorted(kept))
    ids = {old: new for new, old in enumerate(order.tolist())}
    config = copy.deepcopy(source.config)
    text_config(config).vocab_size = len(ids)
    _renumber(config, ids)
    trimmed = new_model(type(source), config, source, seed=0)
    axes, values = vocabulary_axes(source, size), source.state_dict()
    for name, target in saved_tensors(trimmed).items():
        value = values[name]
        for axis, is_vocabulary in enumerate(axes[name]):
            if is_vocabulary:
                value = value.index_select(axis, order.to(value.device))
        target.copy_(value)
    if getattr(trimmed, "generation_config", None) is not None:
        _renumber(trimmed.generation_config, ids)
    trimmed.train(source.training)
    return TrimmedVocabulary(trimmed, trim_tokenizer(tokenizer, ids), order)


def _used_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[int]:
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of texts.")
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from _ids(tokenizer, batch)
            batch = []
    yield from _ids(tokenizer, batch)


def _ids(tokenizer: Any, batch: list[str]) -> Iterator[int]:
    if batch:
        for row in tokenizer(batch, truncation=False)["input_ids"]:
            yield from row


def _named_tokens(config: Any) -> Iterator[int]:
    for _, value in _token_fields(config):
        yield from _numbers(value)


def _token_fields(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a config, or of those inside it, that hold token ids."""
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith(
            ("_token_id", "_token_ids", "_token_index", "suppress_tokens", "_to_id", "forced_decoder_ids")
        ):
            yield name, value


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        yield from (number for number in value.values() if isinstance(number, int))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)


def _renumber(config: Any, ids: Mapping[int, int]) -> None:
    for part in {id(part): part for part in (config, text_config(config))}.values():
        for name, value in list(_token_fields(part)):
            if name == "forced_decoder_ids":
                value = value and [[place, ids.get(token)] for place, token in value]
            elif isinstance(value, Mapping):
                value = {key: ids[token] for key, token in value.items() if token in ids}
            elif isinstance(value, list | tuple):
                value = type(value)(ids[token] for token in value if token in ids)
            elif isinstance(value, int):
                value = ids.get(value) if value >= 0 else value
            setattr(part, name, value)
