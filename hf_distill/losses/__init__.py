"""Losses: tensors and numbers in, one float32 value per item out."""

from hf_distill.losses.base import LOSSES, LossSpec, masked_sum, register_loss
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.logits import binary_forward_kl, logit_mse

__all__ = ["LOSSES", "LossSpec", "binary_forward_kl", "forward_kl", "logit_mse", "masked_sum", "register_loss"]
