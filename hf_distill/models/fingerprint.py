"""What tells one model's weights from another's, cheaply."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 1024
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache")


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every tensor's name, shape, dtype and at least 1024 of its values, spread over it.

    Equal weights give equal hashes on any device; a step of an optimizer, another initialisation or another checkpoint
    gives another. It reads a small part of a large model, so it is no protection against a forger.

    Args:
        model: the whole of it in this process, not a shard.

    Returns: 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for part in _parts(value.detach()):
            flat = part.reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that one is made of: itself, or of a quantised weight its values, scales and zero points."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        yield value
    else:
        for name in flatten()[0]:
            yield from _parts(getattr(value, name))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What the model is, for a record: class, parameters, and hashes of its config and its weights."""
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": weights_fingerprint(model),
    }
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        known = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
        text = json.dumps(known, sort_keys=True, default=str)
        found["config"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found
