"""The items of one batch's matches: which tokens and sequences count, and how many there are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.items import Items, batch_size, device_of
from hf_distill.matching.masks import BATCH_MASK, first_position, real_positions, without_special
from hf_distill.matching.plan import Unit


class BatchMasks:
    """The masks of one batch, each made once.

    Args:
        student: the student.
        inputs: what it reads, labels included.
        items: the batch's items of the task and the logit term.
        extras: the batch's columns that only matches read.
        special_tokens: (any,) ids of special tokens, or None where no tokenizer names them.
    """

    def __init__(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        items: Items,
        extras: Mapping[str, Tensor],
        special_tokens: Tensor | None = None,
    ) -> None:
        self._student, self._inputs, self._items = student, inputs, items
        self.extras, self._special = extras, special_tokens
        self._made: dict[tuple[str, str | None, int | None], Tensor | None] = {}

    def real(self, stack: str | None) -> Tensor | None:
        """(sequences, length) bool: real positions, whatever row they are in; None where there is no padding."""
        key = ("real", stack, None)
        if key not in self._made:
            self._made[key] = real_positions(self._student, self._inputs, stack)
        return self._made[key]

    def tokens(self, unit: Unit, length: int | None = None) -> Tensor | None:
        """(sequences, length) bool: the positions that enter a match.

        Args:
            unit: the match's unit over the stack.
            length: how many positions the features have; without it inputs without padding give None.
        """
        real = self.real(unit.stack)
        if real is None and length is None:
            return None
        # Layers that merge patches have other lengths than those before them.
        key = (unit.mask, unit.stack, length if real is None else None)
        if key not in self._made:
            if real is None:
                sequences = batch_size(self._inputs)
                real = torch.ones(sequences, length or 0, dtype=torch.bool, device=device_of(self._inputs))
            self._made[key] = self._chosen(real, unit.mask, unit.stack)
        return self._made[key]

    def pooled(self, unit: Unit, length: int) -> Tensor | None:
        """(sequences, length) bool: the positions of which a pooled feature is made; None where all are."""
        return self.real(unit.stack) if unit.mask == "tokens" else self.tokens(unit, length)

    def _chosen(self, real: Tensor, mask: str, stack: str | None) -> Tensor:
        if self._items.rows is not None:
            real = real & _repeated(self._items.rows, len(real))[:, None]
        if mask == "cls":
            return first_position(real)
        if mask == "content":
            return without_special(real, self._inputs.get("input_ids"), self._special)
        if mask == "task":
            if stack == "encoder":
                raise ValueError(
                    'mask: "task" chooses among the decoder\'s positions. Write decoder. before the reference.'
                )
            own = self._items.kd
        elif mask.startswith(BATCH_MASK):
            own = self._column(mask.removeprefix(BATCH_MASK)).bool().flatten(0, -2)  # of several choices, if there are
        else:
            return real
        if own.shape != real.shape:
            raise ValueError(
                f"mask: {mask!r} has shape {tuple(own.shape)}, the positions {tuple(real.shape)}. It must say of "
                "every position whether it counts."
            )
        return real & own

    def _column(self, name: str) -> Tensor:
        if name not in self.extras and name not in self._inputs:
            raise ValueError(
                f"The batch has no column {name!r}, which a match reads. Add it to every row; a collator of your own "
                "must pass it on."
            )
        return self.extras[name] if name in self.extras else self._inputs[name]  # a model may read it too

    def domain(self, name: str, sequences: int) -> Tensor:
        """(sequences,) bool: the rows of the target domain."""
        return _repeated(self._column(name).reshape(-1).bool(), sequences)

    def sequences(self, unit: Unit, count: int | None = None) -> Tensor:
        """(sequences,) bool: those with at least one position that counts."""
        tokens = self.tokens(unit)
        if tokens is not None:
            return tokens.any(-1)
        count = batch_size(self._inputs) if count is None else count
        if self._items.rows is not None:
            return _repeated(self._items.rows, count)
        return torch.ones(count, dtype=torch.bool, device=device_of(self._inputs))

    def count(self, unit: Unit) -> Tensor:
        """How many items of a unit the batch has: scalar int64."""
        if unit.kind == "sequences":
            return self.sequences(unit).sum()
        tokens = self.tokens(unit)
        assert tokens is not None, "a unit without padding counts sequences"
        return per_sequence(unit, tokens).sum()

    def counts(self, units: tuple[Unit, ...]) -> list[Tensor]:
        """The counts of several units."""
        return [self.count(unit) for unit in units]


def per_sequence(unit: Unit, tokens: Tensor, *, item: str | None = None, causal: bool = False) -> Tensor:
    """(sequences,) int64: the items of each sequence.

    Args:
        unit: whose items they are.
        tokens: (sequences, length) bool.
        item: the loss's item, for a unit of sequences, whose own items are not the unit's.
        causal: likewise, whether its pairs are causal.
    """
    lengths = tokens.sum(-1)
    pairs = unit.kind in ("pairs", "causal_pairs") or item == "pair"
    if not pairs:
        return lengths
    return lengths * (lengths + 1) // 2 if causal or unit.kind == "causal_pairs" else lengths * lengths


def _repeated(rows: Tensor, sequences: int) -> Tensor:
    """A value per row as one per sequence: a row of several choices is several sequences."""
    return rows.repeat_interleave(sequences // max(len(rows), 1)) if len(rows) != sequences else rows
