"""Where the layers and their attentions are, over many architectures made from configs."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill.models.architectures import (
    attention_sites,
    depth,
    gives_embeddings,
    gives_hidden_states,
    hidden_states_request,
    layer_stacks,
    layerdrop,
)
from tests.models.families import ATTENTION, HIDDEN, WITHOUT_INTERFACE, family
from tests.tiny import bart, bert, llama, t5, wav2vec2

SEQ2SEQ = ("t5", "bart", "whisper")


@pytest.mark.parametrize("name", HIDDEN)
def test_the_stacks_of_a_model_are_found_with_all_their_layers(name):
    model = family(name)
    stacks = layer_stacks(model)
    assert [*stacks] == (["encoder", "decoder"] if name in SEQ2SEQ else [None])
    expected = 2 if name in ("swin", "convnext", "segformer", "llava") else 3
    assert {depth(model, stack) for stack in stacks} == {expected}


@pytest.mark.parametrize("name", ATTENTION)
def test_each_layer_has_one_self_attention_inside(name):
    model = family(name)
    for stack, layers in layer_stacks(model).items():
        sites = attention_sites(model, stack)
        assert len(sites) == len(layers)
        names = [[n for n, m in layer.named_modules() if m is site] for layer, site in zip(layers, sites, strict=True)]
        assert all(found and not any(w in found[0].lower() for w in ("cross", "enc")) for found in names)


@pytest.mark.parametrize(("make", "inner"), [(bert, "bert"), (llama, "model"), (t5, None), (bart, "model")])
def test_a_head_a_base_model_and_a_peft_wrapper_have_the_same_layers(make, inner):
    model = make()
    expected = layer_stacks(model)
    if inner:
        assert layer_stacks(getattr(model, inner)) == expected
    assert layer_stacks(get_peft_model(model, LoraConfig(target_modules="all-linear"))) == expected


def test_an_encoder_or_a_decoder_alone_is_the_only_stack():
    model = t5()
    assert layer_stacks(hf.T5EncoderModel(model.config)).keys() == {None}
    assert layer_stacks(model.get_encoder())[None] == layer_stacks(model)["encoder"]
    decoder = hf.BartForCausalLM(bart().config)
    assert depth(decoder, None) == 2


def test_an_encoder_and_a_decoder_of_other_families_are_told_apart():
    encoder = hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    text = {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}
    decoder = hf.GPT2Config(**text, add_cross_attention=True)
    model = hf.VisionEncoderDecoderModel(hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    assert {stack: len(layers) for stack, layers in layer_stacks(model).items()} == {"encoder": 1, "decoder": 2}
    assert len({*attention_sites(model, "decoder")}) == 2


def test_of_a_vision_language_model_the_text_counts():
    model = family("llava")
    assert layer_stacks(model)[None] == [*model.model.language_model.layers]


def test_a_shared_layer_stands_in_the_list_as_often_as_it_runs():
    config = family("albert").config
    config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num = 4, 2, 1
    model = hf.AlbertModel(config)
    first, second = (group.albert_layers[0] for group in model.encoder.albert_layer_groups)
    assert layer_stacks(model)[None] == [first, first, second, second]
    assert attention_sites(model, None) == [first.attention, first.attention, second.attention, second.attention]


def test_a_hybrid_has_no_attention_in_some_layers():
    assert [site is not None for site in attention_sites(family("qwen3_next"), None)] == [False, True, False]


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_models_without_the_interface_are_refused_by_name(name):
    model = family(name)
    with pytest.raises(ValueError, match=f"The layers of {type(model).__name__} do not call Transformers' attention"):
        attention_sites(model, None)


def test_a_stack_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"no stack 'decoder'. It has one only: leave out encoder\. and decoder\."):
        depth(bert(), "decoder")
    with pytest.raises(ValueError, match=r"Write encoder\.hidden\[1\] or decoder\.hidden\[1\]"):
        attention_sites(t5(), None)


def test_a_model_without_layers_or_with_several_lists_is_refused():
    with pytest.raises(ValueError, match=r"layers of Linear .* found none.*module:"):
        layer_stacks(nn.Linear(2, 2))
    blocks = {name: nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)) for name in ("left", "right")}
    with pytest.raises(ValueError, match="found several: left, right"):
        layer_stacks(nn.ModuleDict(blocks))


def test_layers_are_asked_for_by_number_where_that_gives_them_all():
    assert hidden_states_request(bert(), [2, 0, 2]) == [0, 2]
    deep = hf.BartConfig(**(bart().config.to_dict() | {"encoder_layers": 1, "decoder_layers": 3}))
    assert hidden_states_request(hf.BartForConditionalGeneration(deep), [1]) == [1]
    assert hidden_states_request(hf.BartForConditionalGeneration(deep), [3]) is True
    assert hidden_states_request(family("segformer"), [1]) is True


def test_models_say_what_their_hidden_states_hold():
    models = {name: family(name) for name in ("bert", "t5", "deberta-v2", "swin", "mamba", "segformer")}
    assert [name for name, model in models.items() if not gives_embeddings(model)] == ["mamba", "segformer"]
    assert all(gives_hidden_states(model) for model in models.values())
    assert not gives_hidden_states(nn.Linear(2, 2))


def test_layerdrop_is_the_largest_of_all_stacks():
    assert layerdrop(bert()) == layerdrop(wav2vec2()) == 0.0
    config = bart().config
    config.encoder_layerdrop, config.decoder_layerdrop = 0.1, 0.2
    assert layerdrop(hf.BartModel(config)) == 0.2
    assert (
        layerdrop(hf.HubertModel(hf.HubertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))) == 0.1
    )


def test_finding_layers_leaves_the_random_state_alone():
    model, state = bert(), torch.get_rng_state()
    layer_stacks(model)
    attention_sites(model, None)
    assert torch.equal(torch.get_rng_state(), state)
