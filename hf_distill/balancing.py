"""Factors on the terms' weights that follow the training: learned uncertainties, or sizes relative to the logits'."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from hf_distill.config import DistillationConfig
from hf_distill.models.balance import RunningMagnitudes, UncertaintyWeights

_REFERENCE = "kd"
# A term that vanishes would otherwise get a weight beyond all bounds.
_LARGEST_FACTOR = 1e3


def balanced_terms(config: DistillationConfig) -> tuple[str, ...]:
    """The names of the terms with a weight, in their order."""
    return tuple(name for name, term in config.terms.items() if term.weight > 0)


def balance_module(config: DistillationConfig) -> nn.Module:
    """What the balance of a config trains or remembers."""
    terms = len(balanced_terms(config))
    if config.balance.kind == "uncertainty":
        return UncertaintyWeights(terms)
    return RunningMagnitudes(terms, config.balance.momentum)


class Balancer:
    """The factors of one training.

    Args:
        names: of the terms with a weight.
        module: as of `balance_module`; on the training's device while it trains.
    """

    def __init__(self, names: tuple[str, ...], module: nn.Module) -> None:
        self.names, self.module = names, module
        self._pending: Tensor | None = None

    def factors(self) -> dict[str, Tensor]:
        """What each term's weight is multiplied by now: scalars without a graph."""
        if isinstance(self.module, RunningMagnitudes):
            factors = self.module.relative_to(self.names.index(_REFERENCE), largest=_LARGEST_FACTOR)
        else:
            assert isinstance(self.module, UncertaintyWeights)
            factors = (-self.module.log_variances.detach().float()).exp() / 2
        return dict(zip(self.names, factors.unbind(), strict=True))

    def penalty(
        self,
        parameters: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        share: Tensor,
    ) -> Tensor | None:
        """What trains the uncertainties and is part of the loss: scalar; None where nothing is learned.

        Args:
            parameters: the module's, as they came out of the student's forward.
            terms: this batch's shares of the terms that are on, before their weights.
            weights: of the terms without the factors. They weigh what variances cost as well: otherwise these would
                undo them, and a term whose scheduled weight is 0 would raise its factor without end.
            share: scalar, this batch's share of the window.
        """
        if not isinstance(self.module, UncertaintyWeights):
            return None
        share = share.float()
        zero = torch.zeros_like(share)
        sums = torch.stack([weights.get(name, 0.0) * terms.get(name, zero).detach().float() for name in self.names])
        shares = torch.stack([weights[name] * share if name in terms else zero for name in self.names])
        loss: Tensor = functional_call(self.module, dict(parameters), (sums, shares))
        # The terms are in the loss already, with their own graph.
        return loss - (torch.stack([*self.factors().values()]) * sums).sum()

    def forget(self) -> None:
        """Drops what was noted of a window that never ended, as when a batch did not fit the memory."""
        self._pending = None

    def note(self, shares: Mapping[str, Tensor]) -> None:
        """Takes down a batch's shares of the terms before their weights, summed over the window by `settle`."""
        if not isinstance(self.module, RunningMagnitudes):
            return
        with torch.no_grad():
            zero, one = (make((), device=self.module.means.device) for make in (torch.zeros, torch.ones))
            values = torch.stack([shares.get(name, zero).float() for name in self.names])
            present = torch.stack([one if name in shares else zero for name in self.names])
            row = torch.stack([values, present])
            self._pending = row if self._pending is None else self._pending + row

    def settle(self, accelerator: Accelerator) -> None:
        """At the end of a window: what was noted becomes part of the averages, alike on all ranks."""
        if self._pending is None or not isinstance(self.module, RunningMagnitudes):
            return
        with torch.no_grad():
            values, present = accelerator.reduce(self._pending, "sum")
            self.module.update(values, present > 0)
        self._pending = None
