"""Files that are whole or not there, and which of the checkpoints that `Trainer` left are whole."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model*.safetensors", "adapter_model*", "*/adapter_model*", "pytorch_model*", "global_step*")


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _read_zip(path: Path) -> None:
    with ZipFile(path):  # its table of contents, at the end of the file
        pass


def _read_header(path: Path) -> None:
    with safe_open(path, "np"):  # compares what it says with the size of the file
        pass


# What a training that goes on reads. No tensor is read for it here.
_READERS: dict[str, Callable[[Path], Any]] = {
    "trainer_state.json": _read_json,
    "*.safetensors": _read_header,
    "optimizer.*": _read_zip,
    "scheduler.pt": _read_zip,
    "scaler.pt": _read_zip,
    "rng_state*.pth": _read_zip,
}


@contextmanager
def whole_file(path: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """A place to write to, which takes the place of `path` when all is written; its folder is made if it is missing.

    Where writing fails, `path` is what it was.

    Args:
        path: of the file.
        partial: the place, on the same file system; None: beside `path`, with an underscore before its name, which a
            push to the Hub leaves out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_name(f"_{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def missing_part(checkpoint: Path) -> str | None:
    """What a checkpoint of `Trainer` lacks that was cut off while it was saved or removed; None for a whole one."""
    if not (checkpoint / "trainer_state.json").is_file():  # written last
        return "no trainer_state.json"
    return None if any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS) else "no weights"


def last_checkpoint(folder: Path) -> tuple[Path | None, str | None]:
    """The newest whole checkpoint in a folder, which may be missing, and a warning of newer ones that are not whole.

    `transformers.trainer_utils.get_last_checkpoint` takes the newest folder, whatever it holds (5.23).
    """
    numbered = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("*") if path.is_dir()}
    found = {path: int(match[1]) for path, match in numbered.items() if match}
    passed = []
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        missing = missing_part(path)
        if missing is None:
            break
        passed.append(f"{path} ({missing})")
    else:
        path = None
    warning = f"Passed over, as cut off while it was saved or removed: {', '.join(passed)}." if passed else None
    return path, warning


def check_undamaged(folder: Path) -> None:
    """Refuses a checkpoint, or a saved student, with a file that a training could not go on with.

    Raises:
        ValueError: with the file, and how to mend it.
    """
    for path in sorted(folder.glob("*")):
        read = next((read for pattern, read in _READERS.items() if path.match(pattern)), None)
        if read is None or not path.is_file():
            continue
        try:
            read(path)
        except (SafetensorError, BadZipFile, ValueError) as error:
            remedy = (
                f"Delete {folder} to go on from the checkpoint before it."
                if _CHECKPOINT.fullmatch(folder.name)
                else "Begin in another output_dir."
            )
            raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
