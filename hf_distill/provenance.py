"""What a record may say of models, data and the machine: public names, and no path, user or host."""

import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn

from hf_distill.files import whole_file
from hf_distill.models.fingerprint import fingerprint
from hf_distill.models.heads import auto_class_name, task_model
from hf_distill.teachers import AdapterOffTeacher, Teacher

STUDENT_ADAPTERS_OFF = "the student with its adapters off"
_PACKAGES = (
    "hf-distill",
    "transformers",
    "torch",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "huggingface-hub",
)
_PATH = re.compile(r"[\\/~]|[A-Za-z]:[\\/]|\.{1,2}[\\/]|[a-z0-9+.-]+://")
_HUB_DATA = re.compile(r"hf://datasets/(?P<name>[^@]+?)@(?P<revision>[^/]+)/")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDERS = re.compile(r"""(?<![\w.:/\\-])(?:~|\.{1,2}|[A-Za-z]:)?[\\/](?:[^\s'"()\\/]+[\\/])+""")
_FILE_KEYS = ("file",)
_FILES = 10  # names are kept of so many


def public_name(name: str | os.PathLike | None, revision: str | None = None) -> tuple[str | None, bool]:
    """A model's name and whether it is one on the Hub; of a path there stays the last part.

    Args:
        name: as it was loaded.
        revision: the commit that it was loaded from, if any, without which a single word is no name on the Hub.
    """
    text = os.fspath(name or "")
    if is_hub_id(text) and not os.path.exists(text) and (revision is not None or "/" in text):
        return text, True
    last = PureWindowsPath(text).name  # it knows both kinds of slashes
    return (last if last.strip(".~") else None), False


def is_hub_id(name: str) -> bool:
    """Whether a repository on the Hub can be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def without_paths(value: Any) -> Any:
    """Plain values in which a path has become its last part, and what is no finite number None."""
    if isinstance(value, Mapping):
        files = {key: PureWindowsPath(part).name for key, part in value.items() if key in _FILE_KEYS and part}
        return {str(key): files[key] if key in files else without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, str):
        is_path = _PATH.match(text := str(value)) or (re.search(r"[\\/]", text) and os.path.exists(text))
        return PureWindowsPath(text).name if is_path else text
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if isinstance(value, int) or value is None else str(value)


def without_paths_inside(text: str) -> str:
    """A message, such as an error's, with the last part of each path in it."""
    return _FOLDERS.sub("", text)


def describe_model(model: nn.Module, *, whole: bool = True) -> dict[str, Any]:
    """What a model is and where it came from.

    Args:
        model: a Transformers model, or one of PEFT around it.
        whole: whether all of its weights are in this process; else they are neither counted nor hashed.
    """
    inner = task_model(model)
    config: Any = getattr(inner, "config", None)
    revision = getattr(config, "_commit_hash", None)
    name, on_hub = public_name(getattr(inner, "name_or_path", None), revision)
    found: dict[str, Any] = {
        "name": name,
        "on_hub": on_hub,
        "revision": revision if on_hub else None,
        "class": type(inner).__name__,
        "auto_class": auto_class_name(inner),
        "model_type": getattr(config, "model_type", None),
        "input": getattr(inner, "main_input_name", None),
        "labels": getattr(config, "num_labels", None),
        "dtype": str(getattr(inner, "dtype", "")).removeprefix("torch.") or None,
    }
    if isinstance(model, PeftModel):
        kind: Any = model.active_peft_config.peft_type
        found["peft"] = str(getattr(kind, "value", kind))
    if whole:
        found |= {key: value for key, value in fingerprint(model).items() if key in ("parameters", "weights")}
    return found


def describe_teacher(teacher: Teacher) -> dict[str, Any]:
    """What a teacher is and where it came from."""
    if isinstance(teacher, AdapterOffTeacher):
        inner = describe_model(teacher.model, whole=False)
        return {**inner, "kind": STUDENT_ADAPTERS_OFF}
    return {**describe_model(teacher.model), "kind": type(teacher).__name__}


def describe_data(dataset: Any) -> Any:
    """Name, rows and fingerprint of a data set, as far as they are known; of several by their names.

    One without a name has its `builder`, and the `files` on this machine that it was made from, without their folders;
    `datasets` 5.2 itself leaves no word of the files in what `load_dataset("csv", data_files=...)` returns.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {str(name): describe_data(part) for name, part in dataset.items()}
    info: Any = getattr(dataset, "info", None)
    urls = getattr(info, "download_checksums", None) or ()
    hub = _repository(dataset)
    name = getattr(info, "dataset_name", None)
    builder = getattr(info, "builder_name", None)
    named = name is not None and name != builder  # "csv" names nothing
    config = getattr(info, "config_name", None)
    split = getattr(dataset, "split", None)
    is_file = not hub and not named and len(getattr(info, "splits", None) or ()) == 1  # "train", whatever it holds
    found = {
        "name": hub[0] if hub else public_name(name)[0] if named else None,
        "on_hub": hub is not None,
        "revision": hub[1] if hub else None,
        "config": None if config is None or config.startswith("default") else config,
        "split": None if split is None or is_file else str(split),
        "rows": len(dataset) if hasattr(dataset, "__len__") else None,
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }
    if found["name"] is None and builder is not None:
        found["builder"] = builder
        if local := list(dict.fromkeys(PureWindowsPath(url).name for url in map(str, urls) if "://" not in url)):
            found["files"] = [*local[:_FILES], *(["..."] if len(local) > _FILES else [])]
    return found


def _repository(dataset: Any) -> tuple[str, str] | None:
    """Name and commit of the repository on the Hub that rows were loaded from.

    What `load_dataset` of `datasets` 5.2 returns lies in a folder named by the commit, and names no repository but in
    small letters; the Hub's own cache has a folder of that commit in one of the full name.
    """
    for file in getattr(dataset, "cache_files", None) or ():
        commit = Path(file["filename"]).parent.name
        if _COMMIT.fullmatch(commit):
            for snapshot in Path(HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit}"):
                return snapshot.parts[-3].removeprefix("datasets--").replace("--", "/"), commit
    urls = getattr(getattr(dataset, "info", None), "download_checksums", None) or ()
    found = next((match for url in urls if (match := _HUB_DATA.match(str(url)))), None)
    return None if found is None else (found["name"], found["revision"])


def describe_hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """What trained: the kind of device and its name, not the machine's."""
    is_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of the packages that make a training what it is."""
    return {name: version(name) for name in _PACKAGES}


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as whole:
        whole.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()
