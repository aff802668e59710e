"""The folder of a data set of answers: parts while it grows, one Parquet file and its record when it is whole."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from hf_distill.files import whole_file

RECORD_NAME = "generation.json"
DATA_NAME = "data/train-00000-of-00001.parquet"
FORMAT = 1
# `load_dataset` reads no hidden folder: an unfinished data set is none.
_PARTS = ".parts"
_SETTINGS = "settings.json"
_ROWS_OF_A_GROUP = 10_000
_ALLOWED_BESIDE = (".git", ".gitattributes", "README.md")


class AnswerFolder:
    """A data set of answers in the making, or made.

    Args:
        path: new, empty, or with the parts of an earlier call with the same settings.
        settings: everything that decides the rows: plain values, nested at will.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps({"format": FORMAT, **settings}, default=str))

    @property
    def finished(self) -> bool:
        """Whether the data set is whole."""
        return (self.path / RECORD_NAME).is_file()

    def check(self) -> None:
        """Refuses a folder that does not go with the settings.

        Raises:
            ValueError: with what differs, or what is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file. Choose a folder.")
        found = next((file for file in self._records() if file.is_file()), None)
        if found is None:
            foreign = [entry.name for entry in _entries(self.path) if entry.name not in (_PARTS, *_ALLOWED_BESIDE)]
            if foreign:
                raise ValueError(
                    f"{self.path} holds other things than answers: {', '.join(foreign[:5])}. Choose a new folder."
                )
            return
        there, here = (_flat(values) for values in (_read(found).get("settings", {}), self.settings))
        differences = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.path} holds answers that were made otherwise: {'; '.join(differences)}. Choose another "
                "folder, or ask for the same to go on there."
            )

    def begin(self, about: Mapping[str, Any]) -> None:
        """Notes the settings, and `about` them what does not decide the rows; an earlier note is kept."""
        note = self.path / _PARTS / _SETTINGS
        if not note.is_file():
            _write(note, {"settings": self.settings, "about": about})

    def missing(self, parts: int) -> list[int]:
        """The numbers below `parts` of the parts that are not written yet."""
        return [number for number in range(parts) if not self._part(number).is_file()]

    def save_part(self, number: int, rows: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
        """Writes a part, whole or not at all."""
        _write(self._part(number), {"counts": dict(counts), "rows": rows})

    def counts(self, parts: int) -> dict[str, int]:
        """The counts of the parts that are there, added up."""
        total: dict[str, int] = {}
        for number in range(parts):
            if self._part(number).is_file():
                for name, value in _read(self._part(number))["counts"].items():
                    total[name] = total.get(name, 0) + value
        return total

    def finish(self, parts: int, features: Features) -> None:
        """Joins the parts to the data set, writes its record, and removes the parts.

        Raises:
            ValueError: a part is not there, or no answer is left.
        """
        if missing := self.missing(parts):
            raise ValueError(
                f"Of {parts} parts in {self.path}, {len(missing)} are missing. Processes on several machines need a "
                "folder that all of them see."
            )
        counts = self.counts(parts)
        if not counts["answers"]:
            raise ValueError(
                f"No answer is left: all {counts['unfinished']} ran to the end of max_new_tokens and were dropped. "
                "Allow more tokens, or keep unfinished answers, in another folder."
            )
        data = self.path / DATA_NAME
        groups = [Dataset.from_list(rows, features=features) for rows in self._groups(parts)]
        with whole_file(data, partial=self.path / _PARTS / data.name) as whole:
            concatenate_datasets(groups).to_parquet(str(whole))
        note = _read(self.path / _PARTS / _SETTINGS)
        _write(self.path / RECORD_NAME, {**note["about"], "settings": note["settings"], "counts": counts})
        self.tidy()

    def tidy(self) -> None:
        """Removes parts that a finished data set does not need."""
        shutil.rmtree(self.path / _PARTS, ignore_errors=True)

    def record(self) -> dict[str, Any]:
        """The record of a finished data set."""
        return _read(self.path / RECORD_NAME)

    def _records(self) -> tuple[Path, Path]:
        return self.path / RECORD_NAME, self.path / _PARTS / _SETTINGS

    def _part(self, number: int) -> Path:
        return self.path / _PARTS / f"part-{number:06d}.json"

    def _groups(self, parts: int) -> Iterator[list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        for number in range(parts):
            rows += _read(self._part(number))["rows"]
            if len(rows) >= _ROWS_OF_A_GROUP:
                yield rows
                rows = []
        if rows:
            yield rows


def _entries(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        # Without its record, data looks like somebody else's.
        remedy = "Choose a new folder." if path.name == RECORD_NAME else "Delete it; what it held is made again."
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is none of ours. Choose a new folder.")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=None if "rows" in content else 2, ensure_ascii=False)
    with whole_file(path) as whole:
        whole.write_text(text + "\n", encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
