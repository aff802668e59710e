"""Narrower students: one selection of residual features, whole heads, and what cannot be cut."""

import pytest
import torch
import transformers as hf

from hf_distill.models.student import Origin, build_student
from hf_distill.models.student.axes import Block, Kind, find_axes, read_widths
from hf_distill.models.student.check import check_axes
from hf_distill.models.student.selection import INITS
from hf_distill.models.student.width import WidthCut
from tests.models.student_cases import CASES, logits_of, teacher_of
from tests.tiny import VOCABULARY, mixtral

WIDE = [name for name in CASES if name != "wav2vec2-ctc"]
READERS = ("up_proj.weight", "gate_proj.weight", "intermediate.dense.weight", "fc1.weight", "wi.weight")
ALL = (Kind.HIDDEN, Kind.HEADS, Kind.INNER)


@pytest.mark.parametrize("name", WIDE)
def test_every_axis_is_what_it_is_taken_for(name):
    teacher = teacher_of(name)
    config = teacher.config.__class__.from_dict(teacher.config.to_dict())
    if name == "gpt2":
        config.n_inner = 128
    check_axes(teacher, find_axes(teacher, config, ALL), read_widths(teacher.config))


@pytest.mark.parametrize(
    ("name", "init"),
    [(name, "slice") for name in WIDE]
    + [(name, init) for name in ("modernbert", "gemma3", "t5") for init in INITS[1:]],
)
def test_a_narrower_student_runs_and_reloads(name, init, tmp_path):
    student = build_student(teacher_of(name), hidden_size=16, intermediate_size=24, layers=2, init=init).model
    student.save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert logits_of(again, name).isfinite().all()
    assert torch.equal(logits_of(again, name), logits_of(student, name))


@pytest.mark.parametrize("name", WIDE)
def test_a_slice_keeps_the_first_features_everywhere(name):
    teacher = teacher_of(name)
    student = build_student(teacher, hidden_size=16).model
    norms = [n for n, v in student.state_dict().items() if ("norm" in n.lower() or ".ln_" in n) and v.shape == (16,)]
    assert norms
    for norm in norms:
        assert torch.equal(student.state_dict()[norm], teacher.state_dict()[norm][:16])


def silence(teacher, dead):
    """Takes the effect away from the inner neurons `dead` of every layer, by what they write."""
    writers = ("down_proj.weight", "output.dense.weight", "mlp.c_proj.weight", "fc2.weight", "Dense.wo.weight")
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith(writers) and "attention" not in name:
                (parameter.T if "c_proj" in name else parameter)[:, dead] = 0


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "whisper", "gemma2"])
def test_importance_leaves_out_the_neurons_that_do_nothing(name):
    teacher = teacher_of(name)
    inner = read_widths(teacher.config).inner
    dead = torch.randperm(inner)[: inner // 4]
    silence(teacher, dead)
    with torch.no_grad():  # what they read is small as well
        for parameter_name, parameter in teacher.named_parameters():
            if parameter_name.endswith(READERS):
                parameter[dead] *= 0.01
            elif parameter_name.endswith("c_fc.weight"):
                parameter[:, dead] *= 0.01
    student = build_student(teacher, intermediate_size=inner - len(dead), init="importance").model
    torch.testing.assert_close(logits_of(student, name), logits_of(teacher, name), atol=1e-4, rtol=1e-4)
    sliced = build_student(teacher, intermediate_size=inner - len(dead)).model
    assert not torch.allclose(logits_of(sliced, name), logits_of(teacher, name), atol=1e-3)


@pytest.mark.parametrize("dead_group", [0, 1])
def test_importance_leaves_out_whole_groups_of_heads_that_do_nothing(dead_group):
    teacher = teacher_of("llama")  # two key heads, shared by two query heads each
    queries, keys = slice(16 * dead_group, 16 * dead_group + 16), slice(8 * dead_group, 8 * dead_group + 8)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.q_proj.weight[queries] *= 0.01
            layer.self_attn.v_proj.weight[keys] = 0
    student = build_student(teacher, heads=2, init="importance").model
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(logits_of(student, "llama"), logits_of(teacher, "llama"), atol=1e-4, rtol=1e-4)


def test_equally_many_query_heads_stay_with_every_key_head_where_groups_do_not_divide():
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=3,
        intermediate_size=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    teacher = hf.LlamaForCausalLM(config)
    student = build_student(teacher, heads=6).model
    assert student.config.num_key_value_heads == 3
    rows = teacher.model.layers[0].self_attn.q_proj.weight.view(3, 4, 4, 48)[:, :2].reshape(24, 48)
    assert torch.equal(student.model.layers[0].self_attn.q_proj.weight, rows)
    with pytest.raises(ValueError, match=r"heads in \[3, 4, 6, 8, 9, 12\]"):
        build_student(teacher, heads=5)


def test_svd_keeps_the_function_of_a_teacher_whose_stream_has_few_directions():
    teacher = teacher_of("llama")
    directions = torch.linalg.qr(torch.randn(32, 32)).Q[:, :12]
    onto = directions @ directions.T
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(onto @ parameter)
            else:
                parameter.copy_(parameter @ onto)
    student = build_student(teacher, hidden_size=12, init="svd").model
    torch.testing.assert_close(logits_of(student, "llama"), logits_of(teacher, "llama"), atol=2e-3, rtol=1e-3)
    sliced = build_student(teacher, hidden_size=12).model
    assert not torch.allclose(logits_of(sliced, "llama"), logits_of(teacher, "llama"), atol=0.1)


def test_the_gain_of_a_norm_that_adds_one_is_rotated_with_the_one():
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    weight = torch.randn(8)
    axes = {"norm.weight": ((Block(Kind.HIDDEN, 8),),)}
    plain = WidthCut(axes, {}, {}, rotation, {"norm.weight": 0.0}).apply("norm.weight", 1 + weight)
    added = WidthCut(axes, {}, {}, rotation, {"norm.weight": 1.0}).apply("norm.weight", weight)
    torch.testing.assert_close(1 + added, plain)
    torch.testing.assert_close(plain, torch.diagonal(rotation.T @ torch.diag(1 + weight) @ rotation))


def test_heads_of_another_size_are_cut_inside_every_head():
    teacher = teacher_of("bert")
    student = build_student(teacher, hidden_size=20, heads=4).model  # heads of 5, the teacher's are of 8
    old, new = (model.bert.encoder.layer[0].attention.self.query.weight for model in (teacher, student))
    assert torch.equal(new, old.view(4, 8, 32)[:, :5, :20].reshape(20, 20))


def test_heads_go_with_the_width_where_it_is_heads_times_head_size():
    student = build_student(teacher_of("bert"), hidden_size=16).model
    assert (student.config.num_attention_heads, student.config.intermediate_size) == (2, 64)


def test_a_model_without_a_head_is_cut_as_one_with():
    teacher = teacher_of("bert")
    whole, part = build_student(teacher, hidden_size=16).model, build_student(teacher.bert, hidden_size=16).model
    assert all(torch.equal(whole.bert.state_dict()[name], value) for name, value in part.state_dict().items())


def test_inner_width_is_cut_where_the_residual_width_cannot_be(tmp_path):
    student = build_student(teacher_of("wav2vec2-ctc"), intermediate_size=24, layers=2).model
    assert logits_of(student, "wav2vec2-ctc").isfinite().all()


def test_experts_are_narrowed_alike():
    student = build_student(mixtral(), intermediate_size=24, hidden_size=16, heads=2).model
    assert student.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 48, 16)


