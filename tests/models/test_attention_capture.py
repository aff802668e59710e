"""The attention recorded: the model's own maps, without dropout, with its gradients, whatever the family."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.features import Feature, parse_feature
from hf_distill.models.architectures import layer_stacks
from hf_distill.models.attention import _OPEN, AttentionTaps
from hf_distill.models.capture import Capture
from tests.models.families import (
    ATTENTION,
    MORE,
    WITHOUT_INTERFACE,
    WITHOUT_ONE_PER_LAYER,
    family,
    inputs,
    real_tokens,
    set_dropout,
)
from tests.models.test_capture import captured, logits, sources
from tests.tiny import ZOO

KINDS = {name: entry[-1] for name, entry in (ZOO | MORE).items()}
TEXT = [n for n in ATTENTION if KINDS[n] in ("sequence", "tokens", "causal", "translation")]


@pytest.fixture(autouse=True)
def no_taps_stay_open():
    yield
    assert not _OPEN


def eager_maps(model, batch):
    """(layer's feature -> map) from a copy of the model that computes its attention eagerly."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = eager(**batch, output_attentions=True)
    maps = {stack: outputs[f"{stack}_attentions" if stack else "attentions"] for stack in layer_stacks(model)}
    return {feature: maps[feature.stack][feature.layer - 1] for feature in sources(model, "attention")}


def compare(actual, expected, batch, feature, **tolerance):
    """Maps are close in the rows of real tokens."""
    rows = real_tokens(batch, feature.stack, expected.shape[-2])
    assert actual.shape == expected.shape
    if rows is not None:
        actual, expected = (x.transpose(1, 2)[rows] for x in (actual, expected))
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def softmax(scores):
    """The maps that scores in factors stand for, by hand."""
    dense = scores.dense()
    if scores.allowed is not None:
        dense = dense.masked_fill(~scores.allowed, -1e30)
    if scores.causal:
        dense = dense.masked_fill(~torch.ones(dense.shape[-2:], dtype=torch.bool).tril(), -1e30)
    if scores.sinks is None:
        return dense.softmax(-1)
    sinks = scores.sinks[None, :, None, None].expand(*dense.shape[:-1], 1)
    return torch.cat([dense, sinks], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("name", ATTENTION)
def test_probabilities_and_the_softmax_of_scores_are_the_eager_maps(name):
    model, batch = family(name), inputs(name)
    expected = eager_maps(model, batch)
    with torch.no_grad():
        _, features = captured(model, [*expected], batch)
    for feature, value in expected.items():
        # SDPA and eager attention differ by rounding, and that grows from layer to layer.
        compare(features[feature].probabilities(), value, batch, feature, atol=3e-4)
        compare(softmax(features[feature].scores()), features[feature].probabilities(), batch, feature)
    assert max(value.std() for value in expected.values()) > 0.05, "maps this uniform show no mistake"


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", TEXT)
def test_of_an_eager_model_the_probabilities_are_its_own_maps_bit_for_bit(name, left):
    model, batch = family(name), inputs(name, left=left)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(**batch, output_attentions=True)
        outputs, features = captured(model, sources(model, "attention"), batch)
    assert torch.equal(logits(outputs), logits(plain))
    for feature, record in features.items():
        expected = plain[f"{feature.stack}_attentions" if feature.stack else "attentions"][feature.layer - 1]
        assert torch.equal(record.probabilities(), expected)
        compare(softmax(record.scores()), expected, batch, feature)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
def test_without_padding_there_is_no_mask_and_the_maps_are_still_right(name):
    model, batch = family(name), inputs(name)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = eager_maps(model, batch)
    _, features = captured(model, [*expected], batch)
    for feature, value in expected.items():
        assert features[feature].mask is None
        compare(features[feature].probabilities(), value, batch, feature, atol=3e-4)
        compare(softmax(features[feature].scores()), features[feature].probabilities(), batch, feature)


def test_scores_say_which_stacks_are_causal():
    expected = {"bert": [False], "llama": [True], "gemma2": [True], "vit": [False], "t5": [False, True]}
    for name, causal in expected.items():
        model, batch = family(name), inputs(name)
        _, features = captured(model, sources(model, "attention", layers=[2]), batch)
        assert [record.scores().causal for record in features.values()] == causal, name


@pytest.mark.parametrize("name", ["bert", "electra", "llama", "t5", "whisper", "wav2vec2-ctc"])
def test_probabilities_have_no_dropout_where_the_model_has(name):
    model, batch = family(name), inputs(name)
    features = sources(model, "attention", layers=[2])
    set_dropout(model.train(), 0.0)
    with torch.no_grad():
        _, still = captured(model, features, batch)
        for layers in layer_stacks(model).values():
            set_dropout(layers[1], 0.5)
        torch.manual_seed(0)
        noisy, found = captured(model, features, batch)
        torch.manual_seed(1)
        assert not torch.equal(noisy.logits, model(**batch).logits)
    # What enters the second layer of the first stack is untouched by its dropout.
    torch.testing.assert_close(found[features[0]].probabilities(), still[features[0]].probabilities())
    for record in found.values():
        rows = record.probabilities().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "t5", "bart", "whisper", "gemma2", "vit"])
