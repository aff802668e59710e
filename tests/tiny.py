"""Tiny real models and batches, from configs: no network, dropout off unless asked for."""

from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers as hf

VOCABULARY = 97
CLASSES = 3


def _encoder(hidden: int, layers: int, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "num_labels": CLASSES,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def bert(head: str = "SequenceClassification", hidden: int = 32, layers: int = 2, **config: Any) -> Any:
    options = {**_encoder(hidden, layers), "max_position_embeddings": 64, "num_labels": CLASSES, **config}
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**options))


def roberta(hidden: int = 32, layers: int = 2) -> Any:
    config = hf.RobertaConfig(**_encoder(hidden, layers), max_position_embeddings=66, pad_token_id=1)
    return hf.RobertaForSequenceClassification(config)


def distilbert(hidden: int = 32, layers: int = 2) -> Any:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=hidden,
            n_layers=layers,
            n_heads=4,
            hidden_dim=2 * hidden,
            max_position_embeddings=64,
            num_labels=CLASSES,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


def modernbert(hidden: int = 32, layers: int = 2) -> Any:
    return hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
            num_labels=CLASSES,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    )


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


def llama(hidden: int = 32, layers: int = 2, **config: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_decoder(hidden, layers), **config}))


def qwen3(hidden: int = 32, layers: int = 2) -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(hidden, layers), head_dim=hidden // 4))


def mixtral(hidden: int = 32, layers: int = 2) -> Any:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **_decoder(hidden, layers),
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
        )
    )


def gpt2(hidden: int = 32, layers: int = 2) -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def t5(hidden: int = 32, layers: int = 2) -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=hidden,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=4,
            d_kv=hidden // 4,
            d_ff=2 * hidden,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _seq2seq(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": hidden,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * hidden,
        "decoder_ffn_dim": 2 * hidden,
        "dropout": 0.0,
    }


def bart(hidden: int = 32, layers: int = 2) -> Any:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            **_seq2seq(hidden, layers),
            max_position_embeddings=64,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )


def whisper(hidden: int = 32, layers: int = 2) -> Any:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_seq2seq(hidden, layers),
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def vit(hidden: int = 32, layers: int = 2) -> Any:
    config = _encoder(hidden, layers)
    del config["vocab_size"]
    return hf.ViTForImageClassification(hf.ViTConfig(**config, image_size=16, patch_size=8))


def wav2vec2(head: str = "CTC", hidden: int = 32, layers: int = 2, reduction: str = "mean") -> Any:
    config = {**_encoder(hidden, layers), "vocab_size": 20, "attention_dropout": 0.0, "final_dropout": 0.0}
    del config["attention_probs_dropout_prob"], config["hidden_dropout_prob"]
    return getattr(hf, f"Wav2Vec2For{head}")(
        hf.Wav2Vec2Config(
            **config,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            ctc_loss_reduction=reduction,
            ctc_zero_infinity=True,
            feat_extract_norm="layer",
            classifier_proj_size=8,
        )
    )


