"""The teacher that writes and its tokenizer, and what tells them from others."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_distill.models.heads import task_model
from hf_distill.models.loading import load_as_saved


def load_writer(
    teacher: nn.Module | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | str | None,
    init_kwargs: Mapping[str, Any],
    device: torch.device,
) -> tuple[Any, Any, dict[str, Any]]:
    """The teacher, its tokenizer, and their names for a record.

    Args:
        teacher: a module, which is left where it is, or a name, which is loaded in the dtype it was saved in.
        tokenizer: the teacher's, its name, or None for the one saved with a teacher given by name.
        init_kwargs: arguments of `from_pretrained`.
        device: of a teacher that is loaded here, unless a `device_map` or its quantization places it.

    Raises:
        TypeError: the teacher generates no text.
        ValueError: a module without its tokenizer or with arguments to load it; an access token among them;
            no tokenizer under that name.
    """
    given = teacher if isinstance(teacher, nn.Module) else None
    name = "" if given is not None else os.fspath(teacher)  # type: ignore[arg-type]
    if given is not None and init_kwargs:
        raise ValueError("teacher_model_init_kwargs are for a teacher given by name; this one is a module. Drop them.")
    if given is not None and tokenizer is None:
        raise ValueError("A teacher given as a module comes without its tokenizer. Give it as tokenizer.")
    if {"token", "use_auth_token"} & {*init_kwargs}:
        raise ValueError(
            "teacher_model_init_kwargs holds an access token. Set the environment variable HF_TOKEN, or log in with "
            "`hf auth login`."
        )
    # The small one first, where either may be missing.
    loaded = _load_tokenizer(name if tokenizer is None else tokenizer, {} if tokenizer else init_kwargs)
    model: Any = given
    if given is None:
        model = load_as_saved(name, {"dtype": "auto", **init_kwargs}, argument="teacher")
    inner = task_model(model)
    if not hasattr(inner, "can_generate") or not inner.can_generate():
        raise TypeError(
            f"The teacher {type(inner).__name__} generates no text. Answers need a causal or an encoder-decoder "
            "language model."
        )
    if given is None and "device_map" not in init_kwargs and not getattr(inner, "is_quantized", False):
        model.to(device)
    revision = init_kwargs.get("revision") or getattr(inner.config, "_commit_hash", None)
    names = {
        "teacher": {"name": name or _public(inner.config._name_or_path), "revision": revision},
        "tokenizer": {"name": _public(loaded.name_or_path)},
    }
    return model, loaded, names


def _load_tokenizer(tokenizer: PreTrainedTokenizerBase | str, init_kwargs: Mapping[str, Any]) -> Any:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    where = {key: value for key, value in init_kwargs.items() if key in ("revision", "cache_dir")}
    try:
        return AutoTokenizer.from_pretrained(tokenizer, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"No tokenizer could be loaded from {tokenizer!r}: {error}") from error


def longest_prompt(teacher: nn.Module, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have so that its answer still fits; None where the teacher has no window.

    Raises:
        ValueError: an answer alone fills the window.
    """
    config = task_model(teacher).config
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return None
    # An encoder-decoder model has a window for the prompt, and one for the answer behind its start token.
    room = window if config.is_encoder_decoder else window - max_new_tokens
    if room < 1 or max_new_tokens > window:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the teacher's window of {window} tokens. "
            "Lower it."
        )
    return room


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, the special tokens and the chat template: 16 hexadecimal digits."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _public(name: str) -> str | None:
    # What was loaded elsewhere may have come from anywhere on this machine.
    return (os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name) or None
