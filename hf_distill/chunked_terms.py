"""Task and logit term of a language model without its logits: formed inside its forward, from what its head reads."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from hf_distill.batches import Batch
from hf_distill.config import LogitTerm
from hf_distill.items import IGNORE_INDEX
from hf_distill.losses.base import LOSSES
from hf_distill.losses.chunked_head import HeadTerms, chunked_head_loss
from hf_distill.losses.head_products import Workspace
from hf_distill.losses.head_rows import Divergence
from hf_distill.losses.sparse_head import sparse_head_loss
from hf_distill.losses.transforms import standardize
from hf_distill.models.heads import task_model
from hf_distill.models.lm_head import WINDOW, HeadTap, holds_head
from hf_distill.progress import ActiveTerms
from hf_distill.signals import LogitFactors, SparseLogits, Task
from hf_distill.targets import next_tokens
from hf_distill.teachers import SparseTeacher, Teacher, takes_factored
from hf_distill.temperature import AdaptiveTemperature, TemperaturePolicy

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
        self._is_attached, self._reported, self._looked_at_training = False, False, False
        self._kept: KeptPlaces | None = None
        self._workspace = Workspace()

    @property
    def reason(self) -> str | None:
        """Why the logits are formed; None while they are not, or nothing is known yet."""
        if self._tap is None:
            return "no hooks hang on the student's head"
        if self._is_cross_entropy is False:
            return "the student's own loss is more than the cross-entropy of its logits"
        return self._tap.reason

    def attach(self, student: nn.Module) -> None:
        """Hangs idle hooks on the student's head; before it is compiled or wrapped."""
        if self._tap is None or not self._tap.reads(student):
            self.detach()
            self._tap, self._is_cross_entropy, self._reported = HeadTap(student), None, False
            self._looked_at_training = False
        self._tap.attach()
        self._is_attached = True

    def detach(self) -> None:
        """Takes the hooks off, and lets go of what memory was kept."""
        self._is_attached, self._workspace = False, Workspace()
        if self._tap is not None:
            self._tap.detach()

    @contextmanager
    def attached(self, student: nn.Module) -> Iterator[None]:
        """Around an evaluation: what hangs no hooks outside a training has them for that long."""
        was_attached = self._is_attached
        if not was_attached:
            self.attach(student)
        try:
            yield
        finally:
            if not was_attached:
                self.detach()

    def forget(self) -> None:
        """Drops what was settled for a forward that never came."""
        self._kept = None

    @property
    def is_settled(self) -> bool:
        """Whether the next forward, and not a later one, is to form the terms."""
        return self._kept is not None

    def suit(self, task: Task, terms: ActiveTerms, batch: Batch, teacher: Teacher | None) -> bool:
        """Whether these terms of this batch can be formed so, as far as the models do not forbid it."""
        term = terms.logits
        # Outside trainings and evaluations nothing is attached, and logits are formed.
        if not self._is_attached or not task.is_language_model or task is Task.CTC or term.weight == 0:
            return False
        spec = LOSSES.get(term.loss)
        return (
            (takes_factored(teacher) or isinstance(teacher, SparseTeacher))
            and spec.feature == "logits"
            and not (spec.compares_rows or spec.any_classes)
            and term.token_alignment == "none"
            and not _match_reads_head(terms, self._tap, teacher)
            and (not isinstance(term.temperature, TemperaturePolicy) or _is_of_one_item(term.temperature))
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
        if self.reason is None:
            self._tap.reason = _untried_sharding(student)
        if student.training and not self._looked_at_training:  # a model may do more in training than in evaluation
            self._looked_at_training, self._tap.verified = True, False
            self._is_cross_entropy = None if self._is_cross_entropy else self._is_cross_entropy
        if self.reason is None and not self._tap.verified:
            with _beside_the_training(), torch.no_grad():
                self._tap.verify(student, arguments)
            if self._tap.verified and self._tap.shape != mask.shape:
                self._tap.reason = f"the student's head reads {self._tap.shape} positions of {tuple(mask.shape)}"
        if self.reason is None and with_task and self._is_cross_entropy is None:
            with _beside_the_training(), torch.no_grad():
                self._is_cross_entropy = self._own_loss_is_plain(student, arguments, task, mask.shape)
        reason = self.reason
        if reason is None and not isinstance(teacher, SparseTeacher) and not teacher.gives_factors:
            why = getattr(teacher, "no_factors", None)
            reason = f"the teacher's logits cannot be taken apart{'' if why is None else f': {why}'}"
        if reason is not None and not self._reported:
            self._reported = True
            logger.warning(f"Logits of tokens x vocabulary are formed: {reason}.")
        # Before the teacher's forward: the device then has that to do while the host waits for the number.
        self._kept = KeptPlaces(mask) if reason is None else None
        return reason is None

    def _own_loss_is_plain(
        self, student: nn.Module, arguments: Mapping[str, Any], task: Task, shape: torch.Size
    ) -> bool:
        """Whether the model's own loss on a few positions is the cross-entropy of its logits there."""
        assert self._tap is not None
        config, device = task_model(student).config.get_text_config(decoder=True), task_model(student).device
        rows, length = shape
        # Labels of our own: those of the batch may all lie elsewhere, and all ranks must run as many forwards.
        labels = torch.arange(rows * length, device=device).view(rows, length)[:, WINDOW] % config.vocab_size
        seen: list[Any] = []
        # In front of what FSDP2 does to outputs in mixed precision: it rounds the loss too.
        hook = task_model(student).register_forward_hook(lambda *given: seen.append(given[-1]), prepend=True)
        try:
            with self._tap.open(lambda factors: None, window=WINDOW):
                student(**arguments, labels=labels)
        finally:
            hook.remove()
        (outputs,) = seen
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
        teacher: LogitFactors | SparseLogits,
        batch: Batch,
        term: LogitTerm,
        *,
        task: Task,
        task_weights: Tensor,
        kd_weights: Tensor,
        classes: int | None,
        agreement: bool = False,
    ) -> Iterator[None]:
        """Around the student's forward: `take` then gives what it formed.

        Args:
            teacher: what the teacher's logits are made of, or its most likely classes.
            batch: the batch.
            term: the logit term now, of `suit`able terms.
            task: what both heads predict.
            task_weights: (batch, length) of each cross-entropy.
            kd_weights: (batch, length) of each comparison.
            classes: how many leading classes both share, or None for all.
            agreement: whether to say where both choose the same class.
        """
        assert self._tap is not None
        none = torch.full_like(batch.items.kd, IGNORE_INDEX, dtype=torch.int64)
        targets = next_tokens(batch, task) if batch.labels else none
        found, self._kept = self._kept, None
        formed: Callable[..., HeadTerms]
        if isinstance(teacher, SparseLogits):
            formed = partial(sparse_head_loss, classes=classes)
        else:
            bias = None if teacher.bias is None else teacher.bias[:classes]
            teacher = replace(teacher, weight=teacher.weight[:classes], bias=bias)
            formed = partial(chunked_head_loss, temperature=_temperature_of(term))

        def run(student: LogitFactors) -> HeadTerms:
            return formed(
                student,
                teacher,
                targets,
                task_weights=task_weights,
                kd_weights=kd_weights,
                divergence=_divergence_of(term),
                agreement=agreement,
                kept=None if found is None else found.places(),
                workspace=self._workspace,
            )

        with self._tap.open(run):
            yield

    def take(self, *, training: bool = True) -> HeadTerms | None:
        """What the last forward formed; None where an evaluation's forward did not run the head so.

        Raises:
            RuntimeError: a training's forward took another way to its logits than the one that was looked at.
        """
        assert self._tap is not None
        result: HeadTerms | None = self._tap.take()
        if result is None and training:
            raise RuntimeError(
                "The student's forward in training did not run its head on (batch, length, width), though it did in "
                "evaluation mode. Call the head by its forward in both modes."
            )
        return result


