"""A linear layer of low rank, as two matrices in place of one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FactoredLinear(nn.Linear):
    """A linear layer of low rank: into `rank` features without bias, then out of them.

    `weight` is the second matrix, (out_features, rank), so that what reads a layer's dtype or device off its weight,
    as T5 does, still can.

    Args:
        linear: the layer to stand in for; its tensors are left alone.
        rank: > 0, at most the smaller side of the layer's weight.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(rank, linear.out_features, bias=linear.bias is not None, device="meta")
        self.in_features = linear.in_features
        inward, outward = low_rank_factors(linear.weight.detach(), rank)
        self.inward = nn.Parameter(inward)
        self.weight = nn.Parameter(outward)
        self.bias = linear.bias

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(F.linear(features, self.inward), self.weight, self.bias)


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two matrices whose product is the nearest of that rank: the largest singular values and their vectors.

    From the eigenvectors of the smaller Gram matrix, in float64: a quarter of the time of a whole decomposition.

    Args:
        weight: (out, in), any float dtype.
        rank: > 0, at most the smaller side.

    Returns: (rank, in) and (out, rank), in the weight's dtype and on its device; second @ first is near the weight.
    """
    # MPS has no float64.
    exact = weight.to("cpu" if weight.device.type == "mps" else weight.device).to(torch.float64)
    is_wide = exact.shape[1] > exact.shape[0]
    gram = exact @ exact.T if is_wide else exact.T @ exact
    strongest = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # eigenvalues ascend
    factors = (strongest.T @ exact, strongest) if is_wide else (strongest.T, exact @ strongest)
    inward, outward = (factor.contiguous().to(weight) for factor in factors)
    return inward, outward
