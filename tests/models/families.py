"""Tiny models of families that the rest of the suite does without, and batches for the inside of any of them."""

from typing import Any

import torch
import transformers as hf

from tests.tiny import CLASSES, VOCABULARY, ZOO, rows
from tests.training import batch_of

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {k: _TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}
_VISION_LANGUAGE = {
    "vision_config": hf.CLIPVisionConfig(**_IMAGE, image_size=16, patch_size=8),
    "text_config": hf.LlamaConfig(**{**_DECODER, "num_hidden_layers": 2}),
    "image_token_id": 3,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


# name -> (class of the model, class of its config, the config's arguments, the kind of its rows)
MORE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_TEXT, "embedding_size": 16}, "sequence"),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_TEXT, "embedding_size": 16}, "sequence"),
    "mobilebert": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {**_TEXT, "embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32},
        "sequence",
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_DECODER, "attn_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
        "causal",
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "sliding_window": 4}, "causal"),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_DECODER, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        "causal",
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 4}, "causal"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, "causal"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "dropout": 0.0},
        "causal",
    ),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**_IMAGE, "image_size": 16, "patch_size": 8}, "image"),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**_IMAGE, "image_size": 16, "patch_size": 8, "use_relative_position_bias": True},
        "image",
    ),
    # Without the interface: hidden states alone.
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _TEXT, "sequence"),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _TEXT, "sequence"),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", _TEXT, "sequence"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_TEXT, "state_size": 4}, "causal"),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4},
        "causal",
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2},
        "image",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
        "image",
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "image",
    ),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", _VISION_LANGUAGE, "causal"),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_DECODER, **_HYBRID}, "causal"),
}
WITHOUT_INTERFACE = ("deberta-v2", "mpnet", "fnet", "mamba", "bloom", "convnext")
WITHOUT_ONE_PER_LAYER = ("swin", "qwen3_next")
HIDDEN = [*ZOO, *MORE]
ATTENTION = [n for n in HIDDEN if n not in (*WITHOUT_INTERFACE, *WITHOUT_ONE_PER_LAYER, "segformer")]


def family(name: str) -> Any:
    """A model in eval mode whose weights, those of relative positions too, make attention far from uniform."""
    torch.manual_seed(0)
    if name in ZOO:
        model = ZOO[name][0](layers=3)
    else:
        cls, config, arguments, _ = MORE[name]
        model = getattr(hf, cls)(getattr(hf, config)(**arguments))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 or parameter_name.endswith("sinks"):
                parameter.normal_(std=1.2 * min(parameter.shape[-1], 32) ** -0.5)
    return model.eval()


def set_dropout(model: Any, probability: float) -> None:
    """The same dropout everywhere, on the modules that hold it as a number or as a layer."""
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout", "attention_probs_dropout_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def inputs(name: str, *, left: bool = False) -> dict[str, torch.Tensor]:
    """A padded batch for a family, with labels; `left` puts the padding before the text."""
    kind = ZOO[name][1] if name in ZOO else MORE[name][3]
    batch = batch_of(rows(kind, 3))
    if left:
        shift = (batch["attention_mask"] == 0).sum(-1)
        for key in ("input_ids", "attention_mask"):
            batch[key] = torch.stack([row.roll(int(n)) for row, n in zip(batch[key], shift, strict=True)])
    return batch


def real_tokens(batch: dict[str, torch.Tensor], stack: str | None, length: int) -> torch.Tensor | None:
    """(rows, length) bool, where a stack's positions are the tokens of `attention_mask`; None where they are not."""
    mask = batch.get("attention_mask")
    if mask is None or stack == "decoder" or mask.shape[-1] != length or "pixel_values" in batch:
        return None
    return mask.reshape(-1, length).bool()
