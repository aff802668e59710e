"""What a measured number depends on besides the code: versions, processor, threads, device."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

OURS = ("torch", "transformers", "accelerate", "datasets", "hf-distill")
PACKAGES = (*OURS, "trl", "liger-kernel", "torchtune", "nvidia-modelopt", "torchdistill", "sentence-transformers")


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor as Linux names it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(*, device: str = "cpu") -> dict[str, Any]:
    """The environment block that every results file carries."""
    found = {package: installed_version(package) for package in PACKAGES}
    block: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "packages": {package: version for package, version in found.items() if version is not None},
    }
    if device == "cuda":
        block["accelerator"] = torch.cuda.get_device_name()
    return block
