"""What is compared with what, by which factor, and where a rival is known to differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import cases, rivals
from benchmarks.parity.cases import Case, Logits, Loss
from hf_distill.losses import LOSSES, forward_kl
from hf_distill.losses.transforms import standardize

TRL, TORCHDISTILL, SENTENCE_TRANSFORMERS = "trl", "torchdistill", "sentence-transformers"
PACKAGES = (TRL, TORCHDISTILL, SENTENCE_TRANSFORMERS)
ABSENT = {
    "dkd": "in none of the packages; its authors' code is no package",
    "pairwise_ranking": "RankNetLoss of sentence-transformers takes the order of the scores, not their distances",
}


@dataclass(frozen=True)
class Comparison:
    """A rival's loss beside one of ours.

    Attributes:
        package: the distribution that the rival comes from.
        rival: its name and settings.
        theirs: its value on given logits.
        own: our loss and its options.
        ours: the mean of its values over the items.
        cases: the logits.
        factor: the rival's value over ours; 1 without one.
        factor_is: the factor in words.
        note: what else to know.
        differs: whether value or gradient differ all the same, for the reason in the note; where not, they must agree.
    """

    package: str
    rival: str
    theirs: Loss
    own: str
    ours: Loss
    cases: tuple[Case, ...]
    factor: Callable[[Case], float] = lambda case: 1.0
    factor_is: str = "1"
    note: str = ""
    differs: bool = False


def mean_of(name: str, **options: Any) -> Loss:
    """The mean over the items of one of our losses; where it takes labels, the first class is the label."""

    def loss(logits: Logits) -> Tensor:
        spec = LOSSES.get(name)
        filled_in = {"temperature": logits.temperature} if spec.takes_temperature else {}
        if spec.takes_targets:
            filled_in["targets"] = torch.zeros_like(logits.targets)
        return spec.function(logits.student, logits.teacher, **filled_in, **options).mean()

    return loss


def standardized_kl(logits: Logits) -> Tensor:
    """The mean forward KL of standardized logits."""
    student, teacher = standardize(logits.student), standardize(logits.teacher)
    return forward_kl(student, teacher, temperature=logits.temperature).mean()


def without_square(case: Case) -> float:
    """What is missing where the rival does not multiply by T²."""
    return 1 / case.temperature**2


def trl() -> Iterator[Comparison]:
    """The generalized JSD against ours of that name, the divergences at its ends, and the continuous one."""

    def against(their_beta: float, name: str, *, scale: float = 1.0, **options: float) -> Comparison:
        return Comparison(
            package=TRL,
            rival=f"GKDTrainer.generalized_jsd_loss, beta={their_beta:g}",
            theirs=rivals.trl_gjsd(their_beta),
            own=", ".join([name, *(f"{option}={value:g}" for option, value in options.items())]),
            ours=mean_of(name, **options),
            cases=cases.SEQUENCES,
            factor=lambda case: scale / case.temperature**2,
            factor_is=f"{scale:.2g}/T²",
        )

    betas = (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)
    for beta in betas:
        yield against(beta, "generalized_jsd", beta=beta)
    yield against(0.0, "forward_kl")
    yield against(1.0, "reverse_kl")
    for beta in betas:
        yield against(beta, "jsd", scale=beta * (1 - beta) or 1.0, beta=beta)
    yield Comparison(
        package=TRL,
        rival="GKDTrainer.generalized_jsd_loss, beta=0.5, no labels",
        theirs=rivals.trl_gjsd(0.5, labels=False),
        own="generalized_jsd, beta=0.5",
        ours=mean_of("generalized_jsd", beta=0.5),
        cases=cases.SEQUENCES,
        factor=lambda case: case.shape[1] / case.temperature**2,
        factor_is="length/T²",
        note="divides by the sequences, not by their tokens",
    )
    yield Comparison(
        package=TRL,
        rival="sdft.loss_utils.compute_topk_self_distillation_loss, k=4",
        theirs=rivals.trl_top_k(4),
        own="top_k_kl, k=4",
        ours=mean_of("top_k_kl", k=4),
        cases=cases.SEQUENCES,
        factor=without_square,
        factor_is="1/T²",
        note="its student chooses the classes, so the models are swapped, and its KL with them",
    )
    for beta, harm in ((0.0, "NaN is logged"), (0.5, "NaN in all gradients")):
        yield Comparison(
            package=TRL,
            rival=f"GKDTrainer.generalized_jsd_loss, beta={beta:g}, padded",
            theirs=rivals.trl_gjsd(beta),
            own=f"generalized_jsd, beta={beta:g}",
            ours=mean_of("generalized_jsd", beta=beta),
            cases=cases.PADDED_SEQUENCES,
            factor=without_square,
            factor_is="1/T²",
            note=f"{harm} where a class is at -inf in both models; it should add 0",
            differs=True,
        )


def torchdistill() -> Iterator[Comparison]:
    """Soft labels, with and without standardized logits."""
    for name, own, ours in (
        ("KDLoss", "forward_kl", mean_of("forward_kl")),
        ("LogitStdKDLoss", "standardize, then forward_kl", standardized_kl),
    ):
        yield Comparison(
            TORCHDISTILL, f"{name} beside labels", rivals.torchdistill_beside_labels(name), own, ours, cases.ITEMS
        )
        yield Comparison(
            package=TORCHDISTILL,
            rival=f"{name}, alpha=0",
            theirs=rivals.torchdistill(name, alpha=0.0),
            own=own,
            ours=ours,
            cases=cases.ITEMS,
            factor=without_square,
            factor_is="1/T²",
            note="without labels the T² and the weight of its formula are left out",
        )
    yield Comparison(
        package=TORCHDISTILL,
        rival="KDLoss, (sequences, length, classes)",
        theirs=rivals.torchdistill("KDLoss", alpha=0.0),
        own="forward_kl",
        ours=mean_of("forward_kl"),
        cases=cases.SEQUENCES,
        factor=lambda case: case.shape[1] / case.temperature**2,
        factor_is="length/T²",
        note="its softmax is over dimension 1, here the positions",
        differs=True,
    )
    for name, own, ours, harm in (
        ("KDLoss", "forward_kl", mean_of("forward_kl"), "NaN is logged"),
        ("LogitStdKDLoss", "standardize, then forward_kl", standardized_kl, "NaN in all gradients"),
    ):
        yield Comparison(
            package=TORCHDISTILL,
            rival=f"{name}, alpha=0, padded",
            theirs=rivals.torchdistill(name, alpha=0.0),
            own=own,
            ours=ours,
            cases=cases.PADDED_ITEMS,
            factor=without_square,
            factor_is="1/T²",
            note=f"{harm} where a class is at -inf in both models",
            differs=True,
        )


def torchdistill_dist() -> Iterator[Comparison]:
    """DIST, whose guard against correlations of nothing is the rival's `eps` and another one in ours."""

    def against(cases: tuple[Case, ...], rival: str = "DISTLoss", note: str = "", **options: float) -> Comparison:
        return Comparison(
            package=TORCHDISTILL,
            rival=rival,
            theirs=rivals.torchdistill("DISTLoss", temperature="tau", **options),
            own="dist",
            ours=mean_of("dist"),
            cases=cases,
            note=note,
            differs=bool(note) and options.get("eps") != 0,
        )

    yield against(cases.ITEMS)
    yield against(
        cases.WITH_AN_IMPROBABLE_CLASS,
        "DISTLoss, one of 1,000 classes improbable in all items",
        "below a norm of 1e-8 its eps fades the class out, ours does not",
    )
    yield against(
        cases.WITH_AN_IMPROBABLE_CLASS,
        "the same with eps=0, which is the paper's formula",
        "so is ours",
        eps=0.0,
    )
    yield against(
        cases.PADDED_ITEMS,
        "DISTLoss, padded",
        "counts classes at -inf in both models as uncorrelated; ours leaves them out",
    )


