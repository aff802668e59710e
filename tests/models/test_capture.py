"""What is recorded is what the model computes, it disturbs nothing, and nothing of it stays."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill.features import Feature, parse_feature
from hf_distill.models.architectures import depth, gives_embeddings, layer_stacks
from hf_distill.models.capture import Capture
from tests.models.families import ATTENTION, HIDDEN, family, inputs, set_dropout
from tests.tiny import bart, bert, llama, t5, wav2vec2


def sources(model, *kinds, layers=None):
    """Every source of some kinds in every stack, or those of some layers."""
    return [
        Feature(kind, layer, stack=stack)
        for kind in kinds
        for stack in layer_stacks(model)
        for layer in layers or range(int(kind == "attention"), depth(model, stack) + 1)
        if layer or gives_embeddings(model)
    ]


def captured(model, features, batch):
    """The model's output and the features of one forward."""
    capture = Capture(model, features)
    try:
        with capture.recording():
            outputs = model(**batch, **capture.forward_arguments)
            return outputs, capture.collect(outputs)
    finally:
        capture.close()


def logits(outputs):
    return outputs["start_logits" if "start_logits" in outputs else "logits"]


@pytest.mark.parametrize("name", HIDDEN)
def test_every_hidden_state_is_the_one_that_transformers_gives(name):
    model, batch = family(name), inputs(name)
    with torch.no_grad():
        every = model(**batch, output_hidden_states=True)
        _, features = captured(model, sources(model, "hidden"), batch)
    assert features
    for feature, value in features.items():
        states = every[f"{feature.stack}_hidden_states" if feature.stack else "hidden_states"]
        # Counted from the end, so that tuples without the embeddings agree.
        expected = states[feature.layer - depth(model, feature.stack) - 1]
        if name == "mamba" and feature.layer < depth(model, None):
            expected = states[feature.layer - 1]
        assert torch.equal(value, expected), str(feature)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper", "wav2vec2-ctc", "swin", "mamba"])
def test_a_hidden_state_is_the_output_of_its_layer_but_for_the_final_norm(name):
    model, batch = family(name), inputs(name)
    outputs, handles = {}, []

    def keep(feature):
        def hook(_, __, output):
            outputs[feature] = output[0] if isinstance(output, tuple) else output

        return hook

    features = [f for f in sources(model, "hidden") if 1 <= f.layer < depth(model, f.stack)]
    for feature in features:
        layer = layer_stacks(model)[feature.stack][feature.layer - 1]
        handles.append(layer.register_forward_hook(keep(feature)))
    _, recorded = captured(model, features, batch)
    for handle in handles:
        handle.remove()
    for feature in features:
        assert torch.equal(recorded[feature], outputs[feature]), str(feature)


def test_only_the_layers_asked_for_are_kept():
    model, batch = family("bert"), inputs("bert")
    outputs, features = captured(model, [Feature("hidden", 2)], batch)
    assert [state is not None for state in outputs.hidden_states] == [False, False, True, False]
    assert [*features] == [Feature("hidden", 2)]


def test_features_can_be_collected_in_the_root_forward_hook():
    model, batch = family("bert"), inputs("bert")
    features = [Feature("hidden", 2), Feature("attention", 1)]
    _, expected = captured(model, features, batch)
    capture = Capture(model, features)
    hook = model.register_forward_hook(lambda _, __, outputs: {"student": outputs, "inside": capture.collect(outputs)})
    with capture.recording():
        found = model(**batch, **capture.forward_arguments)["inside"]
    hook.remove()
    capture.close()
    assert torch.equal(found[features[0]], expected[features[0]])
    assert torch.equal(found[features[1]].key, expected[features[1]].key)


def test_a_decoder_deeper_than_its_encoder_gives_all_its_layers():
    torch.manual_seed(0)
    config = bart().config.to_dict() | {"encoder_layers": 1, "decoder_layers": 3}
    model, batch = hf.BartForConditionalGeneration(hf.BartConfig(**config)).eval(), inputs("bart")
    every = model(**batch, output_hidden_states=True)
    feature = Feature("hidden", 3, stack="decoder")
    assert torch.equal(captured(model, [feature], batch)[1][feature], every.decoder_hidden_states[3])


@pytest.mark.parametrize("name", ATTENTION)
def test_logits_are_bit_identical_while_recording_and_after(name):
    model, batch = family(name), inputs(name)
    with torch.no_grad():
        before = logits(model(**batch))
        outputs, _ = captured(model, sources(model, "hidden", "attention"), batch)
        assert torch.equal(logits(outputs), before)
        assert torch.equal(logits(model(**batch)), before)


@pytest.mark.parametrize("make", [bert, t5, llama])
def test_the_same_values_come_out_of_a_peft_wrapper_and_a_base_model(make):
    torch.manual_seed(0)
    model = make().eval()
    batch = {"input_ids": torch.randint(3, 90, (2, 6))}
    if make is t5:
        batch["decoder_input_ids"] = torch.randint(3, 90, (2, 4))
    features = sources(model, "hidden", "attention")
    _, expected = captured(model, features, batch)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear")).eval()
    for other in (wrapped, model.base_model):
        assert sources(other, "hidden", "attention") == features
        _, found = captured(other, features, batch)
        for feature, value in expected.items():
            same = found[feature] if feature.kind == "hidden" else found[feature].query
            torch.testing.assert_close(same, value if feature.kind == "hidden" else value.query)