def tokenizer(words: list[str] | None = None, **options: Any) -> Any:
    """A word-level tokenizer; its ids 0 to 4 are [PAD] [UNK] [CLS] [SEP] [MASK], then come the words."""
    words = [f"w{i}" for i in range(VOCABULARY - 5)] if words is None else words
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def _text_row(i: int, generator: torch.Generator, length: int) -> dict[str, Any]:
    real = 4 + (3 * i) % (length - 3)
    tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
    mask = (torch.arange(length) < real).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def rows(kind: str, count: int = 8, *, length: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows of ready tensors for a kind of head; lengths differ from row to row, padded to `length`."""
    generator = torch.Generator().manual_seed(seed)

    def some(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def row(i: int) -> dict[str, Any]:
        if kind == "image":
            return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": some(CLASSES)}
        if kind in ("speech", "sound"):
            samples = 100 + 10 * i
            mask = (torch.arange(180 + length) < samples).long()
            values = torch.randn(180 + length, generator=generator) * mask
            labels = some(20, 4, low=1)
            labels[2 + i % 3 :] = -100
            return {
                "input_values": values,
                "attention_mask": mask,
                "labels": labels if kind == "speech" else some(CLASSES),
            }
        targets = some(VOCABULARY, 7, low=3)
        targets[3 + i % 4 :] = -100
        if kind == "features":
            return {"input_features": torch.randn(8, 32, generator=generator), "labels": targets}
        text = _text_row(i, generator, length)
        tokens, mask = text["input_ids"], text["attention_mask"].bool()
        if kind == "choices":
            choices = [text, _text_row(i + 1, generator, length), _text_row(i + 2, generator, length)]
            return {**{k: torch.stack([c[k] for c in choices]) for k in text}, "labels": some(CLASSES)}
        if kind == "spans":
            start = some(3)
            return {**text, "start_positions": start, "end_positions": start + some(2)}
        labels = {
            "sequence": lambda: some(CLASSES),
            "multi_label": lambda: some(2, CLASSES).float(),
            "number": lambda: torch.randn((), generator=generator),
            "tokens": lambda: some(CLASSES, length).masked_fill(~mask, -100),
            "masked": lambda: tokens.masked_fill(~mask | (torch.arange(length) % 3 != i % 3), -100),
            "causal": lambda: tokens.masked_fill(~mask | (torch.arange(length) < i % 3), -100),
            "translation": lambda: targets,
        }[kind]()
        return {**text, "labels": labels}

    return [row(i) for i in range(count)]


# name -> (makes a model of a width and depth, the kind of its rows)
ZOO: dict[str, tuple[Callable[..., Any], str]] = {
    "bert": (bert, "sequence"),
    "bert-multi-label": (lambda **k: bert(problem_type="multi_label_classification", **k), "multi_label"),
    "bert-regression": (lambda **k: bert(num_labels=1, **k), "number"),
    "bert-tokens": (lambda **k: bert("TokenClassification", **k), "tokens"),
    "bert-spans": (lambda **k: bert("QuestionAnswering", num_labels=2, **k), "spans"),
    "bert-choices": (lambda **k: bert("MultipleChoice", **k), "choices"),
    "bert-masked": (lambda **k: bert("MaskedLM", **k), "masked"),
    "roberta": (roberta, "sequence"),
    "distilbert": (distilbert, "sequence"),
    "modernbert": (modernbert, "sequence"),
    "llama": (llama, "causal"),
    "qwen3": (qwen3, "causal"),
    "gpt2": (gpt2, "causal"),
    "t5": (t5, "translation"),
    "bart": (bart, "translation"),
    "vit": (vit, "image"),
    "wav2vec2-ctc": (wav2vec2, "speech"),
    "wav2vec2-ctc-sum": (lambda **k: wav2vec2(reduction="sum", **k), "speech"),
    "wav2vec2-sound": (lambda **k: wav2vec2("SequenceClassification", **k), "sound"),
    "whisper": (whisper, "features"),
}


# Heads of a few classes, whose initial logits are all near 0.
_CLASSIFIERS = ("classifier", "qa_outputs", "lm_head")


def pair(name: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A student and a larger teacher of one family, far enough apart that the logit term matters."""
    make, _ = ZOO[name]
    torch.manual_seed(seed + 1)
    teacher = make(hidden=48, layers=3)
    with torch.no_grad():
        for parameter_name, parameter in teacher.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(25.0 if parameter_name.startswith(_CLASSIFIERS) else 2.5)
    torch.manual_seed(seed)
    return make(), teacher


# Models without a head: name -> the class and the model with a head whose config it takes.
EMBEDDERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "bert": ("BertModel", bert),
    "distilbert": ("DistilBertModel", distilbert),
    "modernbert": ("ModernBertModel", modernbert),
    "roberta": ("RobertaModel", roberta),
    "llama": ("LlamaModel", llama),
    "t5-encoder": ("T5EncoderModel", t5),
    "vit": ("ViTModel", vit),
}


def embedder(name: str, *, seed: int = 0, **options: Any) -> Any:
    """A model without a head."""
    cls, make = EMBEDDERS[name]
    config = make(**options).config
    torch.manual_seed(seed)
    return getattr(hf, cls)(config)


def embedding_pair(student: str = "distilbert", teacher: str = "bert") -> tuple[Any, Any]:
    """Two models without a head; the teacher is wider and deeper, and its embeddings of texts differ."""
    wide = embedder(teacher, seed=1, hidden=48, layers=3)
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    return embedder(student), wide


def texts(count: int = 8, **options: Any) -> list[dict[str, Any]]:
    """Rows of text without labels."""
    return [{k: v for k, v in row.items() if k != "labels"} for row in rows("sequence", count, **options)]
