"""What torch does behind a call: the storages that it makes and the operations that it runs."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargeAllocations(TorchDispatchMode):
    """Counts the storages of at least `nbytes` that appear while it is active."""

    def __init__(self, nbytes, known):
        super().__init__()
        self.nbytes, self.count, self.held = nbytes, 0, list(known)
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.nbytes:
                if tensor.untyped_storage().data_ptr() not in self.seen:
                    self.count += 1
                    self.seen.add(tensor.untyped_storage().data_ptr())
                    self.held.append(tensor)  # else a later storage could take the address unseen
        return result


class Operations(TorchDispatchMode):
    """Counts the operations that run while it is active, by their name, such as "aten::mul_"."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))
