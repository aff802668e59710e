"""Distillation as tutorials and blogs write it: the rival that most people have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer


class NaiveDistillationTrainer(Trainer):
    """The model's own loss plus `kl_div(log_softmax, softmax, reduction="batchmean")` times T², under autograd.

    Logits of sequences are flattened to (positions, classes) first, padding included, as such code does.
    """

    def __init__(
        self, *, model: PreTrainedModel, teacher: PreTrainedModel, temperature: float, kd_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(model=model, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.kd_weight = kd_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mixed loss of one micro-batch, as a mean over that micro-batch."""
        outputs = model(**inputs)
        # Encoder-decoder teachers take their decoder inputs from the labels; others would only compute a loss more.
        decodes = self.teacher.config.is_encoder_decoder
        teacher_inputs = {name: value for name, value in inputs.items() if decodes or name != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher(**teacher_inputs).logits
        classes = teacher_logits.shape[-1]
        divergence = functional.kl_div(
            functional.log_softmax(outputs.logits.reshape(-1, classes) / self.temperature, dim=-1),
            functional.softmax(teacher_logits.reshape(-1, classes) / self.temperature, dim=-1),
            reduction="batchmean",
        )
        loss = (1 - self.kd_weight) * outputs.loss + self.kd_weight * self.temperature**2 * divergence
        return (loss, outputs) if return_outputs else loss
