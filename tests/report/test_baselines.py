"""Baselines of every kind of model: what they change, by how much, and that the teacher keeps every bit."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_distill.report import baselines
from hf_distill.report.baselines import BASELINES, baselines_of
from hf_distill.report.cost import forward_flops, parameter_count, saved_bytes
from hf_distill.report.factored_linear import FactoredLinear, low_rank_factors

MODELS = {**tiny.ZOO, "mixtral": (tiny.mixtral, "causal")}


def teacher_of(name):
    """A teacher whose logits are not all near 0."""
    torch.manual_seed(0)
    model = MODELS[name][0](hidden=48)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    return model


def batch_of(name):
    kind = MODELS[name][1]
    rows = tiny.rows(kind, 3)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if not key.endswith("_positions")}
    labels = batch.pop("labels", None)
    return {**batch, "decoder_input_ids": labels.clamp(min=3)} if kind in ("translation", "features") else batch


def made(teacher, name, **options):
    (baseline,) = baselines_of(teacher, [name], **options)
    assert baseline.model is not None, baseline.note
    return baseline


def linears_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def logits_of(output):
    return output["start_logits" if "start_logits" in output else "logits"]


@pytest.fixture(name="registered")
def _registered():
    """Registers a baseline for the length of a test."""
    before = {*BASELINES}
    yield BASELINES.register
    for name in {*BASELINES} - before:
        del BASELINES._entries[name]


@pytest.mark.parametrize("baseline_name", BASELINES.names())
@pytest.mark.parametrize("name", MODELS)
def test_a_baseline_is_called_as_the_teacher_and_leaves_it_alone(name, baseline_name):
    teacher, batch = teacher_of(name), batch_of(name)
    before = copy.deepcopy(teacher.state_dict())
    modules, config = [type(module) for module in teacher.modules()], teacher.config.to_dict()
    random = torch.get_rng_state()
    baseline = made(teacher, baseline_name, example=batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert (teacher.training, baseline.model.training) == (True, False)
    teacher.eval()
    with torch.no_grad():
        output, expected = baseline.model(**batch), teacher(**batch)
    assert type(output) is type(expected)
    logits, wanted = logits_of(output), logits_of(expected)
    assert logits.shape == wanted.shape
    assert logits.isfinite().all()
    assert not torch.equal(logits, wanted)
    after = teacher.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [type(module) for module in teacher.modules()] == modules
    assert teacher.config.to_dict() == config


@pytest.mark.parametrize("baseline_name", BASELINES.names())
@pytest.mark.parametrize("name", ["bert-masked", "gpt2", "t5", "bart", "whisper"])
def test_tied_weights_stay_tied_and_what_they_were(name, baseline_name):
    teacher = teacher_of(name)
    model = made(teacher, baseline_name).model
    ties = [(one, other) for one, other in teacher.all_tied_weights_keys.items() if one.endswith("weight")]
    assert ties
    for one, other in ties:
        assert model.get_parameter(one) is model.get_parameter(other)
        assert torch.equal(model.get_parameter(one), teacher.get_parameter(one))


@pytest.mark.parametrize("baseline_name", BASELINES.names())
@pytest.mark.parametrize(
    ("name", "head"),
    [("bert", "classifier"), ("llama", "lm_head"), ("vit", "classifier"), ("wav2vec2-ctc", "lm_head")],
)
def test_head_and_embeddings_are_left_alone(name, head, baseline_name):
    teacher = teacher_of(name)
    model = made(teacher, baseline_name).model
    kept = [head] + [path for path, module in teacher.named_modules() if isinstance(module, nn.Embedding)]
    for path in kept:
        own, original = model.get_submodule(path), teacher.get_submodule(path)
        assert type(own) is type(original)
        assert torch.equal(own.weight, original.weight)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "whisper"])
def test_exactly_half_of_the_weights_is_pruned_and_it_is_the_smaller_half(name):
    teacher = teacher_of(name)
    model = made(teacher, "pruned").model
    heads = ("classifier", "lm_head", "proj_out")
    pairs = [
        (module.weight.detach().numpy().ravel(), model.get_submodule(path).weight.detach().numpy().ravel())
        for path, module in linears_of(teacher).items()
        if not path.startswith(heads)
    ]
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    kept = after != 0
    assert kept.sum() == math.ceil(len(before) / 2)
    assert np.array_equal(after[kept], before[kept])
    assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()
    # By magnitude over all layers together, and so not in each.
    assert len({(np.count_nonzero(one) / len(one)).round(3) for _, one in pairs}) > 1


def test_half_is_pruned_where_all_weights_are_alike():
    teacher = tiny.bert()
    with torch.no_grad():
        for module in linears_of(teacher).values():
            module.weight.fill_(0.25)
    model = made(teacher, "pruned").model
    body = [module.weight for path, module in linears_of(model).items() if path != "classifier"]
    assert sum(int((weight == 0).sum()) for weight in body) == sum(weight.numel() for weight in body) // 2


def test_pruning_changes_neither_size_nor_operations():
    teacher, batch = teacher_of("bert").eval(), batch_of("bert")
    baseline = made(teacher, "pruned")
    assert baseline.size_bytes == saved_bytes(teacher)
    assert parameter_count(baseline.model) == parameter_count(teacher)
    assert forward_flops(baseline.model, batch) == forward_flops(teacher, batch)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_error_of_a_rank_is_what_the_other_singular_values_hold(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inward, outward = low_rank_factors(weight, rank)
    assert (inward.shape, outward.shape) == ((rank, shape[1]), (shape[0], rank))
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    error = np.linalg.norm(weight.double().numpy() - outward.double().numpy() @ inward.double().numpy())
    assert error == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), rel=1e-5, abs=1e-5)


def test_a_weight_of_low_rank_is_found_whole():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    inward, outward = low_rank_factors(weight, 3)
    torch.testing.assert_close(outward @ inward, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper", "gpt2"])
def test_a_factored_layer_is_the_teachers_nearest_of_at_most_half_its_weights(name):
    teacher = teacher_of(name)
    model = made(teacher, "low_rank").model
    factored = {path: module for path, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert len(factored) >= 8
    for path, layer in factored.items():
        original = teacher.get_submodule(path)
        weight = original.weight.detach().double().numpy()
        weight = weight.T if isinstance(original, Conv1D) else weight
        rank, (rows, columns) = layer.weight.shape[1], weight.shape
        assert rank * (rows + columns) <= rows * columns / 2 < (rank + 1) * (rows + columns)
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        nearest = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).float()
        features = torch.randn(4, 2, columns)
        expected = features @ nearest.T + (0 if original.bias is None else original.bias)
        torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-4)
        assert (layer.in_features, layer.out_features) == (columns, rows)


def test_low_rank_saves_weights_bytes_and_operations():
    teacher, batch = teacher_of("bert").eval(), batch_of("bert")
    baseline = made(teacher, "low_rank")
    body = sum(module.weight.numel() for path, module in linears_of(teacher).items() if path != "classifier")
    saved = parameter_count(teacher) - parameter_count(baseline.model)
    assert body / 2 <= saved < 0.52 * body  # ranks are whole numbers
    assert saved_bytes(teacher) - baseline.size_bytes == pytest.approx(4 * saved, abs=2000)
    assert forward_flops(baseline.model, batch) < 0.6 * forward_flops(teacher, batch)


def test_low_rank_keeps_the_dtype():
    model = made(teacher_of("llama").bfloat16(), "low_rank").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(input_ids=torch.full((1, 4), 5)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_int8_weights_are_within_half_a_step_of_the_teachers(name):
    teacher = teacher_of(name)
    model = made(teacher, "int8").model
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "_packed_params")}
    layers = {path: module for path, module in layers.items() if hasattr(module, "in_features")}
    assert len(layers) >= 8
    for path, layer in layers.items():
        original = teacher.get_submodule(path)
        weight = original.weight.detach().T if isinstance(original, Conv1D) else original.weight.detach()
        assert layer.weight().dtype == torch.qint8
        steps = weight.abs().amax(dim=1, keepdim=True) / 127  # one for each output
        assert ((layer.weight().dequantize() - weight).abs() <= 0.51 * steps).all()
        torch.testing.assert_close(layer.bias(), original.bias)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "t5", "whisper"])
def test_int8_logits_are_near_the_teachers(name):
    teacher, batch = teacher_of(name).eval(), batch_of(name)
    with torch.no_grad():
        own, wanted = logits_of(made(teacher, "int8").model(**batch)), logits_of(teacher(**batch))
    assert 0 < (own - wanted).norm() < 0.1 * wanted.norm()


def test_int8_has_the_teachers_parameters_in_a_byte_each():
    teacher = tiny.bert(hidden=128, layers=2)
    baseline = made(teacher, "int8")
    body = sum(module.weight.numel() for path, module in linears_of(teacher).items() if path != "classifier")
    assert parameter_count(baseline.model) == parameter_count(teacher)
    assert saved_bytes(baseline.model) == baseline.size_bytes
    assert saved_bytes(teacher) - baseline.size_bytes == pytest.approx(3 * body, rel=0.1)
    assert "torch.save" in baseline.note
    assert forward_flops(baseline.model, {}) is None


def test_half_precision_takes_torchao_or_says_how_to_get_it(monkeypatch):
    pytest.importorskip("torchao")
    teacher, batch = tiny.bert(hidden=128, layers=2).bfloat16().eval(), {"input_ids": torch.full((2, 6), 5)}
    baseline = made(teacher, "int8", example=batch)
    assert "torchao" in baseline.note
    assert parameter_count(baseline.model) == parameter_count(teacher)
    assert baseline.size_bytes < 0.8 * saved_bytes(teacher)
    with torch.no_grad():
        own, wanted = baseline.model(**batch).logits, teacher(**batch).logits
    torch.testing.assert_close(own, wanted, rtol=0.1, atol=0.05)
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    (missing,) = baselines_of(teacher, ["int8"])
    assert (missing.model, missing.size_bytes) == (None, None)
    assert 'pip install "hf-distill[quantised]"' in missing.note


def test_an_adapter_is_merged_into_the_copy():
    torch.manual_seed(0)
    teacher = get_peft_model(tiny.bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).eval()
    batch = {"input_ids": torch.full((2, 6), 5)}
    before = copy.deepcopy(teacher.state_dict())
    model = made(teacher, "int8").model
    assert isinstance(model, hf.BertForSequenceClassification)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, teacher(**batch).logits, rtol=0.05, atol=0.01)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("baseline_name", BASELINES.names())
def test_a_module_of_ones_own_has_baselines_too(baseline_name):
    teacher = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))
    features = torch.randn(3, 20)
    assert made(teacher, baseline_name).model(features).shape == (3, 20)


def test_a_compiled_teacher_is_copied_without_its_wrapper():
    teacher = torch.compile(tiny.bert(), backend="eager")
    assert isinstance(made(teacher, "pruned").model, hf.BertForSequenceClassification)


def test_baselines_come_in_the_order_of_their_names_and_only_when_asked_for(registered):
    made_so_far = []

    def own(model):
        made_so_far.append(model)
        return model, "as it was"

    registered("own", own)
    teacher = tiny.bert()
    found = baselines_of(teacher, ["pruned", "own", "int8"])
    assert next(found).name == "pruned"
    assert made_so_far == []
    name, model, size_bytes, note = next(found)
    assert (name, size_bytes, note) == ("own", saved_bytes(teacher), "as it was")
    assert model is made_so_far[0]
    assert model is not teacher
    assert next(found).name == "int8"


def test_an_unknown_name_is_refused_before_any_work():
    with pytest.raises(ValueError, match="Did you mean 'pruned'"):
        baselines_of(tiny.bert(), ["prunned"])


@pytest.mark.parametrize("baseline_name", BASELINES.names())
def test_a_model_without_linear_layers_has_a_reason_in_place_of_numbers(baseline_name):
    (baseline,) = baselines_of(nn.Sequential(nn.Conv1d(3, 4, 2)), [baseline_name])
    assert (baseline.model, baseline.size_bytes) == (None, None)
    assert "no linear layer" in baseline.note


def test_layers_too_small_to_be_factored_are_left_and_said_so():
    (baseline,) = baselines_of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), ["low_rank"])
    assert "large enough" in baseline.note


@pytest.mark.parametrize("baseline_name", ["int8", "low_rank"])
def test_a_model_that_reads_its_weights_itself_is_found_out_by_an_example(baseline_name):
    config = tiny.wav2vec2("SequenceClassification").config.to_dict()
    own = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    teacher = hf.WavLMForSequenceClassification(hf.WavLMConfig(**own, num_buckets=32, max_bucket_distance=80)).eval()
    (baseline,) = baselines_of(teacher, [baseline_name], example=batch_of("wav2vec2-sound"))
    assert baseline.model is None
    assert baseline.note.startswith("It fails with ")


def test_an_error_of_a_baseline_is_in_its_note(registered):
    def broken(model):
        raise RuntimeError("out of luck\nand more lines")

    registered("broken", broken)
    broken_one, other = baselines_of(tiny.bert(), ["broken", "pruned"])
    assert broken_one.note == "It fails with RuntimeError: out of luck"
    assert other.model is not None


@pytest.mark.parametrize("baseline_name", BASELINES.names())
def test_weights_that_two_layers_share_are_left_alone(baseline_name):
    teacher = nn.Sequential(*[nn.Linear(20, 20) for _ in range(3)])
    teacher[2].weight = teacher[0].weight
    model = made(teacher, baseline_name).model
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].weight, teacher[0].weight)
    assert type(model[1]) is not nn.Linear or not torch.equal(model[1].weight, teacher[1].weight)


@pytest.mark.parametrize("baseline_name", BASELINES.names())
def test_an_untied_head_inside_its_body_is_left_alone(baseline_name):
    config = tiny.t5().config
    config.tie_word_embeddings = False
    teacher = hf.T5ForConditionalGeneration(config)
    assert teacher.lm_head.weight is not teacher.shared.weight
    head = made(teacher, baseline_name).model.lm_head
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, teacher.lm_head.weight)


@pytest.mark.parametrize("baseline_name", BASELINES.names())
def test_torchs_own_attention_which_reads_its_weights_itself_goes_on_working(baseline_name):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

        def forward(self, features):
            return self.out(self.attention(features, features, features)[0])

    teacher, features = Own(), torch.randn(2, 5, 16)
    model = made(teacher, baseline_name, example={"features": features}).model
    assert torch.equal(model.attention.out_proj.weight, teacher.attention.out_proj.weight)
    assert not torch.equal(model(features), teacher(features))
