"""Losses: tensors and numbers in, one float32 value per item out."""

from hf_distill.losses import batch_relations, domain  # what is imported here is registered
from hf_distill.losses.attentions import attention_kl, attention_mse, attention_probs_mse
from hf_distill.losses.base import LOSSES, LossSpec, Reference, masked_sum, register_loss
from hf_distill.losses.both_directions import adaptive_kl, symmetric_kl
from hf_distill.losses.correlations import dist
from hf_distill.losses.cross_entropies import soft_bce, soft_cross_entropy
from hf_distill.losses.cross_vocabulary import uld
from hf_distill.losses.decoupled import dkd, nkd
from hf_distill.losses.distances import squared_hellinger, tvd
from hf_distill.losses.divergence import forward_kl, reverse_kl
from hf_distill.losses.hidden_states import (
    hidden_cosine,
    hidden_hint,
    hidden_kl,
    hidden_mse,
    hidden_normalized_mse,
)
from hf_distill.losses.logits import binary_forward_kl, centered_logit_mse, logit_cosine, logit_mse
from hf_distill.losses.mixtures import generalized_jsd, jsd, skewed_kl, skewed_reverse_kl
from hf_distill.losses.ranking import listnet, margin_mse, pairwise_ranking
from hf_distill.losses.relations import minilm_values, minilmv2_relations
from hf_distill.losses.top_k import top_k_kl
from hf_distill.losses.transforms import standardize
from hf_distill.losses.word_relations import ckd_angles, ckd_pairs

__all__ = [
    "LOSSES",
    "LossSpec",
    "Reference",
    "adaptive_kl",
    "attention_kl",
    "attention_mse",
    "attention_probs_mse",
    "batch_relations",
    "binary_forward_kl",
    "centered_logit_mse",
    "ckd_angles",
    "ckd_pairs",
    "dist",
    "dkd",
    "domain",
    "forward_kl",
    "generalized_jsd",
    "hidden_cosine",
    "hidden_hint",
    "hidden_kl",
    "hidden_mse",
    "hidden_normalized_mse",
    "jsd",
    "listnet",
    "logit_cosine",
    "logit_mse",
    "margin_mse",
    "masked_sum",
    "minilm_values",
    "minilmv2_relations",
    "nkd",
    "pairwise_ranking",
    "register_loss",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "soft_bce",
    "soft_cross_entropy",
    "squared_hellinger",
    "standardize",
    "symmetric_kl",
    "top_k_kl",
    "tvd",
    "uld",
]
