"""Which of the checkpoints that `Trainer` left are whole, and whether their files are."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)
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


def missing_part(checkpoint: Path) -> str | None:
    """What a checkpoint of `Trainer` lacks that was cut off while it was saved or removed; None for a whole one."""
    if not (checkpoint / "trainer_state.json").is_file():  # written last
        return "no trainer_state.json"
    return None if any(any(checkpoint.glob(pattern)) for pattern in _WEIGHTS) else "no weights"


def last_checkpoint(folder: Path) -> tuple[Path | None, str | None]:
    """The newest checkpoint in a folder that is whole for all processes, and a warning of newer ones that are not.

    All processes call it and get the same, even where each node has a folder of its own (`save_on_each_node`).
    `transformers.trainer_utils.get_last_checkpoint` takes the newest folder, whatever it holds (5.23).

    Args:
        folder: it may be missing.
    """
    found: list[dict[str, str | None]] = gather_object([_missing_parts(folder)])
    names = {name for own in found for name in own}
    passed = []
    for name in sorted(names, key=lambda name: int(name.rpartition("-")[2]), reverse=True):
        missing = next((part for own in found if (part := own.get(name, "not on every node")) is not None), None)
        if missing is None:
            last = folder / name
            break
        passed.append(f"{folder / name} ({missing})")
    else:
        last = None
    warning = f"Passed over, as cut off while it was saved or removed: {', '.join(passed)}." if passed else None
    return last, warning


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The `last_checkpoint`, which is refused if it is damaged; of those passed over the main process warns.

    Raises:
        ValueError: with the damaged file, and how to mend it.
    """
    found, warning = last_checkpoint(folder)
    if warning is not None and PartialState().is_main_process:
        logger.warning(warning)
    if found is not None:
        check_undamaged(found)
    return found


def _missing_parts(folder: Path) -> dict[str, str | None]:
    """What each checkpoint in a folder lacks, by its name."""
    return {
        path.name: missing_part(path)
        for path in folder.glob("*")
        if path.is_dir() and _CHECKPOINT.fullmatch(path.name)
    }


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
