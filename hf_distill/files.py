"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, which takes the place of `path` when all is written; its folder is made if it is missing.

    Where writing fails, `path` is what it was. A push to the Hub leaves out what begins with an underscore.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"_{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