def test_a_module_gives_the_first_tensor_of_its_output():
    model, batch = family("bert"), inputs("bert")
    pooler, encoder = parse_feature("module:bert.pooler"), parse_feature("module:bert.encoder")
    outputs, features = captured(model, [pooler, encoder], batch)
    assert torch.equal(model.classifier(features[pooler]), outputs.logits)
    assert torch.equal(model.bert.pooler(features[encoder]), features[pooler])


class Plain(nn.Module):
    """Layers in a list, and no word of hidden states."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, values):
        for layer in self.layers:
            values = layer(values)
        return {"logits": values}


def test_a_model_that_gives_no_hidden_states_has_its_layers_hooked():
    model, values = Plain(), torch.randn(2, 5, 4)
    outputs, features = captured(model, [Feature("hidden", layer) for layer in range(4)], {"values": values})
    first = model.layers[0](values)
    expected = [values, first, model.layers[1](first), outputs["logits"]]
    assert all(torch.equal(features[Feature("hidden", i)], value) for i, value in enumerate(expected))


def test_nothing_is_kept_outside_a_recording_or_after_its_end():
    model, batch = family("bert"), inputs("bert")
    capture = Capture(model, [*sources(model, "hidden", "attention"), parse_feature("module:bert.pooler")])
    before = {name: {*module.__dict__} for name, module in model.named_modules()}
    model(**batch)
    assert capture._calls is None
    with capture.recording():
        capture.collect(model(**batch, **capture.forward_arguments))
    upstream = {"_output_capturing_hooks_installed"}
    assert all({*module.__dict__} - upstream <= before[name] for name, module in model.named_modules())
    with pytest.raises(RuntimeError, match=r"inside recording\(\)"):
        capture.collect(model(**batch))
    capture.close()
    assert not model.bert.pooler._forward_hooks


def test_closing_leaves_a_model_that_can_be_copied_pickled_and_saved(tmp_path):
    model, batch = family("llama"), inputs("llama")
    model.save_pretrained(tmp_path / "before")
    # Hidden states are left out: the hooks that transformers 5.23 records them with cannot be pickled.
    capture = Capture(model, [*sources(model, "attention"), parse_feature("module:model.layers.1")])
    model.save_pretrained(tmp_path / "during")
    before, during = ((tmp_path / name / "config.json").read_text() for name in ("before", "during"))
    assert during == before
    with capture.recording():
        capture.collect(model(**batch, **capture.forward_arguments))
    assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)
    capture.close()
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, model(**batch).logits)


def test_generating_between_recordings_records_nothing_and_gives_the_same_text():
    model, batch = family("t5"), inputs("t5")
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**text, max_new_tokens=5)
    capture = Capture(model, sources(model, "hidden", "attention"))
    with capture.recording():
        first = capture.collect(model(**batch, **capture.forward_arguments))
    assert torch.equal(model.generate(**text, max_new_tokens=5), expected)
    with capture.recording():
        second = capture.collect(model(**batch, **capture.forward_arguments))
    capture.close()
    for feature, value in first.items():
        same = (value, second[feature]) if feature.kind == "hidden" else (value.query, second[feature].query)
        assert torch.equal(*same)


def test_a_wrong_reference_is_refused_with_what_there_is():
    model = family("bert")
    for feature, message in {
        Feature("hidden", 4): "BertForSequenceClassification has no hidden.4.: its layers are 0 to 3",
        Feature("attention", 0): "its layers are 1 to 3",
        Feature("hidden"): "its layers are 0 to 3",
        Feature("hidden", 1, stack="encoder"): "leave out encoder",
        Feature("query", 1): "Pass feature.source",
        parse_feature("module:bert.poler"): r"Did you mean .*bert\.pooler",
    }.items():
        with pytest.raises(ValueError, match=message):
            Capture(model, [feature])
    with pytest.raises(ValueError, match=r"Write encoder\.hidden\[1\] or decoder\.hidden\[1\]"):
        Capture(family("t5"), [Feature("hidden", 1)])
    with pytest.raises(ValueError, match=r"does not give the output of its embeddings"):
        Capture(family("mamba"), [Feature("hidden", 0)])


def test_a_forward_without_the_arguments_is_reported():
    model, batch = family("bert"), inputs("bert")
    capture = Capture(model, [Feature("hidden", 1), parse_feature("module:bert.pooler")])
    with capture.recording(), pytest.raises(ValueError, match=r"gave no hidden_states\[1\].*forward_arguments"):
        capture.collect(model(**batch))
    capture.close()
    capture = Capture(model, [parse_feature("module:bert.pooler")])
    with capture.recording():
        model(**batch)
        outputs = model(**batch)
        with pytest.raises(ValueError, match="ran 2 times in one forward"):
            capture.collect(outputs)
    capture.close()


def test_dropout_leaves_the_recorded_hidden_states_those_that_the_loss_saw():
    model, batch = family("wav2vec2-ctc"), inputs("wav2vec2-ctc")
    set_dropout(model.train(), 0.3)
    _, features = captured(model, [Feature("hidden", 3)], batch)
    features[Feature("hidden", 3)].sum().backward()
    assert model.wav2vec2.encoder.layers[0].attention.q_proj.weight.grad is not None
    assert wav2vec2().config.layerdrop == 0.0
