"""Task and logit term of a language model in one pass over its logits, with one gradient between them."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hf_distill.accounting import StepCounts
from hf_distill.batches import Batch
from hf_distill.items import IGNORE_INDEX
from hf_distill.losses.fused import cross_entropy_and_forward_kl
from hf_distill.progress import ActiveTerms
from hf_distill.signals import Task

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
            and terms.logits.loss == "forward_kl"
            and bool(batch.labels)
        )

    def __call__(
        self,
        outputs: Any,
        teacher_logits: Tensor,
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        *,
        task: Task,
        overwrite_teacher: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The weighted loss of a batch and its shares of the task and the logit term; None where they stay apart.

        Args:
            outputs: the student's output; until `accepted` with its own loss.
            teacher_logits: (batch, length, classes), aligned; student and teacher share these leading classes.
            batch: the batch.
            counts: the divisors.
            terms: the weights and the temperature.
            task: what both heads predict.
            overwrite_teacher: whether the gradient may be written over `teacher_logits`.

        Returns: three float32 scalars; the first carries the graph.
        """
        (mask,) = batch.items.task
        if teacher_logits.shape[:-1] != mask.shape:
            return None  # the terms apart say what is wrong
        task_share = mask / counts.task[0].clamp(min=1)
        kd_share = batch.items.kd / counts.kd.clamp(min=1)
        loss, cross_entropy, kl = cross_entropy_and_forward_kl(
            outputs["logits"],
            teacher_logits,
            _targets(batch, task),
            task_weights=terms.task.weight * task_share,
            kd_weights=terms.logits.weight * kd_share,
            temperature=terms.logits.temperature,
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


def _targets(batch: Batch, task: Task) -> Tensor:
    """(batch, length) the class that each position should predict, in the layout of the logits; -100 for none."""
    if "shift_labels" in batch.labels:
        return batch.labels["shift_labels"]
    labels = batch.labels["labels"]
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX) if task is Task.CAUSAL_LM else labels
