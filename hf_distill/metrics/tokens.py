"""What language-model metrics keep of the logits: two numbers a token in place of the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.metrics.scores import IGNORED_LABEL


def token_predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each position's likeliest token and the negative log-likelihood of its label, 0 where it has none.

    The `preprocess_logits_for_metrics` of models whose logits stand at the position of their label (masked, seq2seq).

    Args:
        logits: (rows, tokens, vocabulary), any float dtype; of a tuple, the first.
        labels: (rows, tokens), -100 where there is none.

    Returns: (rows, tokens) int64 and (rows, tokens) float32, in nats.
    """
    scores = logits[0] if isinstance(logits, tuple | list) else logits
    if scores.shape[:2] != labels.shape:
        raise ValueError(
            f"Logits over (rows, tokens) {tuple(scores.shape[:2])} do not match labels {tuple(labels.shape)}. "
            "Metrics for a language model need the logits of every position of the labels."
        )
    # Row by row: a float32 copy of all logits would double the memory that this function is there to save.
    nll = torch.stack(
        [
            F.cross_entropy(row.float(), row_labels, ignore_index=IGNORED_LABEL, reduction="none")
            for row, row_labels in zip(scores, labels, strict=True)
        ]
    )
    return scores.argmax(dim=-1), nll


def next_token_predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_predictions`, where the logits at t predict the label at t + 1 (causal models).

    Results stand at the position of their label, so position 0, which nothing predicts, holds -100 and 0.
    """
    scores = logits[0] if isinstance(logits, tuple | list) else logits
    tokens, nll = token_predictions(scores[:, :-1], labels[:, 1:])
    return F.pad(tokens, (1, 0), value=IGNORED_LABEL), F.pad(nll, (1, 0))
