"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
