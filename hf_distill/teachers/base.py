"""What the trainer asks of a teacher."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_distill.signals import TeacherOutput


class Teacher(Protocol):
    """A source of teacher signals; the trainer cannot tell a forward pass from anything else behind it."""

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
