"""Heads of language models, taken apart: 30 families and more, what has none, and what stays as it was."""

import copy
import pickle

import peft
import pytest
import torch
import transformers as hf

from hf_distill.models.heads import decoder_inputs
from hf_distill.models.lm_head import HeadTap
from tests.models.families import _DECODER, _TEXT, MORE, family
from tests.tiny import VOCABULARY, ZOO, _seq2seq, llama, mixtral, rows
from tests.training import batch_of

_SEQ2SEQ = {
    **_seq2seq(32, 2),
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_MASKED = {**_TEXT, "embedding_size": 16}
# name -> (class of the model, class of its config, the config's arguments, the kind of its rows)
HEADS = {
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_DECODER, "logit_scale": 0.25}, "causal"),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**_DECODER, "logits_scaling": 4.0}, "causal"),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, "causal"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER, "causal"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER, "causal"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, "causal"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _DECODER, "causal"),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "causal",
    ),
    "roberta-masked": (
        "RobertaForMaskedLM",
        "RobertaConfig",
        {**_TEXT, "pad_token_id": 1, "max_position_embeddings": 66},
        "masked",
    ),
    "albert-masked": ("AlbertForMaskedLM", "AlbertConfig", _MASKED, "masked"),
    "electra-masked": ("ElectraForMaskedLM", "ElectraConfig", _MASKED, "masked"),
    "deberta-v2-masked": ("DebertaV2ForMaskedLM", "DebertaV2Config", _TEXT, "masked"),
    "mpnet-masked": ("MPNetForMaskedLM", "MPNetConfig", _TEXT, "masked"),
    "modernbert-masked": ("ModernBertForMaskedLM", "ModernBertConfig", _TEXT, "masked"),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _SEQ2SEQ, "translation"),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _SEQ2SEQ, "translation"),
}
_KINDS = ("causal", "masked", "translation", "features")
FAMILIES = {name: kind for name, (_, kind) in ZOO.items() if kind in _KINDS}
FAMILIES |= {name: entry[3] for name, entry in {**MORE, **HEADS}.items() if entry[3] in _KINDS}


def make(name):
    """A model of the family with weights, biases and a final bias far from 0."""
    if name not in HEADS:
        model = family(name)
    else:
        cls, config, arguments, _ = HEADS[name]
        torch.manual_seed(0)
        model = getattr(hf, cls)(getattr(hf, config)(**arguments)).eval()
    generator = torch.Generator().manual_seed(1)
    final_bias = [model.final_logits_bias] if hasattr(model, "final_logits_bias") else []
    with torch.no_grad():
        for parameter in [*model.parameters(), *final_bias]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs_of(model, kind):
    batch = batch_of(rows(kind))
    labels = batch.pop("labels")
    return batch | (decoder_inputs(model, labels) if model.config.is_encoder_decoder else {})


def tapped(tap, model, inputs):
    """The outputs of a forward that stops before the head, and what the logits are made of."""
    with tap.open(lambda factors: factors):
        outputs = model(**inputs)
    return outputs, tap.take()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_the_factors(name):
    model = make(name)
    inputs = inputs_of(model, FAMILIES[name])
    tap = HeadTap(model)
    with torch.no_grad():
        tap.verify(model, inputs)
        assert (tap.verified, tap.reason) == (True, None)
        own = model(**inputs).logits
        outputs, factors = tapped(tap, model, inputs)
        torch.testing.assert_close(factors.dense(), own)
    assert outputs.logits.shape == (len(own), 1, own.shape[-1])
    assert tap.shape == own.shape[:2]
    assert not model.get_output_embeddings()._forward_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert-masked", "gemma2", "cohere"])
def test_every_parameter_has_the_gradient_of_the_logits(name):
    """Tied weights too, whose gradient comes from two sides."""
    model = make(name)
    inputs, tap = inputs_of(model, FAMILIES[name]), HeadTap(model)
    with torch.no_grad():
        tap.verify(model, inputs)
    found = []
    for logits in (model(**inputs).logits, tapped(tap, model, inputs)[1].dense()):
        model.zero_grad()
        logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0])


def test_a_head_that_does_more_than_its_config_says_is_found_out():
    class Louder(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs["logits"] = outputs["logits"] * 1.05
            return outputs

    model = Louder(llama().config).eval()
    tap = HeadTap(model)
    tap.verify(model, inputs_of(model, "causal"))
    assert not tap.verified
    assert "Louder does more" in tap.reason


def test_a_head_that_its_forward_does_not_run_is_found_out():
    class Apart(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            hidden = self.model(*args, **kwargs).last_hidden_state
            return hf.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    model = Apart(llama().config).eval()
    tap = HeadTap(model)
    tap.verify(model, inputs_of(model, "causal"))
    assert not tap.verified
    assert "Apart forms its logits otherwise" in tap.reason


def lora(*modules, **options):
    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=[*modules], r=2, **options))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: lora("q_proj", "lm_head"), "the head of LlamaForCausalLM has an adapter"),
        (lambda: llama().half(), "held in torch.float16"),
        (lambda: hf.BertModel(hf.BertConfig(**_TEXT)), "BertModel names no output embeddings"),
    ],
)
def test_what_has_no_such_head_says_why(model, reason):
    assert reason in HeadTap(model()).reason


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_of_the_body_leave_the_head_to_be_read(options):
    model = lora("q_proj", **options).eval()
    inputs, tap = inputs_of(model, "causal"), HeadTap(model)
    tap.verify(model, inputs)
    assert tap.verified
    factors = tapped(tap, model, inputs)[1]
    assert factors.weight.requires_grad == bool(options)
    with torch.no_grad():
        factors.weight.mul_(2)
    with model.disable_adapter():
        torch.testing.assert_close(tapped(tap, model, inputs)[1].dense(), model(**inputs).logits)


def test_half_precision_is_verified_by_its_own_tolerance():
    model = llama().to(torch.bfloat16).eval()
    tap = HeadTap(model)
    tap.verify(model, inputs_of(model, "causal"))
    assert tap.verified


def test_autocast_is_verified():
    model = llama().eval()
    tap = HeadTap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tap.verify(model, inputs_of(model, "causal"))
    assert tap.verified


def test_a_compiled_model_stops_before_its_head_too():
    model = llama().eval()
    inputs, tap = inputs_of(model, "causal"), HeadTap(model)
    tap.attach()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        tap.verify(compiled, inputs)
        own = compiled(**inputs).logits
        outputs, factors = tapped(tap, compiled, inputs)
    assert tap.verified
    assert outputs.logits.shape[1] == 1
    torch.testing.assert_close(factors.dense(), own)


def test_copies_of_an_attached_model_are_idle():
    model = mixtral().eval()
    inputs, tap = inputs_of(model, "causal"), HeadTap(model)
    tap.attach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with tap.open(lambda factors: factors):
            outputs = twin(**inputs)
        assert tap.take() is None
        assert outputs.logits.shape[1] == inputs["input_ids"].shape[1]
    tap.detach()
    assert not model.lm_head._forward_hooks
