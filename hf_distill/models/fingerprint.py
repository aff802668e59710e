"""What tells one model's weights from another's, cheaply."""

import hashlib
import json
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
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
