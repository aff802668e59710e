"""The kernel of a head where there is no GPU: by Triton's interpreter, on the CPU."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from hf_distill.losses import head_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def kernel_of_heads():
    """While it lasts, rows on the device that it gives go to the kernel; on leaving, that it ran is made sure of."""
    pytest.importorskip("triton")
    from hf_distill.losses.head_kernel import HeadKernel

    with (
        mock.patch.object(head_device, "KERNEL_DEVICES", (DEVICE,)),
        mock.patch.object(HeadKernel, "__call__", autospec=True, side_effect=HeadKernel.__call__) as launches,
    ):
        yield DEVICE
    assert launches.called
