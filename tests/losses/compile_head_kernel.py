"""Compiles the kernel of a head's rows for a GPU that need not be there.

python -m tests.losses.compile_head_kernel cuda 90 32
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_distill.losses.head_formulas import closed_form
from hf_distill.losses.head_kernel import BLOCK, HeadKernel, _rows
from hf_distill.losses.kernel_rows import KernelCase

POINTERS = {
    "student": "*fp32",
    "teacher": "*fp32",
    "targets": "*i64",
    "weights": "*fp32",
    "direction": "*bf16",
    "values": "*fp32",
    "agreement": "*i1",
}
NUMBERS = {"items": "i32", "classes": "i32", "shared": "i32", "direction_stride": "i32", "teacher_scale": "fp32"}


def main() -> None:
    """Prints the name of each divergence that compiled."""
    backend, architecture, warp = sys.argv[1:]
    target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))
    for name in ("forward_kl", "reverse_kl", "jsd"):
        dtypes, device = (torch.float32, torch.float32), torch.device("cuda")
        case = KernelCase(closed_form(name, {}), 30.0, 30.0, dtypes, torch.bfloat16, True, True, device)
        constants = {**HeadKernel(case)._constants, "gradient": True, "block": BLOCK}
        signature = {**POINTERS, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
        triton.compile(ASTSource(_rows, signature, constants), target=target, options={"num_warps": 8})
        print(name)


if __name__ == "__main__":
    main()
