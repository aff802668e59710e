"""What is timed: the bare products, the composition on all logits, ours, and other packages' losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.rivals import Heads, installed, liger
from hf_distill.losses import LOSSES
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_products import Workspace
from hf_distill.losses.head_rows import Divergence
from hf_distill.signals import LogitFactors

Contender = Callable[[Heads], None]
# The first is what the others' time is compared with, the second what their memory is.
FLOOR, NAIVE = "products alone", "naive"
# What a training keeps from step to step.
_WORKSPACE = Workspace()


def floor(heads: Heads, *, chunk: int = 512) -> None:
    """The four products that nobody can do without, in chunks."""
    hidden, weight, teacher_hidden, teacher_weight, _ = (tensor.detach() for tensor in heads)
    logits, teacher_logits = (hidden.new_empty(chunk, len(weight)) for _ in range(2))
    gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        torch.mm(part, weight.t(), out=logits[: len(part)])
        torch.mm(teacher_hidden[start : start + chunk], teacher_weight.t(), out=teacher_logits[: len(part)])
        torch.mm(logits[: len(part)], weight, out=gradient[start : start + chunk])
        weight_gradient.addmm_(logits[: len(part)].t(), part)


def naive(heads: Heads, *, temperature: float = 1.0, labels: bool = False) -> None:
    """Of all logits, as tutorials show it; the items that do not count are masked."""
    student = (heads.hidden @ heads.weight.t()).float()
    teacher = (heads.teacher_hidden @ heads.teacher_weight.t()).float()
    mask = heads.targets >= 0
    log_probs = functional.log_softmax(student / temperature, -1)
    teacher_log_probs = functional.log_softmax(teacher / temperature, -1)
    values = functional.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="none").sum(-1)
    values = values * temperature**2
    if labels:
        values = (values + functional.cross_entropy(student, heads.targets, reduction="none")) / 2
    (torch.where(mask, values, 0.0).sum() / mask.sum()).backward()


def ours(heads: Heads, *, loss: str = "forward_kl", temperature: float = 1.0, labels: bool = False) -> None:
    """`hf_distill.losses.chunked_head.chunked_head_loss`."""
    mask = heads.targets >= 0
    share = mask / mask.sum()
    total, *_ = chunked_head_loss(
        LogitFactors(heads.hidden, heads.weight),
        LogitFactors(heads.teacher_hidden, heads.teacher_weight),
        heads.targets.clamp(min=0),
        task_weights=share / 2 if labels else torch.zeros_like(share),
        kd_weights=share / 2 if labels else share,
        temperature=temperature,
        divergence=Divergence(LOSSES.get(loss)),
        workspace=_WORKSPACE,
    )
    total.backward()


def half(contender: Contender, heads: Heads) -> None:
    """With every other item left out of the loss."""
    kept = torch.arange(len(heads.targets), device=heads.targets.device) % 2 == 0
    contender(heads._replace(targets=heads.targets.where(kept, -100)))


def backward(loss: Callable[..., Tensor], heads: Heads, **options: float) -> None:
    """Value and gradient of a rival."""
    loss(heads, **options).backward()


def contenders() -> dict[str, Contender]:
    """All of them, those of other packages as far as they are installed."""
    found = installed()
    rivals: dict[str, Contender] = {name: partial(backward, loss) for name, loss in found.items() if name != "liger"}
    mixed = {"temperature": 2.0, "labels": True}
    jsd = {f"{name}, jsd": partial(backward, loss, beta=0.5) for name, loss in found.items() if name != "torchtune"}
    if "liger" in found:
        rivals |= {f"liger, chunk {chunk}": partial(backward, liger, chunk=chunk) for chunk in (1024, 256)}
    alone: dict[str, Contender] = {NAIVE: naive, "ours": ours, **rivals}
    return {
        FLOOR: floor,
        **alone,
        "naive, with labels at T 2": partial(naive, **mixed),
        "ours, with labels at T 2": partial(ours, **mixed),
        "ours, jsd": partial(ours, loss="jsd"),
        **jsd,
        **{f"{name}, half of the items": partial(half, contender) for name, contender in alone.items()},
    }
