"""Compiles the kernel of a head's rows for a GPU that need not be there.

python -m tests.losses.compile_head_kernel cuda 90 32
"""

import re
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
        options = {"num_warps": 8, "enable_fp_fusion": False}
        for is_aligned in (False, True):
            aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(POINTERS)) if is_aligned}
            compiled = triton.compile(ASTSource(_rows, signature, constants, aligned), target=target, options=options)
            # What is read of a block is read before anything is written over it.
            steps = re.findall(r"tt\.load|\w+\.barrier|tt\.store", compiled.asm["ttgir"])
            assert [step.rpartition(".")[2] for step in steps[-2:]] == ["barrier", "store"], steps
        print(name)


if __name__ == "__main__":
    main()
