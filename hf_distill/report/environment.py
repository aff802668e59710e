"""What a measured number depends on besides the models: versions, processor, threads, device."""

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from hf_distill.provenance import describe_hardware, versions


def environment(models: Mapping[str, nn.Module], device: torch.device, *, latency: str) -> dict[str, Any]:
    """Processor, threads, device, dtype, versions, date, and how latency was measured, as a report holds them.

    Args:
        models: by name; the dtype of their weights is given.
        device: where they were measured.
        latency: the method, in words.
    """
    dtypes = {name: str(next(model.parameters()).dtype).removeprefix("torch.") for name, model in models.items()}
    processor = describe_hardware(torch.device("cpu"), 1)
    return {
        "processor": processor["name"],
        "threads": processor["threads"],
        "device": device.type if device.type == "cpu" else describe_hardware(device, 1)["name"],
        "dtype": next(iter(dtypes.values())) if len({*dtypes.values()}) == 1 else dtypes,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "latency": latency,
    }
