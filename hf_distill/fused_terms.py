"""Task and logit term of a language model in one pass over its logits, with one gradient between them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_distill.accounting import StepCounts, divisor
from hf_distill.batches import Batch
from hf_distill.config import LogitTerm
from hf_distill.losses.fused import cross_entropy_and_forward_kl
from hf_distill.objective import LogitSignals
from hf_distill.progress import ActiveTerms
from hf_distill.signals import Task
from hf_distill.targets import next_tokens
from hf_distill.temperature import LearnedTemperature

# Two ways to sum one cross-entropy agree better; a head that adds anything to it is further off.
_TOLERANCE = 2e-5


class FusedTerms:
    """The two terms of a language model, fused where its own loss is shown to be the cross-entropy and no more.

    The first batch with labels decides: there the model forms its own loss too, and the two are compared. Where they
    differ (auxiliary losses of experts, losses formed in half precision) the terms stay apart.

    Attributes:
        accepted: None until a batch has decided.
    """

    def __init__(self) -> None:
        self.accepted: bool | None = None

    def suits(self, task: Task, terms: ActiveTerms, batch: Batch) -> bool:
        """Whether these terms of this batch may be fused, as far as the model's own loss does not forbid it."""
        return (
            self.accepted is not False
            and task in (Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM)
            and terms.task.weight > 0
            and terms.logits.weight > 0
            and batch.teacher_positions is None
            and _is_plain_kl(terms.logits)
            and (batch.has_targets or (self.accepted is True and batch.is_on_policy))
        )

    def __call__(
        self,
        outputs: Any,
        signals: LogitSignals,
        batch: Batch,
        counts: StepCounts,
        weights: Mapping[str, Any],
        *,
        task: Task,
        overwrite_teacher: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The weighted loss of a batch and its shares of the task and the logit term; None where they stay apart.

        Args:
            outputs: the student's output; until `accepted` with its own loss.
            signals: one pair of (batch, length, classes) logits, aligned: student and teacher share these leading
                classes.
            batch: the batch.
            counts: the divisors.
            weights: of the terms `task` and `kd`: numbers, or scalars without a graph.
            task: what both heads predict.
            overwrite_teacher: whether the gradient may be written over `teacher_logits`.

        Returns: three float32 scalars; the first carries the graph.
        """
        (mask,) = batch.items.task
        ((_, teacher_logits),) = signals.pairs
        if teacher_logits.shape[:-1] != mask.shape:
            return None  # the terms apart say what is wrong
        task_share = mask / divisor(counts.task[0])
        kept = batch.items.kd if signals.weights is None else torch.where(batch.items.kd, signals.weights, 0.0)
        kd_share = kept / divisor(counts.kd)
        loss, cross_entropy, kl = cross_entropy_and_forward_kl(
            outputs["logits"],
            teacher_logits,
            next_tokens(batch, task),
            task_weights=weights["task"] * task_share,
            kd_weights=weights["kd"] * kd_share,
            temperature=signals.temperatures[0],
            overwrite_teacher=overwrite_teacher and self.accepted is True,
        )
        if self.accepted is None:
            self._decide(outputs, cross_entropy.sum() / mask.sum())
        if not self.accepted:
            return None
        return loss, (cross_entropy * task_share).sum(), (kl * kd_share).sum()

    def _decide(self, outputs: Any, mean: Tensor) -> None:
        difference = (outputs["loss"].detach().float() - mean).abs() / mean.abs().clamp(min=1)
        if outputs.get("aux_loss") is not None:
            self.accepted = False
        elif not bool(difference.isnan()):  # a batch without labels, whose means are 0 / 0, decides nothing
            self.accepted = bool(difference <= _TOLERANCE)


def _is_plain_kl(term: LogitTerm) -> bool:
    """Whether it is the KL of the logits as they are, whose temperature gets no gradient."""
    as_is = term.loss == "forward_kl" and term.transform == "none" and term.teacher_scale == 1
    return as_is and term.temperature_squared and not isinstance(term.temperature, LearnedTemperature)
