"""Losses: tensors and numbers in, one float32 value per item out."""

from hf_distill.losses import batch_relations, domain  # what is imported here is registered
from hf_distill.losses.attentions import attention_kl, attention_mse, attention_probs_mse
from hf_distill.losses.base import LOSSES, LossSpec, Reference, masked_sum, register_loss
from hf_distill.losses.divergence import forward_kl
from hf_distill.losses.hidden_states import hidden_cosine, hidden_hint, hidden_mse, hidden_normalized_mse
from hf_distill.losses.logits import binary_forward_kl, logit_mse
from hf_distill.losses.relations import minilm_values, minilmv2_relations
from hf_distill.losses.word_relations import ckd_angles, ckd_pairs

__all__ = [
    "LOSSES",
    "LossSpec",
    "Reference",
    "attention_kl",
    "attention_mse",
    "attention_probs_mse",
    "batch_relations",
    "binary_forward_kl",
    "ckd_angles",
    "ckd_pairs",
    "domain",
    "forward_kl",
    "hidden_cosine",
    "hidden_hint",
    "hidden_mse",
    "hidden_normalized_mse",
    "logit_mse",
    "masked_sum",
    "minilm_values",
    "minilmv2_relations",
    "register_loss",
]
