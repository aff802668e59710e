"""Fewer layers: the right ones, with their config, reloadable, over many architectures."""

import copy

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill.models.architectures import layer_stacks
from hf_distill.models.student import Origin, build_student
from hf_distill.models.student.depth import cut_depth, uniform_layers
from tests.models.student_cases import CASES, logits_of, teacher_of
from tests.tiny import bert, llama, mixtral

# One later layer is enough for a model whose first is another kind (ModernBERT) or holds what all use (T5).
KEPT = (0, 2, 3)


def without_layers(model, kept):
    """The model with all but the kept modules taken out of its lists, and out of the lists of its config."""
    model = copy.deepcopy(model)
    layers = {id(layer) for stack in layer_stacks(model).values() for layer in stack}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ModuleList) and len(child) and id(child[0]) in layers:
                setattr(module, name, nn.ModuleList(child[i] for i in kept))
    config = model.config
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[i] for i in kept])
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, len(kept))
    return model


def test_six_of_twelve_layers_are_those_of_distilbert():
    assert uniform_layers(6, 12) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize("depth", [1, 2, 5, 12, 32])
def test_uniform_layers_ascend_without_repeats_from_the_first_to_the_last(depth):
    for count in range(2, depth + 1):
        layers = uniform_layers(count, depth)
        assert len(set(layers)) == count
        assert list(layers) == sorted(layers)
        assert (layers[0], layers[-1]) == (0, depth - 1)
    assert uniform_layers(1, depth) == (0,)


@pytest.mark.parametrize("name", CASES)
def test_a_student_of_fewer_layers_is_the_teacher_with_the_others_taken_out(name):
    teacher = teacher_of(name)
    student = build_student(teacher, layers=KEPT).model
    assert torch.equal(logits_of(student, name), logits_of(without_layers(teacher, KEPT), name))
    assert not torch.equal(logits_of(student, name), logits_of(teacher, name))


@pytest.mark.parametrize("name", CASES)
def test_a_student_reloads_with_the_same_logits_and_no_missing_weights(name, tmp_path):
    student = build_student(teacher_of(name), layers=2).model
    student.save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(again, name), logits_of(student, name))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "gemma3"])
def test_a_decoder_generates_and_every_layer_knows_its_new_number(name):
    student = build_student(teacher_of(name), layers=[1, 3]).model
    numbers = [m.layer_idx for m in student.modules() if getattr(m, "layer_idx", None) is not None]
    assert set(numbers) <= {0, 1}
    if student.can_generate():
        ids = torch.tensor([[5, 6, 7]])
        cached = student.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, student.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_teacher_and_student_share_nothing_and_the_teacher_stays_as_it_was():
    teacher = teacher_of("gpt2").train()
    weights, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    state = torch.get_rng_state()
    student = build_student(teacher, layers=2, hidden_size=16).model
    assert teacher.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.n_layer = 17
    assert teacher.config.to_dict() == config
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())


def test_the_lists_of_a_config_are_cut_with_the_layers_and_lists_of_other_things_are_not():
    teacher = teacher_of("gemma3")
    assert build_student(teacher, layers=[1, 2]).model.config.layer_types == ["full_attention", "sliding_attention"]
    sound = build_student(teacher_of("wav2vec2-ctc", layers=2), layers=1).model.config
    assert tuple(sound.conv_dim) == (8, 8)  # as long as the stack was deep


def test_layers_that_a_config_lists_by_number_are_renumbered():
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 3],
        bos_token_id=1,
        eos_token_id=2,
    )
    built = build_student(hf.Qwen3MoeForCausalLM(config), layers=[1, 3])
    assert built.model.config.mlp_only_layers == [1]
    assert not built.report.names("new")


def test_settings_of_single_layers_follow_their_layers():
    config = copy.deepcopy(llama(layers=4).config)
    config.per_layer_config = {1: {"intermediate_size": 48}, 3: {"intermediate_size": 16}}
    cut = cut_depth(config, {"": (0, 3)})
    assert [layer.intermediate_size for layer in cut.per_layer_config] == [64, 16]


def test_each_stack_of_an_encoder_decoder_can_be_cut_alone():
    built = build_student(teacher_of("whisper"), layers={"decoder": 2})
    assert (built.model.config.encoder_layers, built.model.config.decoder_layers) == (4, 2)
    assert built.report.layers == {"decoder": (0, 3)}


def test_the_heads_by_which_whisper_tells_times_follow_their_layers():
    teacher = teacher_of("whisper")
    teacher.generation_config.alignment_heads = [[1, 0], [3, 2]]
    assert build_student(teacher, layers={"decoder": [0, 3]}).model.generation_config.alignment_heads == [[1, 2]]
    assert teacher.generation_config.alignment_heads == [[1, 0], [3, 2]]


def test_the_relative_positions_of_t5_are_kept_without_its_first_layer():
    teacher = teacher_of("t5")
    student = build_student(teacher, layers=[2, 3]).model
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[table], teacher.state_dict()[table])


def test_what_has_no_place_in_the_student_is_reported():
    report = build_student(teacher_of("modernbert"), layers=[1, 0]).report
    assert report.dropped == ("model.layers.1.attn_norm.weight",)
    assert report.names(Origin.NEW) == ("model.layers.1.attn_norm.weight",)
    assert "dropped: model.layers.1.attn_norm.weight" in str(report)


def test_a_student_has_the_teachers_dtype_and_evaluates():
    student = build_student(teacher_of("llama").to(torch.bfloat16), layers=2).model
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config.dtype == torch.bfloat16
    assert not student.training


def test_the_report_counts_what_it_says():
    built = build_student(teacher_of("bert"), layers=2)
    assert built.report.student_parameters == sum(p.numel() for p in built.model.parameters())
    assert set(built.report.origins.values()) == {Origin.COPIED}
    assert "layers (from 0): 0, 3" in str(built.report)
    assert built.report.to_dict()["layers"] == {"": [0, 3]}


@pytest.mark.parametrize(
    ("teacher", "layers", "match"),
    [
        (lambda: bert(layers=3), 4, "1 to 3"),
        (lambda: bert(layers=3), [0, 3], "counted from 0 to 2"),
        (lambda: bert(layers=3), [], "counted from 0 to 2"),
        (lambda: bert(layers=3), {"decoder": 2}, "Give the layers without a name"),
        (lambda: teacher_of("bart"), {"middle": 2}, "'encoder', 'decoder'"),
        (lambda: hf.AlbertModel(hf.AlbertConfig(**ALBERT)), 2, "share weights"),
        (lambda: get_peft_model(bert(), LoraConfig(target_modules=["query"])), 1, "merge_and_unload"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused_with_what_would_work(teacher, layers, match):
    with pytest.raises(ValueError, match=match):
        build_student(teacher(), layers=layers)


def test_only_a_transformers_model_is_a_teacher():
    with pytest.raises(TypeError, match="Transformers model"):
        build_student(nn.Linear(2, 2), layers=1)


def test_a_layer_of_another_kind_than_the_students_is_refused():
    teacher = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, num_experts=4, decoder_sparse_step=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="another kind"):
        build_student(teacher, layers=[0, 2])
    assert not build_student(teacher, layers=[0, 3]).report.names("new")


def test_experts_are_copied():
    teacher = mixtral(layers=3)
    student = build_student(teacher, layers=[2]).model
    assert torch.equal(student.model.layers[0].mlp.experts.down_proj, teacher.model.layers[2].mlp.experts.down_proj)


ALBERT = {"vocab_size": 97, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 64}
