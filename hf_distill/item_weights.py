"""How much each item of a batch weighs in the logit term."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.batches import Batch
from hf_distill.losses.base import compute_dtype
from hf_distill.losses.row_gradient import row_blocks, rows_per_block
from hf_distill.signals import Task
from hf_distill.targets import class_targets, has_class_targets
from hf_distill.weighting import (
    ITEM_GROUP,
    ITEM_WEIGHT,
    GroupWeights,
    ItemWeighting,
    TeacherWeights,
    batch_weight_columns,
    follows,
)


class ItemWeights:
    """The weights w >= 0 with which the logit term is sum(w * value) / sum(w); several multiply.

    Group weights that follow the loss are a function of the latest evaluation's metrics alone: give `update` the last
    logged ones, and a resumed run goes on as it was.

    Args:
        weights: the settings.
        task: what the heads predict.
        problem_type: Transformers' name of the kind of sequence classification.
        group_sizes: column -> {group: rows}, as `RowWeights` has them.

    Raises:
        ValueError: the teacher of this head shows no confidence, or is not right or wrong about an item; or two groups
            would be logged under one name.
    """

    def __init__(
        self,
        weights: Sequence[ItemWeighting],
        *,
        task: Task,
        problem_type: str = "single_label_classification",
        group_sizes: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        self.task, self.problem_type = task, problem_type
        self.columns = batch_weight_columns(weights)
        self._by_teacher = [setting for setting in weights if isinstance(setting, TeacherWeights)]
        for setting in self._by_teacher:
            self._check(setting)
        self._followed = next((s for s in weights if isinstance(s, GroupWeights) and follows(s)), None)
        self.group_names: dict[str, str] = {}
        if self._followed is not None:
            groups = self._followed.factors((group_sizes or {}).get(self._followed.column, {}))
            self.group_names = _log_names(tuple(groups), self._followed.column)
        self._table = torch.ones(len(self.group_names) + 1)  # the last is that of all other groups

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits make weights."""
        return bool(self._by_teacher)

    @property
    def is_plain(self) -> bool:
        """Whether every item weighs 1, always."""
        return not self.columns and not self.needs_teacher

    def __call__(self, batch: Batch, teacher_logits: Sequence[Tensor] | None = None) -> Tensor | None:
        """The weights, in the shape of `batch.items.kd`, float32, 0 beside the items; None where all weigh 1.

        Args:
            batch: with `columns` among its extras. Weights of tokens belong to the token that an item predicts: those
                of a causal model are shifted like its labels, also beside `shift_labels`.
            teacher_logits: (batch, ..., classes), with the student's classes, neither scaled nor transformed; one
                tensor, or two for question answering.

        Raises:
            ValueError: the batch lacks the weights, or they have other positions than its items.
        """
        if self.is_plain:
            return None
        if missing := sorted(self.columns - {*batch.extras}):
            raise ValueError(
                f"The batch holds no {' and no '.join(missing)}, of which items are weighed. Leave the trainer's own "
                "collator, DistillationCollator, around yours."
            )
        kd = batch.items.kd
        weights = torch.ones(kd.shape, device=kd.device)
        if ITEM_WEIGHT in self.columns:
            weights = weights * self._by_item(batch.extras[ITEM_WEIGHT], kd, beside=1.0)
        if ITEM_GROUP in self.columns:
            if self._table.device != kd.device:
                self._table = self._table.to(kd.device)
            weights = weights * self._table[self.groups(batch, kd)]
        for setting in self._by_teacher:
            if teacher_logits is None:
                raise ValueError("Weights by the teacher need its logits; pass teacher_logits.")
            weights = weights * self._of_teacher(setting, tuple(teacher_logits), batch)
        return torch.where(kd, weights, 0.0)

    def groups(self, batch: Batch, items: Tensor) -> Tensor:
        """The place of each item's group among `group_names`, or their number; int64 that broadcasts to the items.

        Args:
            batch: with `ITEM_GROUP` among its extras.
            items: (batch,) or (batch, length), such as a mask of them.
        """
        return self._by_item(batch.extras[ITEM_GROUP], items, beside=len(self.group_names))

    def update(self, metrics: Mapping[str, float], *, prefix: str = "eval") -> bool:
        """Takes the groups' losses from an evaluation's metrics, `<prefix>_loss_<group>`; whether there were any.

        A group without a loss weighs 1, the mean of those that have one.
        """
        if self._followed is None:
            return False
        named = {group: metrics.get(f"{prefix}_loss_{name}") for group, name in self.group_names.items()}
        # What is not finite says nothing; and no loss at all is the same for all.
        losses = {group: loss for group, loss in named.items() if loss is not None and 0 <= loss < float("inf")}
        if not losses:
            return False
        mean = sum(losses.values()) / len(losses)
        power = self._followed.power
        relative = {group: (loss / mean) ** power if mean else 1.0 for group, loss in losses.items()}
        table = [relative.get(group, 1.0) for group in self.group_names]
        self._table = torch.tensor([*table, 1.0], device=self._table.device)
        return True

    def replay(self, log_history: Sequence[Mapping[str, float]]) -> None:
        """The groups' weights as the latest evaluation of a training left them; 1 before the first."""
        self._table = torch.ones_like(self._table)
        for entry in reversed(log_history):
            if self.update(entry):
                return

    def factors(self) -> dict[str, float]:
        """The weight of each group that follows its loss; waits for the device."""
        return dict(zip(self.group_names, self._table.tolist(), strict=False))

    def describe(self) -> dict[str, float]:
        """The same for logs, `group_weight_<group>`; waits for the device."""
        return {f"group_weight_{self.group_names[group]}": weight for group, weight in self.factors().items()}

    def _check(self, setting: TeacherWeights) -> None:
        head = self.problem_type if self.task is Task.SEQUENCE_CLASSIFICATION else str(self.task)
        if head == "regression":
            raise ValueError(
                "Weights by the teacher need classes, and the heads predict plain numbers. Weigh by a column instead."
            )
        is_judged = has_class_targets(self.task, self.problem_type) or head == "multi_label_classification"
        if setting.signal == "correctness" and not is_judged:
            raise ValueError(
                f"signal='correctness' needs a label of each item, which {head} does not have. Take "
                "signal='confidence', or weigh rows by a column."
            )

    def _by_item(self, values: Tensor, kd: Tensor, *, beside: float) -> Tensor:
        """Values of rows or tokens in the shape of the items, or to be broadcast to it."""
        if values.dim() == 1 and len(values) == len(kd):
            return values.view(-1, *[1] * (kd.dim() - 1))
        if values.shape != kd.shape:
            raise ValueError(
                f"The weights have shape {tuple(values.shape)}, the items {tuple(kd.shape)}. Weights are one per row, "
                "or one per token of input_ids (of labels, in encoder-decoder models)."
            )
        return F.pad(values[:, 1:], (0, 1), value=beside) if self.task is Task.CAUSAL_LM else values

    def _of_teacher(self, setting: TeacherWeights, logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        is_labels = self.task is Task.SEQUENCE_CLASSIFICATION and self.problem_type == "multi_label_classification"
        mask = batch.student.get("attention_mask")
        if self.task is Task.QUESTION_ANSWERING and mask is not None:
            logits = tuple(each.masked_fill(~mask.bool(), -torch.inf) for each in logits)
        if setting.signal == "correctness":
            missed = self._missed_labels(logits[0], batch) if is_labels else self._missed(logits, batch)
            return torch.where(missed, setting.wrong, 1.0)
        if is_labels:
            confidence = torch.sigmoid(logits[0].float().abs()).mean(-1)
        else:
            confidence = torch.stack([largest_probability(each) for each in logits]).prod(0)
        weights = confidence**setting.power
        return torch.where(confidence < setting.threshold, 0.0, weights).float()

    def _missed(self, logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        targets = class_targets(batch, self.task, classes=logits[0].shape[-1])
        pairs = zip(logits, targets, strict=True)
        return torch.stack([(label >= 0) & (each.argmax(-1) != label) for each, label in pairs]).any(0)

    def _missed_labels(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels.get("labels")
        if labels is None:
            return torch.zeros_like(batch.items.kd)
        return batch.items.labelled & ((logits > 0) != (labels > 0.5)).any(-1)


def largest_probability(logits: Tensor) -> Tensor:
    """The largest probability of each softmax, (...,) float32 (float64 of float64), of logits (..., classes)."""
    dtype = compute_dtype(logits)
    rows = rows_per_block(logits, buffers=2, dtype=dtype)
    # exp(max - logsumexp), block by block: no copy of the logits in a wider dtype exists.
    parts = [
        (block.amax(-1).to(dtype) - block.to(dtype).logsumexp(-1)).exp() for (block,) in row_blocks((logits,), rows)
    ]
    return torch.cat(parts).view(logits.shape[:-1])


def _log_names(groups: Sequence[str], column: str) -> dict[str, str]:
    """The groups' names in keys of logs: words without spaces."""
    names = {group: re.sub(r"\W+", "_", group) for group in groups}
    for group, name in names.items():
        if same := [other for other, its in names.items() if its == name and other != group]:
            raise ValueError(
                f"The groups {group!r} and {same[0]!r} of {column!r} would both be logged as {name!r}. Rename one."
            )
    return names
