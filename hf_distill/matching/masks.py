"""Which positions of a model's layers are real: read from its inputs alone, so that they can be counted beforehand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.items import IGNORE_INDEX
from hf_distill.models.heads import frame_mask, task_model

BATCH_MASK = "batch:"


def real_positions(model: nn.Module, inputs: Mapping[str, Any], stack: str | None) -> Tensor | None:
    """(sequences, length) bool: the positions of a stack's hidden states that are not padding.

    Args:
        model: the model that reads `inputs`.
        inputs: its inputs, labels included: a decoder's real positions are those of its targets. Several choices a row
            are several sequences.
        stack: `encoder` or `decoder` of an encoder-decoder model, or None.

    Returns: None where inputs have no padding, as images: every position is real then, and how many there are only
        the model knows.
    """
    if stack == "decoder":
        return _decoder_positions(inputs)
    mask = inputs.get("attention_mask")
    tokens = inputs.get("input_ids")
    if tokens is None and (embedded := inputs.get("inputs_embeds")) is not None:
        tokens = embedded[..., 0]
    if tokens is not None:
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None or mask.dim() > 3 else mask.bool()
        return mask.flatten(0, -2)
    if mask is not None and hasattr(task_model(model), "_get_feat_extract_output_lengths"):
        return frame_mask(model, dict(inputs))
    return None


def _decoder_positions(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("decoder_attention_mask")
    if mask is not None:
        return mask.bool()
    labels, tokens = inputs.get("labels"), inputs.get("decoder_input_ids")
    # A classifier's labels are no text, and its decoder reads the encoder's tokens.
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels != IGNORE_INDEX
    if tokens is not None:
        return torch.ones_like(tokens, dtype=torch.bool)
    own = inputs.get("attention_mask")
    return None if own is None else own.bool()


def first_position(tokens: Tensor) -> Tensor:
    """(sequences, length) bool: the first real position of each sequence, wherever the padding is."""
    first = tokens.int().argmax(-1, keepdim=True)
    return torch.zeros_like(tokens).scatter(-1, first, True) & tokens


def without_special(tokens: Tensor, ids: Tensor | None, special: Tensor | None) -> Tensor:
    """The real positions that hold no special token.

    Raises:
        ValueError: the special tokens, or the ids, are not known.
    """
    if ids is None or special is None:
        raise ValueError(
            'mask: "content" leaves special tokens out, but '
            + ("the batch has no input_ids." if ids is None else "the trainer has no tokenizer that names them.")
            + ' Pass the tokenizer as processing_class, or use mask: "tokens".'
        )
    return tokens & ~torch.isin(ids.flatten(0, -2), special)
