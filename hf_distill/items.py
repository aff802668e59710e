"""Which items of a batch enter the terms, read from the inputs alone: so they can be counted before any forward."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_distill.signals import Task

IGNORE_INDEX = -100
# (batch,) bool, put into a batch by `DistillationCollator` only if a row of it has no label. Whether the key is
# there is known on the host, so nothing is read back from the device to choose a path.
LABEL_MASK = "label_mask"
# (batch,) bool, put by the trainer into a batch that repeats rows because the ranks did not come out even.
ROW_MASK = "row_mask"
# Whole numbers, put by a collator that makes one row of all: how long each was.
ROW_LENGTHS = "row_lengths"


@dataclass(frozen=True)
class Items:
    """The items of one batch, as boolean masks.

    Attributes:
        task: one mask per target of the task loss: (batch,) or (batch, length), in the layout of the logits. Question
            answering has two, for the start and the end; every other task one.
        kd: what the teacher teaches: (batch,) or (batch, length) in the layout of the logits.
        labelled: (batch,), the rows that have a label.
        rows: (batch,), the rows that count; None for all.
        texts: (batch, 2) int64, of rows packed of several texts: those with a label, and all; else None.
    """

    task: tuple[Tensor, ...]
    kd: Tensor
    labelled: Tensor
    rows: Tensor | None = None
    texts: Tensor | None = None

    def counts(self) -> Tensor:
        """(5,) int64: task items, items of a second task target, KD items, labelled rows, rows; texts where packed."""
        rows = torch.ones_like(self.labelled) if self.rows is None else self.rows
        task = [mask.sum() for mask in self.task]
        numbers = (self.labelled.sum(), rows.sum()) if self.texts is None else self.texts.sum(0).unbind()
        return torch.stack([task[0], task[-1], self.kd.sum(), *numbers])

    def of_rows(self, rows: Tensor) -> "Items":
        """The same items without those of rows where `rows` (batch,) is False."""

        def keep(mask: Tensor) -> Tensor:
            return mask & rows.view(-1, *[1] * (mask.dim() - 1))

        texts = None if self.texts is None else torch.where(rows[:, None], self.texts, 0)
        return Items(tuple(keep(mask) for mask in self.task), keep(self.kd), keep(self.labelled), rows, texts)


def batch_size(inputs: Mapping[str, Tensor]) -> int:
    """Rows in a batch, from its first tensor."""
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0)


def device_of(inputs: Mapping[str, Tensor]) -> torch.device:
    """The device of a batch's first tensor."""
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def find_items(
    task: Task,
    inputs: Mapping[str, Tensor],
    *,
    frames: Tensor | None = None,
    special_tokens: Tensor | None = None,
) -> Items:
    """The items of a batch.

    Args:
        task: what the student's head predicts.
        inputs: the student's inputs with their labels, and `LABEL_MASK` where the collator put one.
        frames: (batch, frames) bool, for CTC alone: the output frames that hold sound.
        special_tokens: (any,) ids that no label-free position may have (separators, padding).

    Returns: masks; rows without any label keep their KD items, except in language models, whose targets say which
        positions are meant. A causal model's position i predicts token i+1, so its masks are shifted, and the last
        position is never an item.

    Raises:
        ValueError: a sequence-to-sequence batch without labels, whose decoder would have nothing to read.
    """
    keep = inputs.get(LABEL_MASK)
    if task is Task.QUESTION_ANSWERING:
        items = _span_items(inputs)
    elif task is Task.CTC:
        if frames is None:
            raise ValueError("CTC items need the mask of the output frames; pass frames=frame_mask(model, inputs).")
        labelled = _any_label(inputs, inputs.get("labels"))
        items = Items((labelled,), frames, labelled)
    elif task.one_item_per_row:
        labelled = _row_labelled(inputs)
        items = Items((labelled,), torch.ones_like(labelled), labelled)
    else:
        items = _position_items(task, inputs, special_tokens)
    if keep is None:
        return items
    kept = items.of_rows(keep)
    return Items(kept.task, items.kd, kept.labelled, texts=items.texts)


