"""Quantised models: teachers that pass through untouched, and students that train adapters on them."""

import json

import peft
import pytest
import torch
import transformers as hf

from hf_distill.models.fingerprint import fingerprint
from hf_distill.teachers import LocalTeacher
from tests.invariants.steps import assert_same_steps, recorded
from tests.tiny import llama, pair, rows
from tests.training import batch_of, logged, losses, make_trainer


def torchao(config):
    """A config of torchao as JSON has it."""
    return {"quant_method": "torchao", "quant_type": {"default": {**config, "_version": 2}}}


_INT4 = {
    "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
    "granularity": {"_type": "PerGroup", "_data": {"group_size": 32}, "_version": 1},
}
# name -> (the package, what `quantization_config` is in JSON, whether Trainer lets adapters train on it)
BACKENDS = {
    "bitsandbytes 4-bit": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
    "bitsandbytes 8-bit": ("bitsandbytes", {"load_in_8bit": True}, True),
    "torchao int8": ("torchao", torchao({"_type": "Int8WeightOnlyConfig", "_data": {}}), True),
    "torchao int4": ("torchao", torchao({"_type": "IntxWeightOnlyConfig", "_data": _INT4}), False),
}
TRAINABLE = [name for name, (_, _, trains) in BACKENDS.items() if trains]
# A head is left as it is unless other modules are named in its place.
_HEAD_TOO = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}


def config_of(backend, *, head=False):
    package, config, _ = BACKENDS[backend]
    pytest.importorskip(package)
    return {**config, _HEAD_TOO[package]: ["none"]} if head else config