def test_gradients_flow_through_queries_keys_and_values(name):
    model, batch = family(name).train(), inputs(name)
    set_dropout(model, 0.0)
    features = sources(model, "attention", layers=[2])
    _, records = captured(model, features, batch)
    sum(r.probabilities().square().sum() + r.value.square().sum() for r in records.values()).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    for feature in features:
        first = layer_stacks(model)[feature.stack][0]
        assert any(p is q for p in first.parameters() for n, q in model.named_parameters() if n in touched)


def test_the_gradient_reaches_the_position_bias_of_t5():
    model, batch = family("t5"), inputs("t5")
    for read in (lambda r: r.scores().dense(), lambda r: r.probabilities()):
        model.zero_grad()
        _, records = captured(model, [Feature("attention", 3, stack="encoder")], batch)
        read(next(iter(records.values()))).square().sum().backward()
        assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().max() > 0


def attention_gradients(model, batch):
    """Gradients of the loss and of a loss on the attention of every layer."""
    features = sources(model, "hidden", "attention")
    outputs, found = captured(model, features, batch)
    states = [value.square().mean() for feature, value in found.items() if feature.kind == "hidden"]
    records = [value for feature, value in found.items() if feature.kind == "attention"]
    inside = states + [r.probabilities().square().mean() + r.value.square().mean() for r in records]
    (outputs.loss + sum(inside)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper", "gemma2"])
def test_activation_checkpointing_changes_no_gradient(name):
    model, batch = family(name).train(), inputs(name)
    set_dropout(model, 0.0)
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable({"use_reentrant": False})
    expected, found = attention_gradients(model, batch), attention_gradients(other, batch)
    assert {*found} == {*expected}
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-3, atol=1e-5)


def test_re_entrant_checkpointing_is_refused_rather_than_taught_nothing():
    model, batch = family("bert").train(), inputs("bert")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        captured(model, [Feature("attention", 1)], batch)
    with pytest.raises(ValueError, match="use_reentrant"):
        captured(model, [parse_feature("module:bert.encoder.layer.1.attention")], batch)
    with torch.no_grad():
        captured(model, [Feature("attention", 1)], batch)


def test_student_and_teacher_record_at_once_even_from_one_config():
    teacher, batch = family("bert"), inputs("bert")
    torch.manual_seed(5)
    student = type(teacher)(teacher.config).eval()
    expected = {model: eager_maps(model, batch) for model in (student, teacher)}
    one, other = (Capture(model, sources(model, "attention")) for model in (student, teacher))
    with one.recording():
        outputs = student(**batch)
        with torch.no_grad(), other.recording():
            teachers = other.collect(teacher(**batch))
        students = one.collect(outputs)
    other.close()
    with one.recording():
        assert one.collect(student(**batch)).keys() == students.keys()
    one.close()
    for model, found in ((student, students), (teacher, teachers)):
        for feature, value in expected[model].items():
            compare(found[feature].probabilities(), value, batch, feature, atol=3e-4)


def test_one_model_is_student_and_teacher_in_turns():
    base, batch = family("llama"), inputs("llama")
    plain = eager_maps(base, batch)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    features = [*plain]
    teacher, student = Capture(model, features), Capture(model, features[:1])
    for _ in range(2):
        with model.disable_adapter(), torch.no_grad(), teacher.recording():
            without = teacher.collect(model(**batch))
        with student.recording():
            adapted = student.collect(model(**batch))
    teacher.close()
    with student.recording(), torch.no_grad():
        assert len(student.collect(model(**batch))) == 1
    student.close()
    for feature, value in plain.items():
        compare(without[feature].probabilities(), value, batch, feature, atol=3e-4)
    assert not torch.allclose(adapted[features[0]].query, without[features[0]].query)


