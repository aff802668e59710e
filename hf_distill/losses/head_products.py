"""The matrix products of a language model's head, a chunk of items at a time, in buffers that are used again."""

import torch
from torch import Tensor

from hf_distill.signals import LogitFactors

# What is kept for one side's logits at most: more would be felt where the training needs its memory for other things.
_LARGEST_KEPT_BYTES = 64 * 2**20


class Workspace:
    """Memory for the logits of chunks, for a caller to keep from one call to the next.

    A CPU's new pages cost as much as four passes over them. Other devices' allocators keep theirs.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._kept: dict[bool, Tensor] = {}

    def logits(self, items: int, weight: Tensor, dtype: torch.dtype, *, is_student: bool) -> Tensor:
        """(items, classes) for a head's weight (classes, width), which the next call for the same side takes again."""
        count = items * len(weight)
        kept = self._kept.get(is_student)
        if kept is None or kept.dtype != dtype or kept.device != weight.device or len(kept) < count:
            self._kept.pop(is_student, None)  # before there are two
            kept = weight.new_empty(count, dtype=dtype)
            if kept.device.type == "cpu" and kept.nbytes <= _LARGEST_KEPT_BYTES:
                self._kept[is_student] = kept
        return kept[:count].view(items, len(weight))


class ChunkedHead:
    """One side's head: projects chunks of its hidden states, and collects the gradients of the chunks' logits.

    Args:
        factors: (..., width) hidden states and their head.
        classes: how many of its leading classes are asked for.
        dtype: of the operands of all products.
        logits_dtype: of the logits, `dtype` or wider.

    Attributes:
        logits_dtype: of the logits.
        gradients: by the names of `LogitFactors`, for each tensor of the side that asks for one. Those of weight and
            bias, which are sums over chunks, are as wide as the logits, the bias's at least float32.
    """

    def __init__(self, factors: LogitFactors, *, classes: int, dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
        self._factors, self._dtype, self.logits_dtype = factors, dtype, logits_dtype
        self._hidden = factors.hidden.detach().flatten(0, -2)
        self._weight = factors.weight.detach()[:classes].to(dtype)
        self._bias = None if factors.bias is None else factors.bias.detach()[:classes].to(logits_dtype)
        self._buffer = self._weight.new_empty(0, classes, dtype=logits_dtype)
        self.gradients: dict[str, Tensor] = {}

    @property
    def row_bytes(self) -> int:
        """What one item's logits take while they are formed: a product of half precision sums in float32."""
        return len(self._weight) * max(self.logits_dtype.itemsize, torch.float32.itemsize)

    def reserve(self, items: int, workspace: Workspace | None, *, is_student: bool, gradients: bool) -> None:
        """Makes room for chunks of up to so many items and, if asked for, for the gradients."""
        self._buffer = (workspace or Workspace()).logits(items, self._weight, self.logits_dtype, is_student=is_student)
        if not gradients:
            return
        shapes = {"hidden": self._hidden, "weight": self._weight, "bias": self._weight[:, 0]}
        for name, like in shapes.items():
            source: Tensor | None = getattr(self._factors, name)
            if source is not None and source.requires_grad:
                wide = name == "bias" or (name == "weight" and self._is_wide)
                dtype = torch.promote_types(self._dtype, torch.float32) if wide else self._dtype
                self.gradients[name] = torch.zeros(like.shape, dtype=dtype, device=like.device)

    @property
    def _is_wide(self) -> bool:
        return self.logits_dtype != self._dtype

    def hidden(self, items: Tensor | slice) -> Tensor:
        """(items, width) some of the hidden states, in the dtype of the products."""
        return self._hidden[items].to(self._dtype)

    def logits(self, hidden: Tensor, *, factor: float = 1.0) -> Tensor:
        """(items, classes) the logits before the softcap, times a factor; the next call overwrites them."""
        out, factor = self._buffer[: len(hidden)], factor * self._factors.scale
        if self._is_wide and hidden.device.type != "cpu":
            torch.mm(hidden, self._weight.t(), out_dtype=self.logits_dtype, out=out)
            if self._bias is not None:
                out.add_(self._bias)
            return out if factor == 1 else out.mul_(factor)
        # A CPU has no product that ends in a wider dtype (torch 2.13).
        hidden, weight = hidden.to(self.logits_dtype), self._weight.to(self.logits_dtype).t()
        if self._bias is not None:
            return torch.addmm(self._bias, hidden, weight, beta=factor, alpha=factor, out=out)
        return torch.addmm(out, hidden, weight, beta=0, alpha=factor, out=out)

    def direction(self, logits: Tensor) -> Tensor:
        """(items, classes) in the dtype of the products, where the gradient of `logits` goes: row by row over them."""
        return logits.view(self._dtype)[:, : logits.shape[-1]]

    def collect(self, items: Tensor | slice, hidden: Tensor, direction: Tensor, share: Tensor | None = None) -> None:
        """Adds what a chunk contributes to the gradients.

        Args:
            items: which they are.
            hidden: (items, width) as `hidden` gave them.
            direction: (items, classes) the gradient of their logits before scale, but for
            share: (items, 1) what its rows are to be multiplied by: these products cost less than itself.
        """
        if share is not None:
            hidden = hidden * share
        for name, gradient in self.gradients.items():
            if name == "hidden":
                product = direction @ self._weight
                gradient[items] = product if share is None else product.mul_(share)
            elif name == "bias" and share is not None:
                gradient.addmv_(direction.t(), share.squeeze(-1))
            elif name == "bias":
                gradient.add_(direction.sum(0, dtype=gradient.dtype))
            elif gradient.dtype == self._dtype:
                gradient.addmm_(direction.t(), hidden)
            elif hidden.device.type == "cpu":
                gradient.add_(direction.t() @ hidden)
            else:
                torch.addmm(gradient, direction.t(), hidden, out_dtype=gradient.dtype, out=gradient)

    def attached(self) -> list[tuple[Tensor, Tensor]]:
        """The side's tensors that ask for a gradient, each with it."""
        pairs = []
        for name, gradient in self.gradients.items():
            source: Tensor = getattr(self._factors, name)
            if len(gradient) < len(source) and name != "hidden":
                gradient = torch.cat([gradient, gradient.new_zeros(len(source) - len(gradient), *gradient.shape[1:])])
            if gradient.shape != source.shape:  # a view of what a weight gets could not be added to in place
                gradient = gradient.view(source.shape)
            pairs.append((source, gradient.to(source.dtype)))
        return pairs
