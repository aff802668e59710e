"""Losses of other packages from hidden states and heads, as far as they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Heads(NamedTuple):
    """Two heads and what they read; the student's side asks for gradients."""

    hidden: Tensor  # (items, student width)
    weight: Tensor  # (classes, student width)
    teacher_hidden: Tensor  # (items, teacher width)
    teacher_weight: Tensor  # (classes, teacher width)
    targets: Tensor  # (items,)


Loss = Callable[[Heads], Tensor]


def trl_gkd(heads: Heads, *, beta: float = 0.0) -> Tensor:
    """TRL's GKD: a divergence of full logits; beta 0 is forward KL."""
    from trl.experimental.gkd import GKDTrainer

    logits = functional.linear(heads.hidden, heads.weight)
    teacher_logits = functional.linear(heads.teacher_hidden, heads.teacher_weight)
    return GKDTrainer.generalized_jsd_loss(logits[None], teacher_logits[None], labels=heads.targets[None], beta=beta)


def trl_chunked(heads: Heads, *, beta: float = 0.0) -> Tensor:
    """TRL's kernel over vocabulary tiles; it knows no labels, and masks after the projection."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    sides = heads.hidden, heads.weight, None, heads.teacher_hidden, heads.teacher_weight, None
    values, _ = ChunkedDivergenceFunction.apply(*sides, beta, 1.0)
    kept = heads.targets >= 0
    return values.masked_fill(~kept, 0).sum() / kept.sum()


def liger(
    heads: Heads, *, beta: float = 0.0, hard: float = 0.0, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """Liger's chunked JSD, not compiled; beta 0 is forward KL."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    sides = heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight, heads.targets, None, None
    weights = hard, 1 - hard, beta, -100, temperature
    return LigerFusedLinearJSDFunction.apply(*sides, *weights, False, chunk, False)


def torchtune(heads: Heads) -> Tensor:
    """Torchtune's forward KL of full logits in eight chunks."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    logits = functional.linear(heads.hidden, heads.weight)[None].chunk(8, dim=1)
    teacher = functional.linear(heads.teacher_hidden, heads.teacher_weight)[None].chunk(8, dim=1)
    return ForwardKLWithChunkedOutputLoss(num_output_chunks=8)([*logits], [*teacher], heads.targets[None])


RIVALS: dict[str, Loss] = {"trl gkd": trl_gkd, "trl chunked": trl_chunked, "liger": liger, "torchtune": torchtune}


def installed() -> dict[str, Loss]:
    """Those of the rivals that can be called here."""
    heads = [torch.randn(8, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)]
    small = Heads(*heads, torch.randn(8, 4), torch.randn(16, 4), torch.arange(8))
    found = {}
    for name, loss in RIVALS.items():
        try:
            loss(small)
        except ImportError:
            continue
        found[name] = loss
    return found