def test_two_recordings_of_one_model_at_once_are_refused():
    model = family("bert")
    one, other = Capture(model, [Feature("attention", 1)]), Capture(model, [Feature("attention", 1)])
    with one.recording(), pytest.raises(RuntimeError, match="already"), other.recording():
        pass
    one.close()
    other.close()


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_attention_outside_the_interface_is_refused(name):
    with pytest.raises(ValueError, match=r"do not call Transformers' attention interface.*hidden\[i\]"):
        Capture(family(name), [Feature("attention", 1)])


def test_layers_with_several_attentions_or_with_none_are_refused():
    with pytest.raises(ValueError, match="Layer 2 of SwinForImageClassification has several attentions"):
        Capture(family("swin"), [Feature("attention", 1)])
    with pytest.raises(ValueError, match=r"layers \[2\] have"):
        Capture(family("qwen3_next"), [Feature("attention", 1)])
    assert {"swin", "qwen3_next"} == {*WITHOUT_ONE_PER_LAYER}


def test_an_implementation_with_hidden_masks_is_refused():
    model = family("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention'.*set_attn_implementation\('sdpa'\)"):
        Capture(model, [Feature("attention", 1)])


def test_an_implementation_changed_behind_the_capture_is_reported():
    model, batch = family("bert"), inputs("bert")
    capture = Capture(model, [Feature("attention", 1)])
    model.set_attn_implementation("eager")
    with capture.recording(), pytest.raises(ValueError, match="recorded 0 times in one forward; expected 1"):
        capture.collect(model(**batch))
    capture.close()


def test_a_function_of_somebody_else_is_called_and_put_back():
    model, batch = family("bert"), inputs("bert")
    called = []

    def own(module, *args, **kwargs):
        called.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        captured(model, [Feature("attention", 1)], batch)
        assert len(called) == 3
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    captured(model, [Feature("attention", 1)], batch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def gated_eager_attention_forward(module, query, key, value, attention_mask, scaling=None, gate=None, **kwargs):
    maps = (query @ key.transpose(-1, -2) * gate).softmax(-1)
    return maps @ value, maps


class GatedAttention(nn.Module):
    """An attention with a formula of its own."""

    def __init__(self):
        super().__init__()
        self.config = hf.BertConfig(attn_implementation="eager")

    def forward(self, states, gate):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, gated_eager_attention_forward)
        return attend(self, states, states, states, None, gate=gate)[0]


def test_scores_with_a_formula_of_their_own_are_refused_and_the_maps_are_not():
    module, states = GatedAttention(), torch.randn(2, 2, 5, 4)
    taps = AttentionTaps([module])
    with taps.recording():
        output = module(states, gate=0.5)
        [record] = taps.take()[module]
    taps.close()
    assert torch.equal(record.probabilities() @ states, output)
    with pytest.raises(ValueError, match=r"GatedAttention also depend on gate.*hidden"):
        record.scores()


@pytest.mark.slow
def test_a_compiled_model_records_the_same_without_a_break_in_its_graph():
    model, batch = family("llama"), inputs("llama")
    features = sources(model, "hidden", "attention", layers=[1])
    capture = Capture(model, features)
    _, expected = captured(model, features, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(**batch).logits
    for _ in range(2):
        with capture.recording():
            outputs = compiled(**batch, **capture.forward_arguments)
            found = capture.collect(outputs)
        torch.testing.assert_close(outputs.logits, plain)
        for feature, value in expected.items():
            same = (found[feature], value)
            if feature.kind == "attention":
                same = tuple(record.probabilities() for record in same)
            torch.testing.assert_close(*same)
    capture.close()


@pytest.mark.slow
def test_a_compiled_model_collects_in_its_root_forward_hook():
    model, batch = family("bert"), inputs("bert")
    features = sources(model, "hidden", "attention", layers=[1])
    _, expected = captured(model, features, batch)
    capture, running = Capture(model, features), [False]

    def hook(_, __, outputs):
        return {"student": outputs, "inside": capture.collect(outputs)} if running[0] else None

    handle = model.register_forward_hook(hook)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(**batch).logits
    running[0] = True
    with capture.recording():
        found = compiled(**batch, **capture.forward_arguments)
    handle.remove()
    capture.close()
    torch.testing.assert_close(found["student"].logits, plain)
    hidden, attention = features
    torch.testing.assert_close(found["inside"][hidden], expected[hidden])
    torch.testing.assert_close(found["inside"][attention].query, expected[attention].query)
