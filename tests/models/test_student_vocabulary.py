"""Fewer tokens: the same text in the same pieces, the same logits, and other text still possible."""

import json

import pytest
import tokenizers as tk
import torch
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_distill.models.student import build_student, trim_vocabulary
from tests.tiny import bert, t5, tokenizer, vit

WORDS = "the quick brown foxes jumped over lazy dogs seven wizards boxed quietly under newest widest towers".split()
ENDS = ["unlit", "lowest", "s"]
CORPUS = [f"{first} {second} {ENDS[i % 3]}" for first in WORDS for i, second in enumerate(WORDS)]
FEW = ["the lowest towers", "seven lazy foxes", "newest boxed dogs"]
OTHER = ["under wizards jumped", "x quietly q"]


def wordpiece():
    backend = tk.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    return hf.BertTokenizer(vocab=backend.get_vocab())


def byte_level():
    backend = tk.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    ends = dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), "<|end|>")
    trained = hf.GPT2Tokenizer(vocab=model["vocab"], merges=merges, **ends)
    trained.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    return trained


def suffixed():
    backend = tk.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<pad>"], end_of_word_suffix="</w>")
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def unigram():
    backend = tk.Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_level():
    return tokenizer([*WORDS, "lowest"])


KINDS = [wordpiece, byte_level, suffixed, unigram, word_level]


def pieces(tok, texts):
    return [tok.convert_ids_to_tokens(row) for row in tok(texts)["input_ids"]]


@pytest.mark.parametrize("make", KINDS)
def test_the_corpus_becomes_the_same_tokens_under_new_numbers(make):
    old = make()
    before = old.get_vocab()
    trimmed = trim_vocabulary(bert("MaskedLM", vocab_size=len(old)), old, FEW)
    assert pieces(trimmed.tokenizer, FEW) == pieces(old, FEW)
    assert len(trimmed.tokenizer) == len(trimmed.kept) == trimmed.model.config.vocab_size < len(old)
    for row, new in zip(old(FEW)["input_ids"], trimmed.tokenizer(FEW)["input_ids"], strict=True):
        assert trimmed.kept[new].tolist() == row
    assert old.get_vocab() == before


@pytest.mark.parametrize("make", [wordpiece, byte_level, unigram])
def test_other_text_can_still_be_written(make):
    old = make()
    new = trim_vocabulary(bert("MaskedLM", vocab_size=len(old)), old, FEW).tokenizer
    for text in OTHER:
        pair = [tok.convert_tokens_to_string(tok.tokenize(text)) for tok in (old, new)]
        assert pair[0] == pair[1]
        assert new.unk_token_id not in new(text)["input_ids"] or new.unk_token == new.eos_token


@pytest.mark.parametrize("make", KINDS)
def test_the_new_tokenizer_reloads(make, tmp_path):
    old = make()
    trimmed = trim_vocabulary(bert("MaskedLM", vocab_size=len(old)), old, FEW)
    trimmed.tokenizer.save_pretrained(tmp_path)
    again = type(old).from_pretrained(tmp_path)
    assert again(FEW + OTHER)["input_ids"] == trimmed.tokenizer(FEW + OTHER)["input_ids"]
    assert again.special_tokens_map == old.special_tokens_map


def test_tied_and_untied_heads_give_the_same_logits_for_kept_tokens():
    old = unigram()
    for tied in (True, False):
        config = {**t5().config.to_dict(), "vocab_size": len(old) + 6, "eos_token_id": 1, "tie_word_embeddings": tied}
        teacher = hf.T5ForConditionalGeneration(hf.T5Config(**config)).eval()
        trimmed = trim_vocabulary(teacher, old, FEW)
        outputs = []
        for model, tok in ((teacher, old), (trimmed.model, trimmed.tokenizer)):
            batch = tok(FEW, padding=True, return_tensors="pt")
            with torch.no_grad():
                outputs.append(model(input_ids=batch["input_ids"], decoder_input_ids=batch["input_ids"]).logits)
        assert torch.equal(outputs[0][..., trimmed.kept], outputs[1])


def test_the_bias_of_a_masked_head_is_cut_with_its_rows(tmp_path):
    old = wordpiece()
    teacher = bert("MaskedLM", vocab_size=len(old)).eval()
    torch.nn.init.normal_(teacher.cls.predictions.bias)
    trimmed = trim_vocabulary(teacher, old, FEW)
    trimmed.model.save_pretrained(tmp_path)
    again = hf.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = teacher(**old(FEW, padding=True, return_tensors="pt")).logits[..., trimmed.kept]
        found = again(**trimmed.tokenizer(FEW, padding=True, return_tensors="pt")).logits
    assert torch.equal(found, expected)


def test_token_numbers_in_the_configs_are_renumbered():
    old = byte_level()
    end, user = old.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    config = hf.GPT2Config(
        vocab_size=len(old), n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end, pad_token_id=None
    )
    teacher = hf.GPT2LMHeadModel(config)
    teacher.generation_config.eos_token_id = [end, user]
    new = trim_vocabulary(teacher, old, FEW)
    ids = new.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    assert new.model.config.eos_token_id == ids[0]
    assert new.model.generation_config.eos_token_id == ids
    assert teacher.generation_config.eos_token_id == [end, user]


def test_build_student_trims_after_cutting():
    old = wordpiece()
    built = build_student(bert("MaskedLM", vocab_size=len(old)), layers=1, tokenizer=old, corpus=FEW)
    assert built.model.config.vocab_size == len(built.tokenizer) < len(old)
    assert "bert.embeddings.word_embeddings.weight" in built.report.names("cut")
    assert built.report.student_parameters == sum(p.numel() for p in built.model.parameters())
    assert f"{len(built.tokenizer)} of {len(old)} tokens" in str(built.report)


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("model", "tok", "texts", "error", "match"),
    [
        (bert, Slow, FEW, TypeError, "not a fast tokenizer"),
        (lambda: bert(vocab_size=10), wordpiece, FEW, ValueError, "do not belong together"),
        (vit, wordpiece, FEW, ValueError, "no vocab_size"),
        (bert, wordpiece, "one text", TypeError, "give a list"),
    ],
)
def test_what_cannot_be_trimmed_is_refused(model, tok, texts, error, match):
    with pytest.raises(error, match=match):
        trim_vocabulary(model(), tok(), texts)
