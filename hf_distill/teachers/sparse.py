"""A teacher that says what a cache keeps or a server sends: its most likely classes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_distill.losses.base import compute_dtype
from hf_distill.losses.row_gradient import row_blocks, rows_per_block
from hf_distill.signals import SparseLogits, TeacherOutput
from hf_distill.teachers.base import Teacher


class TopKTeacher:
    """Another teacher's k most likely classes of each item, in place of its logits.

    It shows what of a teacher is lost in a cache of so many classes before one is written.

    Args:
        teacher: gives logits of one distribution per item.
        k: >= 1; of fewer classes all.
        temperature: > 0, of the softmax whose log-probabilities are given; that of the logit term.

    Raises:
        ValueError: k or the temperature is none.
    """

    def __init__(self, teacher: Teacher, k: int, temperature: float = 1.0) -> None:
        if not (isinstance(k, int) and k >= 1):
            raise ValueError(f"k is {k}; expected a whole number of classes, at least 1.")
        self._teacher, self._k, self._temperature = teacher, k, temperature

    @property
    def model(self) -> nn.Module:
        """The other teacher's model."""
        return self._teacher.model

    @property
    def sparse_temperature(self) -> float:
        """The temperature."""
        return self._temperature

    @property
    def sparse_k(self) -> int:
        """How many classes of an item it names."""
        return self._k

    def place(self, device: torch.device) -> None:
        """Moves the other teacher to `device`."""
        self._teacher.place(device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> TeacherOutput:
        """The most likely classes for a batch.

        Raises:
            ValueError: the other teacher gives no logits, or several per item, as for question answering.
        """
        output = self._teacher(inputs).formed()
        if len(output.logits) != 1:
            raise ValueError(
                f"The teacher gives {len(output.logits)} tensors of logits; its most likely classes are those of one. "
                "Take it as it is."
            )
        return TeacherOutput(logits=(), sparse=most_likely(output.logits[0], self._k, self._temperature))


def most_likely(logits: Tensor, k: int, temperature: float = 1.0) -> SparseLogits:
    """The k most likely classes of (..., classes) logits, float32 (float64 of float64), without a graph."""
    dtype, k = compute_dtype(logits), min(k, logits.shape[-1])
    indices, log_probs = [], []
    with torch.no_grad():
        # Block by block: no copy of the logits in a wider dtype exists.
        for (block,) in row_blocks((logits,), rows_per_block(logits, buffers=2, dtype=dtype)):
            softened = block.to(dtype) / temperature
            top = softened.topk(k)
            indices.append(top.indices)
            log_probs.append(top.values - softened.logsumexp(-1, keepdim=True))
    shape = (*logits.shape[:-1], k)
    return SparseLogits(torch.cat(indices).view(shape), torch.cat(log_probs).view(shape), temperature)
