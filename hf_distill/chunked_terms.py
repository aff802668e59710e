"""Task and logit term of a language model without its logits: formed inside its forward, from what its head reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from hf_distill.accounting import StepCounts, divisor
from hf_distill.batches import Batch
from hf_distill.losses.base import LOSSES
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_rows import Divergence
from hf_distill.models.heads import task_model
from hf_distill.models.lm_head import WINDOW, HeadTap
from hf_distill.progress import ActiveTerms
from hf_distill.signals import LogitFactors, Task
from hf_distill.targets import next_tokens
from hf_distill.teachers import FactoredTeacher, Teacher, in_eval_mode
from hf_distill.temperature import TemperaturePolicy

# Two ways to sum one cross-entropy agree better; a head that adds anything to it is further off.
_TOLERANCE = 2e-5
logger = logging.get_logger(__name__)


class KeptPlaces:
    """Where a mask is True, counted beforehand, so that nobody waits for the device when the places are asked for."""

    def __init__(self, mask: Tensor) -> None:
        """Starts counting; `mask` is bool."""
        self._mask = mask.flatten()
        self._event: torch.cuda.Event | None = None
        if mask.device.type == "cuda":
            self._count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._count.copy_(mask.sum(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def places(self) -> Tensor:
        """(any,) int64, in order."""
        if self._event is None:
            return self._mask.nonzero().squeeze(-1)
        self._event.synchronize()
        return torch.nonzero_static(self._mask, size=int(self._count)).squeeze(-1)


class ChunkedTerms:
    """The two terms of a language model from hidden states, where that is shown to be the same.

    The first batch decides, in a forward beside the training: there the student's own logits of a few positions are
    compared with those of its head, and its own loss on made-up labels with their cross-entropy. Where they differ
    the logits are formed, and a warning says once why.
    """

    def __init__(self) -> None:
        self._tap: HeadTap | None = None
        self._is_cross_entropy: bool | None = None
        self._in_training, self._reported = False, False
        self._kept: KeptPlaces | None = None

    @property
    def reason(self) -> str | None:
        """Why the logits are formed; None while they are not, or nothing is known yet."""
        if self._tap is None:
            return "the student is not in a training"
        if self._is_cross_entropy is False:
            return "the student's own loss is more than the cross-entropy of its logits"
        return self._tap.reason

    def attach(self, student: nn.Module) -> None:
        """Hangs idle hooks on the student's head; before it is compiled or wrapped."""
        if self._tap is None or not self._tap.reads(student):
            self.detach()
            self._tap, self._is_cross_entropy, self._reported = HeadTap(student), None, False
        self._tap.attach()
        self._in_training = True

    def detach(self) -> None:
        """Takes the hooks off."""
        self._in_training = False
        if self._tap is not None:
            self._tap.detach()

    def suit(self, task: Task, terms: ActiveTerms, batch: Batch, teacher: Teacher | None) -> bool:
        """Whether these terms of this batch can be formed so, as far as the models do not forbid it."""
        term = terms.logits
        # Outside a training nothing is attached, and logits are formed.
        if not self._in_training or not task.is_language_model or task is Task.CTC or term.weight == 0:
            return False
        spec = LOSSES.get(term.loss)
        return (
            isinstance(teacher, FactoredTeacher)
            and spec.feature == "logits"
            and not spec.compares_rows
            and term.transform == "none"
            and term.teacher_scale == 1
            and term.temperature_squared
            and not isinstance(term.temperature, TemperaturePolicy)
            and (terms.task.weight == 0 or bool(batch.labels))
        )

    def settle(
        self,
        student: nn.Module,
        arguments: Mapping[str, Any],
        teacher: Any,
        *,
        task: Task,
        with_task: bool,
        mask: Tensor,
    ) -> bool:
        """Whether both models let it; runs the student once or twice beside the training where that is not known.

        Args:
            student: the bare student.
            arguments: what its forward takes of a batch, without labels.
            teacher: the teacher.
            task: what both heads predict.
            with_task: whether the student's own loss is one of the terms.
            mask: (batch, length) bool, the items of either term; they are counted from here on.
        """
        assert self._tap is not None
        if self.reason is None and not self._tap.verified:
            with in_eval_mode(student), torch.no_grad():
                self._tap.verify(student, arguments)
            if self._tap.verified and self._tap.shape != mask.shape:
                self._tap.reason = f"the student's head reads {self._tap.shape} positions of {tuple(mask.shape)}"
        if self.reason is None and with_task and self._is_cross_entropy is None:
            with in_eval_mode(student), torch.no_grad():
                self._is_cross_entropy = self._own_loss_is_plain(student, arguments, task)
        reason = self.reason
        if reason is None and not teacher.gives_factors:
            reason = "the teacher's logits cannot be taken apart"
        if reason is not None and not self._reported:
            self._reported = True
            logger.warning(f"Logits of tokens x vocabulary are formed: {reason}.")
        # Before the teacher's forward: the device then has that to do while the host waits for the number.
        self._kept = KeptPlaces(mask) if reason is None else None
        return reason is None

    def _own_loss_is_plain(self, student: nn.Module, arguments: Mapping[str, Any], task: Task) -> bool:
        """Whether the model's own loss on a few positions is the cross-entropy of its logits there."""
        assert self._tap is not None
        config, device = task_model(student).config.get_text_config(decoder=True), task_model(student).device
        rows, length = self._tap.shape
        # Labels of our own: those of the batch may all lie elsewhere, and all ranks must run as many forwards.
        labels = torch.arange(rows * length, device=device).view(rows, length)[:, WINDOW] % config.vocab_size
        with self._tap.open(lambda factors: None, window=WINDOW):
            outputs = student(**arguments, labels=labels)
        if outputs.get("aux_loss") is not None:
            return False
        logits = outputs["logits"].float()
        if task is Task.CAUSAL_LM:
            logits, labels = logits[:, :-1], labels[:, 1:]
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return bool((outputs["loss"].float() - expected).abs() <= _TOLERANCE * expected.clamp(min=1))

    @contextmanager
    def forming(
        self,
        teacher: LogitFactors,
        batch: Batch,
        counts: StepCounts,
        terms: ActiveTerms,
        weights: Mapping[str, Any],
        *,
        task: Task,
        item_weights: Tensor | None,
        classes: int | None,
    ) -> Iterator[None]:
        """Around the student's forward: `take` then gives the weighted loss and the shares of the two terms.

        Args:
            teacher: what the teacher's logits are made of.
            batch: the batch.
            counts: the divisors.
            terms: the terms, `suit`able ones.
            weights: of the terms `task` and `kd`: numbers, or scalars without a graph.
            task: what both heads predict.
            item_weights: of the KD items, in their shape; None weighs all alike.
            classes: how many leading classes both share, or None for all.
        """
        assert self._tap is not None
        (mask,) = batch.items.task
        task_share = mask / divisor(counts.task[0])
        kept = batch.items.kd if item_weights is None else torch.where(batch.items.kd, item_weights, 0.0)
        kd_share = kept / divisor(counts.kd)
        targets = next_tokens(batch, task) if batch.labels else torch.zeros_like(mask, dtype=torch.int64)
        bias = None if teacher.bias is None else teacher.bias[:classes]
        teacher = replace(teacher, weight=teacher.weight[:classes], bias=bias)
        found, self._kept = self._kept, None
        with_task = isinstance(weights["task"], Tensor) or weights["task"] > 0

        temperature: Any = terms.logits.temperature  # a number by now

        def run(student: LogitFactors) -> tuple[Tensor, Tensor | None, Tensor]:
            loss, cross_entropy, value = chunked_head_loss(
                student,
                teacher,
                targets,
                task_weights=weights["task"] * task_share,
                kd_weights=weights["kd"] * kd_share,
                temperature=temperature,
                divergence=Divergence(LOSSES.get(terms.logits.loss), terms.logits.options),
                kept=None if found is None else found.places(),
            )
            return loss, (cross_entropy * task_share).sum() if with_task else None, (value * kd_share).sum()

        with self._tap.open(run):
            yield

    def take(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the last forward formed: the weighted loss with the graph, and the shares of both terms.

        Raises:
            RuntimeError: the forward took another way to its logits than the one that was looked at.
        """
        assert self._tap is not None
        result = self._tap.take()
        if result is None:
            raise RuntimeError(
                "The student's forward in training did not run its head on (batch, length, width), though it did in "
                "evaluation mode. Call the head by its forward in both modes."
            )
        return result