def _untried_sharding(student: nn.Module) -> str | None:
    """Why the weights of the head may not be gathered when what is formed with them needs it; FSDP2 is tried."""
    if is_deepspeed_zero3_enabled():  # takes weights back after the forward, and gradients as modules' backwards end
        return "DeepSpeed ZeRO-3 takes the head's weights away between its forward and its gradient"
    if isinstance(student, FullyShardedDataParallel):
        return "FSDP 1 holds the head's weights in a flat parameter (set version 2 in fsdp_config)"
    return None


def _match_reads_head(terms: ActiveTerms, tap: HeadTap | None, teacher: Any) -> bool:
    """Whether a match records what the heads give, of which there is one position only."""
    for match in terms.matches:
        sides = ((match.student, None if tap is None else tap.model), (match.teacher, teacher.model))
        for feature, model in sides:
            path = None if feature is None else feature.path
            if path is not None and model is not None and holds_head(model, path):
                return True
    return False


@contextmanager
def _beside_the_training() -> Iterator[None]:
    """Around a forward in the mode that the student is in, of which no random state tells."""
    with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        yield


def _is_of_one_item(policy: TemperaturePolicy) -> bool:
    """Whether an item's temperature is made of that item alone, without parameters."""
    return isinstance(policy, AdaptiveTemperature)


def _temperature_of(term: LogitTerm) -> Any:
    """As `chunked_head_loss` takes it."""
    policy = term.temperature
    if not isinstance(policy, TemperaturePolicy):
        return policy
    binary = LOSSES.get(term.loss).compares == "labels"
    return lambda student, teacher: policy(0.0, student, teacher, binary=binary)


def _divergence_of(term: LogitTerm) -> Divergence:
    scale: Any = term.teacher_scale  # a number by now
    return Divergence(
        LOSSES.get(term.loss),
        term.options,
        transform=standardize if term.transform == "standardize" else None,
        teacher_scale=scale,
        temperature_squared=term.temperature_squared,
    )
