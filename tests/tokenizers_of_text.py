"""Small tokenizers of every kind, trained on a few lines in several scripts."""

from typing import Any

import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the cat sat on the mat, and the dog sat there",
    "a small student learns what a large teacher says",
    "heute lernt der Schüler vom Lehrer",
    "今天学生向老师学习",
    "one two three; four\nfive \U0001f600\U0001f389 done",
    "l'élève apprend vite, très vite",
    "x = 1;\ny = 2;\n",
] * 3


def byte_level(size: int = 320, *, trim_offsets: bool = False, lines: Any = None, wide: bool = False) -> Any:
    """Byte-level BPE as in GPT-2, or with `wide` splitting as in Llama 3, whose tokens may end with a line feed."""
    backend = Tokenizer(models.BPE())
    if wide:
        pattern = Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\p{N}|\s+")
        split = [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    backend.train_from_iterator(LINES if lines is None else lines, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], pad_token=special[0])


def sentence_piece(size: int = 420, *, bos: bool = True) -> Any:
    """BPE on spaces turned into marks, unknown characters as bytes, as in Llama 2 and Gemma."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=special)
    backend.train_from_iterator([word for line in LINES for word in line.split(" ")], trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return tokenizer


def word_piece(size: int = 200) -> Any:
    """WordPiece on lower-case words, as in BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=size, show_progress=False, special_tokens=special)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", **names)
