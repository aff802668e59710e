"""Named entries of one kind: losses, policies, presets."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order in which they were registered.

    Args:
        kind: what one entry is, as error messages should call it ("loss").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Adds `value` under `name`; a name that is taken is refused, never replaced."""
        if name in self._entries:
            raise ValueError(f"The {self.kind} {name!r} is already registered. Choose another name.")
        self._entries[name] = value

    def get(self, name: str) -> T:
        """The entry called `name`; an unknown name raises with the nearest and all known ones."""
        try:
            return self._entries[name]
        except KeyError:
            nearest = difflib.get_close_matches(name, self._entries, n=1)
            suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
            known = ", ".join(self._entries) or "none"
            raise ValueError(f"Unknown {self.kind} {name!r}.{suggestion} Known: {known}.") from None

    def names(self) -> tuple[str, ...]:
        """Every registered name."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
