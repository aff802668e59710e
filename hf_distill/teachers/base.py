"""What the trainer asks of a teacher."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_distill.features import Feature
from hf_distill.signals import TeacherOutput


class Teacher(Protocol):
    """A source of teacher signals; the trainer cannot tell a forward pass from anything else behind it.

    A teacher that can show what is inside it, and not only its logits, is a `RecordingTeacher` too.
    """

    @property
    def model(self) -> nn.Module:
        """The model whose head, labels and vocabulary the student's are paired with."""
        ...

    def place(self, device: torch.device) -> None:
        """Moves the teacher to where the batches are."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """The teacher's logits for a batch, without a graph.

        Args:
            inputs: the batch as the teacher takes it; `labels` serve an encoder-decoder teacher to decode, no more.
        """
        ...


class RecordingTeacher(Teacher, Protocol):
    """A teacher that also gives hidden states and attention."""

    def __call__(self, inputs: Mapping[str, Tensor], *, record: bool = False) -> TeacherOutput:
        """As `Teacher`; with `record` the output holds the features too that `prepare_recording` named."""
        ...

    def prepare_recording(self, features: Sequence[Feature]) -> None:
        """Makes ready to record these features in calls that ask for it.

        Args:
            features: sources, each of one layer of one stack; none to leave the model as it was.

        Raises:
            ValueError: the model has no such feature.
        """
        ...


@runtime_checkable
class FactoredTeacher(Teacher, Protocol):
    """A teacher that also gives what a language model's logits are made of, in place of them."""

    def __call__(self, inputs: Mapping[str, Tensor], *, record: bool = False, factored: bool = False) -> TeacherOutput:
        """As `Teacher`; with `factored` the output holds `factors` and no logits, where the model lets it."""
        ...

    @property
    def gives_factors(self) -> bool:
        """Whether it can, as far as is known."""
        ...


def takes_factored(teacher: object) -> bool:
    """Whether a teacher can be asked for factors; a subclass with a call of its own may not take the keyword."""
    return isinstance(teacher, FactoredTeacher) and "factored" in signature(teacher.__call__).parameters


@runtime_checkable
class SparseTeacher(Teacher, Protocol):
    """A teacher whose outputs hold `sparse` in place of logits, as a cache or a server: what it gives is known before.

    One that does not say so may give it too; it is then found out in the first step what cannot be learned from it,
    and a language model's logits are formed.
    """

    @property
    def sparse_k(self) -> int:
        """How many classes of an item it names."""
        ...

    @property
    def sparse_temperature(self) -> float:
        """The temperature of its log-probabilities."""
        ...