def test_random_copies_nothing_and_repeats_with_its_seed():
    teacher = teacher_of("bert")
    first, again, other = (build_student(teacher, hidden_size=16, init="random", seed=seed) for seed in (1, 1, 2))
    assert set(first.report.origins.values()) == {Origin.NEW}
    weights = [torch.cat([p.flatten() for p in built.model.parameters()]) for built in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def _gpt_oss():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )  # fmt: skip


def _swin():
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    return hf.SwinForImageClassification(config)


def _electra():
    return hf.ElectraForMaskedLM(
        hf.ElectraConfig(vocab_size=97, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )


@pytest.mark.parametrize(
    ("teacher", "options", "match"),
    [
        (lambda: teacher_of("bert"), {"hidden_size": 64}, "the teacher has 32"),
        (lambda: teacher_of("bert"), {"hidden_size": 18}, "multiple of it, such as 16 or 24"),
        (lambda: teacher_of("bert"), {"hidden_size": 18, "heads": 4}, "does not divide into 4 heads"),
        (lambda: teacher_of("bert"), {"heads": 2}, "Use heads=4 with hidden_size=32, or hidden_size=16"),
        (lambda: teacher_of("phi3"), {"hidden_size": 16, "heads": 4}, "rotary"),
        (lambda: teacher_of("llama"), {"heads": 3}, r"heads in \[1, 2, 4\]|heads in \[2, 4\]"),
        (lambda: teacher_of("wav2vec2-ctc"), {"hidden_size": 16}, "pos_conv_embed.*grouped convolution"),
        (_swin, {"hidden_size": 8}, "no single hidden_size and number of heads"),
        (_gpt_oss, {"intermediate_size": 32}, "Shuffling the features"),
        (_electra, {"hidden_size": 16}, "another structure.*embeddings_project"),
        (lambda: teacher_of("bert"), {"init": "svd"}, "none of hidden_size"),
        (lambda: teacher_of("bert"), {"init": "first"}, "slice, importance, svd, random"),
        (lambda: teacher_of("bert"), {"corpus": ["a"]}, "Give tokenizer"),
    ],
)
def test_a_width_that_cannot_be_cut_is_refused_with_the_reason(teacher, options, match):
    with pytest.raises(ValueError, match=match):
        build_student(teacher(), **options)
