"""The models of the exactness benchmark: tiny, from configurations, without dropout or network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.exactness.rows import LABELS, LENGTH, PADDED_LENGTH, REAL_LENGTHS, ROWS, VOCABULARY, Row, collate

WIDTH, HEADS = 32, 4
OPINION = 1.0  # standard deviation of a teacher's logits


@dataclass(frozen=True)
class Case:
    """One model and head, with the task that decides what its rows look like."""

    name: str
    task: str
    model_class: str
    config_class: str
    sizes: Callable[[int], dict[str, Any]]

    @property
    def pads(self) -> bool:
        """Whether rows of this task have a length that padding can change."""
        return self.task != "image"

    def build(self, *, layers: int, seed: int) -> PreTrainedModel:
        """A model with its own configuration object, random weights from `seed`, and every dropout at 0."""
        config: PreTrainedConfig = getattr(transformers, self.config_class)(**self.sizes(layers))
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        transformers.set_seed(seed)
        return getattr(transformers, self.model_class)(config)

    def build_teacher(self, *, layers: int, seed: int) -> PreTrainedModel:
        """A model with opinions: fresh ones are nearly uniform, and the distillation term would be lost in noise."""
        teacher = self.build(layers=layers, seed=seed).eval()
        batch = collate(self.rows())
        with torch.no_grad():
            while teacher(**batch).logits.std() < OPINION:
                for parameter in teacher.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(1.5)
        return teacher

    def rows(self, *, padded: bool = False) -> list[Row]:
        """The same eight rows at either length; only padding differs."""
        length = PADDED_LENGTH if padded else LENGTH
        return [ROWS[self.task](index, length) for index in range(len(REAL_LENGTHS))]


def _encoder(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH, "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": LABELS,
    }  # fmt: skip


def _modernbert(layers: int) -> dict[str, Any]:
    special = {name: 2 for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")}
    return _encoder(layers) | special | {"local_attention": 8}


def _distilbert(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": layers, "n_heads": HEADS, "hidden_dim": 2 * WIDTH,
        "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": LABELS,
    }  # fmt: skip


def _llama(layers: int) -> dict[str, Any]:
    special = {"bos_token_id": 0, "eos_token_id": 2}
    return _encoder(layers) | special | {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS}


def _gpt2(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": layers, "n_head": HEADS, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


def _t5(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": layers, "num_decoder_layers": layers,
        "num_heads": HEADS, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "pad_token_id": 1,
        "decoder_start_token_id": 1,
    }  # fmt: skip


def _seq2seq(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }  # fmt: skip


def _bart(layers: int) -> dict[str, Any]:
    return _seq2seq(layers) | {"max_position_embeddings": 64, "forced_eos_token_id": None}


def _whisper(layers: int) -> dict[str, Any]:
    return _seq2seq(layers) | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}


def _vit(layers: int) -> dict[str, Any]:
    return _encoder(layers) | {"image_size": 16, "patch_size": 8}


def _wav2vec2(layers: int) -> dict[str, Any]:
    return _encoder(layers) | {
        # Layer norm in the feature extractor: with group norm the padded length is part of the model's function.
        "feat_extract_norm": "layer", "do_stable_layer_norm": True, "apply_spec_augment": False,
        "conv_dim": (16, 16, 16), "conv_stride": (4, 2, 2), "conv_kernel": (8, 3, 3),
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "ctc_loss_reduction": "mean",
        "classifier_proj_size": WIDTH,
    }  # fmt: skip


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("BERT sequence classification", "sequence", "BertForSequenceClassification", "BertConfig", _encoder),
        Case("BERT token classification", "token", "BertForTokenClassification", "BertConfig", _encoder),
        Case("BERT masked LM", "masked_lm", "BertForMaskedLM", "BertConfig", _encoder),
        Case("RoBERTa", "sequence", "RobertaForSequenceClassification", "RobertaConfig", _encoder),
        Case("DistilBERT", "sequence", "DistilBertForSequenceClassification", "DistilBertConfig", _distilbert),
        Case("ModernBERT", "sequence", "ModernBertForSequenceClassification", "ModernBertConfig", _modernbert),
        Case("Llama", "causal_lm", "LlamaForCausalLM", "LlamaConfig", _llama),
        Case("Qwen3", "causal_lm", "Qwen3ForCausalLM", "Qwen3Config", _llama),
        Case("GPT-2", "causal_lm", "GPT2LMHeadModel", "GPT2Config", _gpt2),
        Case("T5", "translation", "T5ForConditionalGeneration", "T5Config", _t5),
        Case("BART", "translation", "BartForConditionalGeneration", "BartConfig", _bart),
        Case("ViT", "image", "ViTForImageClassification", "ViTConfig", _vit),
        Case("Wav2Vec2 classification", "audio", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _wav2vec2),
        Case("Wav2Vec2 CTC", "ctc", "Wav2Vec2ForCTC", "Wav2Vec2Config", _wav2vec2),
        Case("Whisper", "speech", "WhisperForConditionalGeneration", "WhisperConfig", _whisper),
    )
}
