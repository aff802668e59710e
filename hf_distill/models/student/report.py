"""What became of the teacher's weights when a student was built from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import nn


class Origin(str, Enum):
    """Where the first values of one of the student's tensors come from."""

    COPIED = "copied"
    MERGED = "merged"
    CUT = "cut"
    NEW = "new"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class StudentReport:
    """How a student was built; `print(report)` is meant to be read.

    Attributes:
        teacher: class of the teacher.
        student: class of the student.
        teacher_parameters: number of the teacher's weights, shared ones counted once.
        student_parameters: likewise.
        layers: for each stack ("encoder", "decoder", or "" for the only one) the teacher's layers, counted from 0,
            that the student's layers were copied from; empty where no layer was left out.
        origins: name of each of the student's tensors (parameters and saved buffers) -> where its values come from:
            `copied` whole, `merged` from several tensors without loss, `cut` to a smaller shape, or `new`.
        dropped: the teacher's tensors in kept parts that have no place in the student.
        notes: what is only approximately the teacher's, and why.
    """

    teacher: str
    student: str
    teacher_parameters: int
    student_parameters: int
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def names(self, origin: Origin | str) -> tuple[str, ...]:
        """The student's tensors of one origin, e.g. `names("new")`."""
        return tuple(name for name, found in self.origins.items() if found == Origin(origin))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            **{name: value for name, value in vars(self).items() if isinstance(value, str | int)},
            "layers": {stack: list(layers) for stack, layers in self.layers.items()},
            "origins": {name: str(origin) for name, origin in self.origins.items()},
            "dropped": list(self.dropped),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = Counter(self.origins.values())
        share = self.student_parameters / self.teacher_parameters
        lines = [
            f"{self.student} from {self.teacher}: {self.student_parameters:,} of {self.teacher_parameters:,} "
            f"parameters ({share:.1%})",
            *(
                f"  {stack + ' ' if stack else ''}layers (from 0): {', '.join(map(str, layers))}"
                for stack, layers in self.layers.items()
            ),
            "  tensors: " + ", ".join(f"{counts[origin]} {origin}" for origin in Origin if counts[origin]),
        ]
        lines += [f"  {title}: {_shortened(names)}" for title, names in self._lists() if names]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        return [("new", self.names(Origin.NEW)), ("merged", self.names(Origin.MERGED)), ("dropped", self.dropped)]


def count_parameters(model: nn.Module) -> int:
    """The number of a model's weights, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _shortened(names: tuple[str, ...], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