@pytest.fixture
def folders(tmp_path):
    """A student and a teacher on the disk, of sizes that can be quantised in groups."""
    torch.manual_seed(0)
    llama(hidden=64).save_pretrained(tmp_path / "student")
    teacher = llama(hidden=64, layers=3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    teacher.save_pretrained(tmp_path / "teacher")
    return tmp_path


def loaded(folder, config=None, **options):
    options |= {} if config is None else {"quantization_config": config}
    return hf.LlamaForCausalLM.from_pretrained(folder, **options)


def weights(model):
    """Every tensor of a model as bytes, those inside quantised weights too."""

    def parts(value):
        if hasattr(value, "__tensor_flatten__"):
            return [part for name in value.__tensor_flatten__()[0] for part in parts(getattr(value, name))]
        return [value.detach().contiguous().reshape(-1).view(torch.uint8).clone()]

    return {name.replace(".base_layer", ""): parts(value) for name, value in model.named_parameters()}


def assert_untouched(model, before):
    after = weights(model)
    for name, parts in before.items():
        for value, found in zip(parts, after[name], strict=True):
            assert torch.equal(found, value), name


def inputs():
    return {name: value for name, value in batch_of(rows("causal")).items() if name != "labels"}


def is_quantised(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    return type(weight.data) is not torch.Tensor or weight.dtype in (torch.int8, torch.uint8)


class TestTeachers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_quantised_teacher_is_left_as_it_is(self, backend, dtype, folders):
        teacher = loaded(folders / "teacher", config_of(backend), dtype=dtype)
        before, mark, own = weights(teacher), fingerprint(teacher), teacher.eval()(**inputs()).logits
        assert is_quantised(teacher)
        (answer,) = LocalTeacher(teacher)(inputs()).logits
        assert torch.equal(answer, own)
        options = {"hidden_weight": 0.1, "learning_rate": 0.05}
        trainer = make_trainer(folders / "run", "llama", models=(loaded(folders / "student"), teacher), **options)
        trainer.train()
        assert trainer.evaluate()["eval_kd"] > 0
        assert trainer.teacher.model is teacher
        assert teacher.dtype is dtype
        assert_untouched(teacher, before)
        assert fingerprint(teacher) == mark

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_its_fingerprint_tells_it_from_another(self, backend, folders):
        marks = {fingerprint(loaded(folders / name, config_of(backend)))["weights"] for name in ("student", "teacher")}
        assert len(marks) == 2

    @pytest.mark.parametrize("head", [False, True], ids=["plain head", "quantised head"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_without_logits_where_its_head_is_plain(self, backend, head, folders, monkeypatch):
        said, runs = [], []
        monkeypatch.setattr("hf_distill.chunked_terms.logger.warning", said.append)
        for chunked in (True, False):
            models = (loaded(folders / "student"), loaded(folders / "teacher", config_of(backend, head=head)))
            trainer = make_trainer(folders / "run", "llama", models=models, optim="sgd", learning_rate=1e-3)
            if not chunked:
                monkeypatch.setattr(trainer, "_can_be_chunked", lambda *args, **kwargs: False)
            runs.append(recorded(trainer))
        assert_same_steps(*runs)
        reason = "Logits of tokens x vocabulary are formed: the teacher's logits cannot be taken apart: the head of "
        assert [each.startswith(reason) for each in said] == [True] * head

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_name_and_json_give_the_same_teacher(self, backend, folders):
        config = config_of(backend)
        teacher = loaded(folders / "teacher", config)
        expected = losses(make_trainer(folders / "run", "llama", models=(loaded(folders / "student"), teacher)))
        as_json = json.dumps({"quantization_config": config})
        for student in (loaded(folders / "student"), str(folders / "student")):
            models = (student, str(folders / "teacher"))
            trainer = make_trainer(folders / "run", "llama", models=models, teacher_model_init_kwargs=as_json)
            assert is_quantised(trainer.teacher.model)
            assert losses(trainer) == expected


class TestStudents:
    @pytest.mark.parametrize("backend", TRAINABLE)
    def test_adapters_learn_on_a_base_that_stays(self, backend, folders):
        config = config_of(backend)
        student, lora = loaded(folders / "student", config), peft.LoraConfig(r=2)
        before = weights(student)
        options = {"learning_rate": 0.05, "peft_config": lora, "max_steps": 4, "hidden_weight": 0.1}
        trainer = make_trainer(folders / "run", "llama", models=(student, loaded(folders / "teacher")), **options)
        start = trainer.evaluate()["eval_kd"]
        trainer.train()
        assert trainer.evaluate()["eval_kd"] != pytest.approx(start, rel=1e-3)
        trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name in dict(trainer.model.named_parameters()) if "lora_" in name}
        assert_untouched(trainer.model.get_base_model(), before)
        trainer.save_model(str(folders / "adapter"))
        assert [file.name for file in (folders / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
        again = peft.PeftModel.from_pretrained(loaded(folders / "student", config), folders / "adapter").eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs()).logits, trainer.model.eval()(**inputs()).logits)

    @pytest.mark.parametrize("backend", TRAINABLE)
    def test_gradients_are_the_same_with_checkpointing_and_with_logits(self, backend, folders, monkeypatch):
        runs = []
        for checkpointing, chunked in ((False, True), (True, True), (False, False)):
            models = (loaded(folders / "student", config_of(backend)), loaded(folders / "teacher"))
            lora = peft.LoraConfig(r=2, init_lora_weights=False)
            options = {"optim": "sgd", "learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
            trainer = make_trainer(folders / "run", "llama", models=models, peft_config=lora, **options)
            if not chunked:
                monkeypatch.setattr(trainer, "_can_be_chunked", lambda *args, **kwargs: False)
            runs.append(recorded(trainer))
        assert_same_steps(runs[1], runs[0])
        assert_same_steps(runs[2], runs[0])

    @pytest.mark.parametrize("backend", TRAINABLE)
    def test_a_quantised_base_teaches_with_the_adapters_off(self, backend, folders):
        student = str(folders / "student")
        kwargs = json.dumps({"quantization_config": config_of(backend)})
        options = {"peft_config": peft.LoraConfig(r=2), "model_init_kwargs": kwargs, "learning_rate": 0.05}
        trainer = make_trainer(folders / "run", "llama", models=(student, None), **options)
        assert is_quantised(trainer.model.get_base_model())
        trainer.train()
        first, second = logged(trainer, "loss_kd")
        assert first == pytest.approx(0, abs=1e-5)
        assert second > 1e-4

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_without_adapters_it_is_refused(self, backend, folders):
        student = loaded(folders / "student", config_of(backend))
        with pytest.raises(ValueError, match=r"purely quantized models\. Please attach trainable adapters"):
            make_trainer(folders / "run", "llama", models=(student, pair("llama")[1]))

    def test_a_quantisation_that_trains_no_adapters_is_refused(self, folders):
        student = loaded(folders / "student", config_of("torchao int4"))
        with pytest.raises(ValueError, match="quantization method do not support training"):
            make_trainer(
                folders / "run", "llama", models=(student, pair("llama")[1]), peft_config=peft.LoraConfig(r=2)
            )


def test_a_placed_or_quantised_teacher_is_not_moved():
    teacher, moves = llama(), []
    teacher.to = lambda *args: moves.append(args)
    for name, value, moved in (
        ("is_quantized", True, False),
        ("hf_device_map", {"": "cpu"}, False),
        ("hf_device_map", None, True),
    ):
        setattr(teacher, name, value)
        LocalTeacher(teacher).place(torch.device("cpu"))
        assert bool(moves) == moved
        delattr(teacher, name)
