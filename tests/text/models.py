"""Small causal language models of several families for the tokenizer of `corpus`."""

from typing import Any

import torch
import transformers as hf

from tests.text.corpus import VOCABULARY


def _decoder(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }


def _gpt2(hidden: int, layers: int) -> Any:
    sizes = {"vocab_size": VOCABULARY, "n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **quiet, bos_token_id=1, eos_token_id=2))


def _opt(hidden: int, layers: int) -> Any:
    config = {**_decoder(hidden, layers), "ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden}
    return hf.OPTForCausalLM(hf.OPTConfig(**config))


def _falcon(hidden: int, layers: int) -> Any:
    return hf.FalconForCausalLM(hf.FalconConfig(**_decoder(hidden, layers)))


def _bloom(hidden: int, layers: int) -> Any:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=hidden, n_layer=layers, n_head=4))


def _lfm2(hidden: int, layers: int) -> Any:
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**_decoder(hidden, layers), full_attn_idxs=[layers - 1]))


def mixtral(hidden: int, layers: int) -> Any:
    """A model of experts, whose balance is part of its loss."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    torch.manual_seed(0)
    config = hf.MixtralConfig(**_decoder(hidden, layers), **experts, router_aux_loss_coef=0.1)
    return hf.MixtralForCausalLM(config)


_SLIDING = {"head_dim": 8, "sliding_window": 6}
# Those that keep packed texts apart, with windows shorter than their texts where they have any.
FAMILIES = {
    "llama": lambda h, n: hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder(h, n))),
    "qwen3": lambda h, n: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(h, n), head_dim=8)),
    "gemma2": lambda h, n: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_decoder(h, n), **_SLIDING)),
    "gemma3": lambda h, n: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_decoder(h, n), **_SLIDING)),
    "gpt2": _gpt2,
}
# Those that do not: positions counted on, a mask of their own, no position_ids, a convolution over all.
MIXING = {"opt": _opt, "falcon": _falcon, "bloom": _bloom, "lfm2": _lfm2}


def make(name: str, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Any:
    """A model of a family, far enough from its initial state that texts before others matter."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **MIXING}[name](hidden, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def pair(name: str) -> tuple[Any, Any]:
    """A student and a larger teacher of one family."""
    return make(name), make(name, seed=1, hidden=48, layers=3)
