"""The rows of all ranks, for losses that compare the sequences of a batch with each other.

The convention: each rank gathers the rows, computes the loss over all of them and sums the values of its own rows
alone. The sum over the ranks is then the loss of the whole batch, and the gradients that the ranks send each other
through the gathering are those of that sum. As with every term, the trainer multiplies by the number of ranks, because
data parallelism averages gradients.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist


def gather_rows(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all ranks in the order of the ranks; the gradient goes back to the rank that each came from.

    Every rank must call it with as many rows, which accelerate sees to by filling up the last batch. A backward of the
    result on one rank needs one on all.

    Args:
        rows: (rows, ...), any dtype; a mask of rows, (rows,) bool, too.
        accelerator: of the run. With one process the result is `rows` itself.

    Returns: (ranks x rows, ...).

    Raises:
        ValueError: the ranks' last batches may differ in size.
    """
    if accelerator.num_processes == 1:
        return rows
    if not accelerator.even_batches:
        raise ValueError(
            "Losses between the sequences of a batch gather the rows of all processes, and need equally many from "
            'each; even_batches is False. Set accelerator_config={"even_batches": True}.'
        )
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather is this, but deprecated in torch 2.13 in favour of a private module.
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_single(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own
