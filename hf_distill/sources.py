"""Rows from where users keep them: a file, a folder, a data set saved to disk, or the Hub."""

import json
import os
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid  # type: ignore[import-untyped]

LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SAVED = ("state.json", "dataset_dict.json")


def load_splits(source: str | os.PathLike, config: str | None = None) -> DatasetDict:
    """All splits of a source; what has none, such as a file, is one split called `train`.

    Args:
        source: a file (txt, csv, json, jsonl, parquet), a folder of them or of images, a folder that `save_to_disk`
            wrote, or a name on the Hub.
        config: name of the configuration, for a source with several.

    Raises:
        ValueError: there is no such file, or none that can be read.
    """
    found = _load(source, config)
    return DatasetDict(train=found) if isinstance(found, Dataset) else found


def load_rows(source: str | os.PathLike, split: str = "train", config: str | None = None) -> Dataset:
    """One split of a source, as `load_splits` takes it; `train[:1000]` takes a part.

    Raises:
        ValueError: the source has no such split, or cannot be read.
    """
    if not _is_saved(source):
        try:
            return _load(source, config, split=split)
        except ValueError as error:
            names = _split_names(source, config)
            if not names or split.partition("[")[0] in names:
                raise
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(names)}.") from error
    saved = load_splits(source, config)
    if split in saved:
        return saved[split]
    if split.partition("[")[0] not in saved:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(saved)}.")
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in saved.items()})
    return concatenate_datasets([saved[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _is_saved(source: str | os.PathLike) -> bool:
    return any(Path(source, name).is_file() for name in _SAVED)


def _arguments(source: str | os.PathLike, config: str | None) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in LOADERS and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{source} is no file. Relative paths begin at {Path.cwd()}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{source} cannot be read: it is empty.")
        return {"path": LOADERS[path.suffix], "data_files": str(path)}
    if path.is_file():
        raise ValueError(
            f"{source} cannot be read: expected a {', '.join(LOADERS)} file, a folder of such, a folder written by "
            "save_to_disk, or a name on the Hub."
        )
    return {"path": os.fspath(source), "name": config}


def _with_file(found: Any, file: str | None) -> Any:
    """The rows, which now know the file that they were read from: `datasets` 5.2 leaves no word of it."""
    for rows in found.values() if isinstance(found, DatasetDict) else [found]:
        if file is not None:
            rows.info.download_checksums = {file: {"num_bytes": None, "checksum": None}}
    return found


def _load(source: str | os.PathLike, config: str | None, **options: Any) -> Any:
    if _is_saved(source):
        return _load_saved(Path(source))
    arguments = _arguments(source, config)
    try:
        return _with_file(load_dataset(**arguments, **options), arguments.get("data_files"))
    except (DatasetGenerationError, ArrowInvalid, StopIteration) as error:  # the last of JSON without a line
        for path in sorted(Path(source).rglob("*")):  # of a folder, the file is told that alone cannot be read either
            if path.suffix in LOADERS and path.is_file():
                _load(path, None)
        reason = error.__cause__ or error
        raise ValueError(f"{source} cannot be read: {str(reason).strip() or type(reason).__name__}") from error
    except ConnectionError as error:
        where = "" if Path(source).exists() else f", and there is no such file or folder in {Path.cwd()}"
        raise ValueError(f"{source} cannot be read: {error}{where}.") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{source} has no rows, or a split without any: {error}") from error


def _load_saved(folder: Path) -> Any:
    try:
        return load_from_disk(os.fspath(folder))
    except (ValueError, KeyError, TypeError, OSError) as error:
        for path in sorted(folder.rglob("*")):
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                elif path.suffix == ".arrow":
                    Dataset.from_file(os.fspath(path))
            except (ValueError, OSError) as reason:
                raise ValueError(f"{path} cannot be read: {reason}") from error
        raise ValueError(
            f"{folder} cannot be read as a data set that save_to_disk wrote: {type(error).__name__}: {error}"
        ) from error


def _split_names(source: str | os.PathLike, config: str | None) -> list[str]:
    arguments = _arguments(source, config)
    try:
        return get_dataset_split_names(arguments.pop("path"), arguments.pop("name", None), **arguments)
    except (ValueError, OSError):
        return []