def _none(inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(batch_size(inputs), dtype=torch.bool, device=device_of(inputs))


def _any_label(inputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    return _none(inputs) if labels is None else (labels >= 0).flatten(1).any(-1)


def _row_labelled(inputs: Mapping[str, Tensor]) -> Tensor:
    labels = inputs.get("labels")
    if labels is None:
        return _none(inputs)
    labels = labels.reshape(len(labels), -1)
    if labels.is_floating_point():
        return ~(labels.isnan() | (labels == IGNORE_INDEX)).any(-1)
    return (labels != IGNORE_INDEX).any(-1)


def _span_items(inputs: Mapping[str, Tensor]) -> Items:
    starts, ends = inputs.get("start_positions"), inputs.get("end_positions")
    rows = torch.ones_like(_none(inputs))
    if starts is None or ends is None:
        return Items((~rows, ~rows), rows, ~rows)
    length = inputs["input_ids"].shape[-1] if "input_ids" in inputs else inputs["inputs_embeds"].shape[1]
    # As in Transformers' heads, an answer beyond the (truncated) input is no target. Unlike there a negative position
    # is none either: they clamp it to 0, which teaches "no answer".
    valid = [(position.flatten() >= 0) & (position.flatten() < length) for position in (starts, ends)]
    return Items((valid[0], valid[1]), rows, valid[0] | valid[1])


def _position_items(task: Task, inputs: Mapping[str, Tensor], special_tokens: Tensor | None) -> Items:
    shifts = task is Task.CAUSAL_LM
    labels = inputs.get("shift_labels") if shifts else None
    if labels is not None:
        shifts = False
    else:
        labels = inputs.get("labels")
    if labels is None:
        kd = _content(task, inputs, special_tokens)
        return Items((torch.zeros_like(kd),), kd, _none(inputs))
    mask = labels != IGNORE_INDEX
    if shifts:
        mask = torch.nn.functional.pad(mask[..., 1:], (0, 1), value=False)
    labelled = mask.flatten(1).any(-1)
    kd = mask
    if task is Task.TOKEN_CLASSIFICATION:
        kd = torch.where(labelled[:, None], mask, _content(task, inputs, special_tokens))
    return Items((mask,), kd, labelled, texts=_texts(inputs, mask) if task is Task.CAUSAL_LM else None)


def _texts(inputs: Mapping[str, Tensor], items: Tensor) -> Tensor | None:
    """(batch, 2) int64: how many texts of each row have an item, and how many it has; None where it is one."""
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs or positions.shape != items.shape:
        return None
    starts = positions == positions.amin(-1, keepdim=True)  # not all count from 0
    found = torch.zeros_like(positions).scatter_add(1, (starts.cumsum(-1) - 1).clamp(min=0), items.long())
    return torch.stack([(found > 0).sum(-1), starts.sum(-1)], -1)


def _content(task: Task, inputs: Mapping[str, Tensor], special_tokens: Tensor | None) -> Tensor:
    """(batch, length): real, ordinary positions; for a causal model those whose next token is real too."""
    if task is Task.SEQ2SEQ_LM:
        mask = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs:
            raise ValueError(
                "A sequence-to-sequence batch has neither labels nor decoder_input_ids, so its decoder has nothing to "
                "read. Give each row labels; `generate` with the teacher makes some for unlabelled text."
            )
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    tokens = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        if tokens is None:
            raise ValueError("A batch without labels needs input_ids or a 2-D attention_mask to tell its positions.")
        mask = torch.ones_like(tokens)
    mask = mask.bool()
    if task is Task.CAUSAL_LM:
        return torch.nn.functional.pad(mask[:, 1:] & mask[:, :-1], (0, 1), value=False)
    if tokens is not None and special_tokens is not None:
        mask = mask & ~torch.isin(tokens, special_tokens)
    return mask
