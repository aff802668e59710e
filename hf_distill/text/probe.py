"""Whether a model keeps the texts of one row apart: tried, since no config says so."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.models.heads import input_names, task_model
from hf_distill.signals import Task, read_logits
from hf_distill.teachers.local import in_eval_mode

Row = dict[str, list[int]]
_LENGTHS = ((7, 5), (6, 3))  # of two made-up texts in each of two rows
# Of the spread of the logits, by dtype. A text in another place of a batch is computed by other kernels, which round
# otherwise; with another text before it, but in the same place, it is computed by the same ones.
_ELSEWHERE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2}
_IN_PLACE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-4}
_BFLOAT16 = (5e-2, 1e-3)


def check_keeps_apart(
    model: nn.Module,
    collator: Callable[[list[Row]], dict[str, Tensor]],
    *,
    role: str,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuses a model that mixes the texts of a row, or counts their positions on.

    Short made-up texts go through the model alone, and together as the collator lays them out; then with others before
    them. Their logits must stay the same. The model computes in evaluation mode, without a graph, and is left as it
    was.

    Args:
        model: a causal language model.
        collator: makes batches of packed rows.
        role: of the model, for the error.
        autocast: a factory of the context its forward runs in.
        dtype: in which it computes there; None is its own.

    Raises:
        ValueError: with what to turn off.
    """
    name = f"The {role} ({type(task_model(model)).__name__})"
    off = "Set packing=False and padding_free=False: batches are then padded, one text a row."
    if "position_ids" not in input_names(model):
        raise ValueError(
            f"{name} takes no position_ids, by which packing and padding_free tell the texts of one row apart. {off}"
        )
    vocabulary = task_model(model).config.get_text_config(decoder=True).vocab_size
    rows = _made_up(vocabulary)
    others = [[[(token + 1) % vocabulary for token in first], second] for first, second in rows]
    with in_eval_mode(model), torch.no_grad(), autocast():
        apart = torch.cat([_logits(model, [{"input_ids": ids}], _alone) for row in rows for ids in row])
        together, behind_others = (_logits(model, [*map(_packed, texts)], collator) for texts in (rows, others))
    second = torch.cat([torch.arange(sum(row)) >= row[0] for row in _LENGTHS])
    spread = apart.std(0).square().mean().sqrt()
    moved = (together - apart).square().mean().sqrt() / spread
    leaked = (behind_others - together)[second].square().mean().sqrt() / spread
    dtype = dtype or next(model.parameters()).dtype
    allowed = (_ELSEWHERE.get(dtype, _BFLOAT16[0]), _IN_PLACE.get(dtype, _BFLOAT16[1]))
    if moved <= allowed[0] and leaked <= allowed[1]:  # and neither is NaN
        return
    flash = "flash" in str(getattr(task_model(model).config, "_attn_implementation", ""))
    hint = "Flash attention needs padding_free=True beside packing. " if flash else ""
    raise ValueError(
        f"{name} mixes the texts that packing and padding_free put into one row: its logits differ from those of each "
        f"text alone by {float(moved):.1e} of their spread (allowed: {allowed[0]:.0e}), and by {float(leaked):.1e} "
        f"with another text before it (allowed: {allowed[1]:.0e}). {hint}{off}"
    )


def _made_up(vocabulary: int) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randint(vocabulary, (length,), generator=generator).tolist() for length in row] for row in _LENGTHS]


def _packed(texts: list[list[int]]) -> Row:
    ids = [token for text in texts for token in text]
    return {"input_ids": ids, "labels": ids, "position_ids": [place for text in texts for place in range(len(text))]}


def _alone(rows: list[Row]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def _logits(model: Any, rows: list[Row], collator: Callable[[list[Row]], dict[str, Tensor]]) -> Tensor:
    """(tokens, vocabulary): the logits of the rows' own tokens."""
    batch = collator(rows)
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    # A cache of keys keeps Transformers (5.23) from looking for texts in position_ids; no training step has one.
    if "use_cache" in input_names(model):
        inputs["use_cache"] = False
    (logits,) = read_logits(Task.CAUSAL_LM, model(**inputs))
    length = batch["input_ids"].shape[1]
    if logits.shape[1] != length:
        raise ValueError(
            f"{type(model).__name__} gives {logits.shape[1]} positions for {length} tokens, as with virtual tokens "
            "(prompt tuning), which packed texts would share. Set packing=False and padding_free=False."
        )
    real = torch.ones(length, dtype=torch.bool)
    if len(logits) > 1:
        real = torch.cat([torch.arange(length) < len(row["input_ids"]) for row in rows])
    logits = logits.detach().flatten(0, 1).cpu()[real]
    return logits if logits.dtype == torch.float64 else logits.float()
