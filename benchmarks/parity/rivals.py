"""The rivals' losses on given logits, each as its own package computes it: a scalar.

A rival's package is imported where it is called: most environments hold some of them, not all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional

from benchmarks.parity.cases import LABEL_WEIGHT, Logits, Loss

# Where torchdistill's losses look for logits in the record of a model's forward pass.
_PATHS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}


def trl_gjsd(beta: float, *, labels: bool = True) -> Loss:
    """TRL's generalized JSD; without labels it divides by the sequences, not by their tokens."""

    def loss(logits: Logits) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        return GKDTrainer.generalized_jsd_loss(
            logits.student,
            logits.teacher,
            labels=logits.targets if labels else None,
            beta=beta,
            temperature=logits.temperature,
        )

    return loss


def trl_top_k(k: int) -> Loss:
    """TRL's divergence over k classes and the rest, in which the student chooses them: its two models are swapped."""

    def loss(logits: Logits) -> Tensor:
        from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

        models = (logits.teacher / logits.temperature, logits.student / logits.temperature)
        values = compute_topk_self_distillation_loss(
            *models, distillation_topk=k, distillation_alpha=1.0, distillation_add_tail=True
        )
        return values.mean()

    return loss


def torchdistill(name: str, *, temperature: str = "temperature", **options: Any) -> Loss:
    """A loss of torchdistill by its name, without labels; `temperature` is what it calls it."""

    def loss(logits: Logits) -> Tensor:
        from torchdistill.losses import mid_level

        module = getattr(mid_level, name)(**_PATHS, **{temperature: logits.temperature}, **options)
        return module({".": {"output": logits.student}}, {".": {"output": logits.teacher}})

    return loss


def torchdistill_beside_labels(name: str) -> Loss:
    """The soft part of a loss of torchdistill that multiplies by T² only beside a labels' loss, which is taken off."""

    def loss(logits: Logits) -> Tensor:
        from torchdistill.losses import mid_level

        module = getattr(mid_level, name)(**_PATHS, temperature=logits.temperature, alpha=LABEL_WEIGHT, beta=1.0)
        both = module({".": {"output": logits.student}}, {".": {"output": logits.teacher}}, logits.targets)
        return both - LABEL_WEIGHT * functional.cross_entropy(logits.student, logits.targets)

    return loss


class _Scores(nn.Module):
    """Stands in for a retrieval model: its embeddings are given, and so is the score of every pair."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def columns(self) -> list[dict[str, Tensor]]:
        """Queries of embedding 1 and candidates whose embedding, and so dot product with it, is the score."""
        embeddings = [torch.ones_like(self.logits.student[:, :1]), *self.logits.student.split(1, dim=1)]
        return [{"sentence_embedding": embedding} for embedding in embeddings]

    def preprocess(self, pairs: list[tuple[int, int]], **_: Any) -> dict[str, Tensor]:
        """The scores of (query, candidate) pairs."""
        queries, candidates = torch.tensor(pairs).unbind(1)
        return {"scores": self.logits.student[queries, candidates]}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """What it is given."""
        return features


def st_kl(logits: Logits) -> Tensor:
    """sentence-transformers' KL over the candidates of a query."""
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    model = _Scores(logits)
    return DistillKLDivLoss(model, temperature=logits.temperature)(model.columns(), logits.teacher)


def st_margin_mse(logits: Logits) -> Tensor:
    """sentence-transformers' margin MSE; the first candidate is the positive one."""
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss

    model = _Scores(logits)
    return MarginMSELoss(model)(model.columns(), logits.teacher)


def st_list_net(logits: Logits) -> Tensor:
    """sentence-transformers' ListNet of a cross-encoder, given the teacher's scores as labels, less their entropy."""
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    queries, candidates = logits.student.shape
    names = [list(range(candidates)) for _ in range(queries)]
    cross_entropy = ListNetLoss(_Scores(logits))([list(range(queries)), names], list(logits.teacher))
    return cross_entropy - Categorical(logits=logits.teacher).entropy().mean()
