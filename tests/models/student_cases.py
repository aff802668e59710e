"""Teachers to build students from: the zoo's, and decoders whose layers differ by the config's lists."""

from typing import Any

import torch
import transformers as hf

from tests.tiny import VOCABULARY, ZOO, rows
from tests.training import batch_of

_DECODER = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _mixed(config: Any, model: Any, **options: Any) -> Any:
    def make(hidden: int = 32, layers: int = 4) -> Any:
        return model(
            config(**_DECODER, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, **options)
        )

    return make


WINDOW = {"head_dim": 8, "sliding_window": 3}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CASES = {
    **{name: ZOO[name] for name in ("bert", "roberta", "distilbert", "modernbert", "llama", "qwen3", "gpt2")},
    **{name: ZOO[name] for name in ("t5", "bart", "whisper", "vit", "wav2vec2-ctc", "bert-masked")},
    "gemma2": (_mixed(hf.Gemma2Config, hf.Gemma2ForCausalLM, **WINDOW, layer_types=KINDS), "causal"),
    "gemma3": (_mixed(hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, **WINDOW, layer_types=KINDS), "causal"),
    "smollm3": (_mixed(hf.SmolLM3Config, hf.SmolLM3ForCausalLM, no_rope_layers=[1, 0, 1, 0]), "causal"),
    "phi3": (_mixed(hf.Phi3Config, hf.Phi3ForCausalLM), "causal"),
}


def teacher_of(name: str, *, seed: int = 0, layers: int = 4) -> Any:
    """A teacher of 32 features, 4 heads and large enough weights that every one of them shows in the outputs."""
    torch.manual_seed(seed)
    teacher = CASES[name][0](hidden=32, layers=layers).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    batch = batch_of(rows(CASES[name][1], 3))
    return {**batch, "use_cache": False} if "pixel_values" not in batch and "input_values" not in batch else batch


@torch.no_grad()
def logits_of(model: Any, name: str) -> torch.Tensor:
    return model.eval()(**inputs_of(name)).logits
