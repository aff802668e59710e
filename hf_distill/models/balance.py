"""What balances the terms of a loss while training: learned uncertainties, or their sizes so far."""

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """A learned log variance s for each term: the loss is the sum of exp(-s) / 2 * term + s / 2.

    Source: Kendall, Gal and Cipolla 2018, arXiv:1705.07115, eq. 10, with s = log sigma², which starts at 0.

    Args:
        terms: how many there are.
    """

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(terms))

    def forward(self, sums: Tensor, shares: Tensor) -> Tensor:
        """The terms' loss, scalar.

        Args:
            sums: (terms,) each term times its weight.
            shares: (terms,) this batch's share of the window times the term's weight, since variances are to be paid
                for once a step; 0 for terms that are off.
        """
        return ((-self.log_variances).exp() * sums + shares * self.log_variances).sum() / 2


class RunningMagnitudes(nn.Module):
    """How large each term was so far: an average in which old steps fade, kept in checkpoints.

    Args:
        terms: how many there are.
        momentum: how much of the average a step leaves as it is, in [0, 1).
    """

    means: Tensor
    steps: Tensor

    def __init__(self, terms: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("means", torch.zeros(terms))
        self.register_buffer("steps", torch.zeros(terms))

    def update(self, values: Tensor, present: Tensor) -> None:
        """Takes in a step.

        Args:
            values: (terms,) each term before its weight.
            present: (terms,) bool, those that the step had.
        """
        momentum = torch.where(self.steps > 0, self.momentum, 0.0)  # the first step is all there is
        self.means.copy_(torch.where(present, momentum * self.means + (1 - momentum) * values, self.means))
        self.steps.add_(present)

    def relative_to(self, reference: int, *, largest: float) -> Tensor:
        """(terms,) what makes each term as large as the reference's; 1 for those that have not been seen.

        Args:
            reference: the number of a term.
            largest: of these factors; 1 / largest is the least.
        """
        known = (self.steps > 0) & (self.steps[reference] > 0) & (self.means > 0)
        ratio = self.means[reference] / torch.where(known, self.means, 1.0)
        return torch.where(known, ratio.clamp(1 / largest, largest), 1.0)
