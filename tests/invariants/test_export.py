"""What a distillation saves is what `Trainer` saves: a student that loads without us, and nothing of the teacher."""

import json
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import loading, tiny
from tests.processes import run_alone
from tests.training import SILENT

PLAN = {**SILENT, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-2}


def load_without_us(folders, adapters=()):
    """What `from_pretrained` reports about each folder, in an interpreter that cannot import hf_distill."""
    with tempfile.TemporaryDirectory() as folder:
        run_alone(loading.write_reports, Path(folder, "said.json"), folders, [*adapters])
        return json.loads(Path(folder, "said.json").read_text(encoding="utf-8"))


def trained(models, kind, output_dir):
    """A trainer after two steps, with a checkpoint and the final student saved."""
    student, teacher = models
    trainer = DistillationTrainer(
        student,
        DistillationTrainingArguments(output_dir=str(output_dir), **PLAN),
        teacher_model=teacher,
        train_dataset=tiny.rows(kind),
    )
    trainer.train()
    trainer.save_model(str(Path(output_dir, "final")))
    return trainer


def trained_plainly(student, kind, output_dir):
    """The same of `transformers.Trainer`."""
    args = TrainingArguments(output_dir=str(output_dir), **PLAN)
    trainer = Trainer(student, args, train_dataset=tiny.rows(kind))
    trainer.train()
    trainer.save_model(str(Path(output_dir, "final")))
    return trainer


def files_of(folder):
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())


def matrices(model):
    """The bytes of every weight of two or more dimensions: random, so that two models share none by chance."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items() if value.dim() > 1}


def test_every_saved_student_loads_without_us_and_without_a_warning(tmp_path):
    folders = {}
    for name, (_, kind) in tiny.ZOO.items():
        trainer = trained(tiny.pair(name), kind, tmp_path / name)
        for folder in (tmp_path / name / "final", tmp_path / name / "checkpoint-2"):
            folders[str(folder)] = type(trainer.model).__name__
            saved = getattr(transformers, type(trainer.model).__name__).from_pretrained(folder)
            for key, value in trainer.model.state_dict().items():
                assert torch.equal(saved.state_dict()[key], value), (name, key)
    for folder, information in load_without_us(folders).items():
        assert {*information} >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
        assert not any(information.values()), (folder, information)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "wav2vec2-ctc"])
def test_a_distillation_saves_the_files_and_the_config_of_the_plain_trainer(name, tmp_path):
    """`training_args.bin` is among them in both: `Trainer` pickles the arguments' class there, so ours names us."""
    kind = tiny.ZOO[name][1]
    ours = trained(tiny.pair(name), kind, tmp_path / "ours")
    plain = trained_plainly(tiny.pair(name)[0], kind, tmp_path / "plain")
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "plain")
    assert ours.model.config.to_dict() == plain.model.config.to_dict()
    for path in files_of(tmp_path / "plain"):
        if path.name in ("config.json", "generation_config.json"):
            assert (tmp_path / "ours" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()
        if path.suffix == ".safetensors":
            weights, expected = (load_file(tmp_path / side / path) for side in ("ours", "plain"))
            assert {key: value.shape for key, value in weights.items()} == {
                key: value.shape for key, value in expected.items()
            }


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_no_saved_file_holds_a_weight_of_the_teacher(name, tmp_path):
    make, kind = tiny.ZOO[name]
    torch.manual_seed(1)
    teacher = make()  # of the student's own shapes, which could replace its weights unseen
    trainer = trained((tiny.pair(name)[0], teacher), kind, tmp_path)
    contents = {path: (tmp_path / path).read_bytes() for path in files_of(tmp_path)}
    for key, value in matrices(teacher).items():
        assert [path for path, content in contents.items() if value in content] == [], key
    weights = [content for path, content in contents.items() if path.name == "model.safetensors"]
    for key, value in matrices(trainer.model).items():  # the search finds what is there
        assert all(value in content for content in weights), key


@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_training_leaves_the_teacher_as_it_was(name, tmp_path):
    student, teacher = tiny.pair(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    trained((student, teacher), tiny.ZOO[name][1], tmp_path)
    assert {*teacher.state_dict()} == {*before}
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert teacher.config.to_dict() == config


def test_a_peft_student_saves_its_adapter_alone(tmp_path):
    torch.manual_seed(0)
    tiny.llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    untouched = {key: value.clone() for key, value in base.state_dict().items()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = trained((peft.get_peft_model(base, config), None), "causal", tmp_path / "run")
    for folder in (tmp_path / "run" / "final", tmp_path / "run" / "checkpoint-2"):
        assert list(folder.glob("*.safetensors")) == [folder / "adapter_model.safetensors"]
        adapter = load_file(folder / "adapter_model.safetensors")
        assert adapter
        assert all("lora_" in key for key in adapter)
        contents = [(folder / path).read_bytes() for path in files_of(folder)]
        assert not any(
            value.numpy().tobytes() in content
            for value in untouched.values()
            if value.dim() > 1
            for content in contents
        )
    load_without_us({}, adapters=[str(tmp_path / "run" / "final"), str(tmp_path / "run" / "checkpoint-2")])
    with trainer.model.disable_adapter():
        restored = trainer.model.unload().state_dict()
    for key, value in untouched.items():
        assert torch.equal(restored[key], value), key