def sentence_transformers() -> Iterator[Comparison]:
    """Scores of the candidates of a query."""
    yield Comparison(
        SENTENCE_TRANSFORMERS,
        "DistillKLDivLoss",
        rivals.st_kl,
        "forward_kl",
        mean_of("forward_kl"),
        cases.CANDIDATES_AT_TEMPERATURES,
    )
    yield Comparison(
        package=SENTENCE_TRANSFORMERS,
        rival="DistillKLDivLoss, padded",
        theirs=rivals.st_kl,
        own="forward_kl",
        ours=mean_of("forward_kl"),
        cases=cases.PADDED_ITEMS,
        note="NaN is logged where a candidate is at -inf in both models",
        differs=True,
    )
    yield Comparison(
        SENTENCE_TRANSFORMERS,
        "MarginMSELoss",
        rivals.st_margin_mse,
        "margin_mse",
        mean_of("margin_mse"),
        cases.CANDIDATES,
    )
    yield Comparison(
        package=SENTENCE_TRANSFORMERS,
        rival="ListNetLoss less the teacher's entropy",
        theirs=rivals.st_list_net,
        own="listnet",
        ours=mean_of("listnet"),
        cases=cases.CANDIDATES,
        note="in float32, to which it casts",
    )


COMPARISONS: tuple[Comparison, ...] = (*trl(), *torchdistill(), *torchdistill_dist(), *sentence_transformers())
