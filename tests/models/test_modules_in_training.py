"""Modules beside a student in a `Trainer`: resumed, exported, and trained by two processes."""

import logging
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_distill.models.modules import (
    ATTRIBUTE,
    FILE_NAME,
    StudentHook,
    attach,
    learning_rate_groups,
    load_modules,
    lost_keys,
    save_modules,
)
from tests import tiny
from tests.models.test_modules import modules_for, student_of
from tests.processes import run_twice
from tests.training import SILENT, GradientRecorder, assert_same_gradients, batch_of

STEPS, STOP = 6, 2
PLAN = {
    **SILENT,
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": STOP,
    "prediction_loss_only": True,
}
FACTORS = {"wide": 5.0}


class HiddenTrainer(hf.Trainer):
    """The task loss and two projected hidden layers: the overrides that a trainer of modules needs, and no more."""

    def __init__(self, model, teacher, *args, **kwargs):
        self.teacher, self.hook = teacher.eval(), StudentHook()
        if model is not None:
            attach(model, modules_for(), self.hook)
        super().__init__(model, *args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        attach(model, modules_for(), self.hook)
        return model

    def create_optimizer(self, model=None):
        known = self.optimizer
        optimizer = super().create_optimizer(model)
        if optimizer is not known:
            learning_rate_groups(optimizer, self.model, FACTORS)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        student = self.accelerator.unwrap_model(self.model)
        save_modules(student, output_dir, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_modules(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if not self.args.save_only_model:
            load_modules(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        missing = lost_keys(self.model, load_result.missing_keys)
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def project(self, outputs):
        modules = getattr(self.model, ATTRIBUTE)
        return {name: modules[name](outputs["hidden_states"][i]) for i, name in enumerate(modules)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            target = self.teacher(**inputs, output_hidden_states=True).hidden_states
        with self.hook.running(self.project):
            outputs = model(**inputs, output_hidden_states=True)
        assert type(outputs) is dict
        features = outputs["features"].values()
        loss = outputs["student"].loss + sum((x - target[i]).pow(2).mean() for i, x in enumerate(features))
        return (loss, outputs["student"]) if return_outputs else loss


def trainer_of(name, folder, *, student=None, **changes):
    """A trainer of a student of the name, with a wider teacher of its family."""
    torch.manual_seed(1)
    kind = "sequence" if name == "bert" else "causal"
    teacher = (tiny.bert if name == "bert" else tiny.llama)(hidden=48, layers=3)
    keywords = {"callbacks": changes.pop("callbacks", None), "model_init": changes.pop("model_init", None)}
    student = None if keywords["model_init"] else student or student_of(name)
    data = tiny.rows(kind, count=16)
    args = hf.TrainingArguments(output_dir=str(folder), **PLAN | changes)
    return HiddenTrainer(student, teacher, args, train_dataset=data, eval_dataset=data[:4], **keywords)


def logged(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_bits(actual, expected):
    assert [*actual] == [*expected]
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture
def warnings_of_transformers():
    """What Transformers warns of during the test."""
    said, logger = [], logging.getLogger("transformers")
    handler, level = logging.Handler(logging.WARNING), logger.level
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield said
    logger.setLevel(level)
    logger.removeHandler(handler)


NAMES = ["bert", "llama", "llama with LoRA"]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_ends_with_the_same_bits_in_student_and_modules(name, tmp_path, warnings_of_transformers):
    whole = trainer_of(name, tmp_path)
    start = weights(whole.model)
    whole.train()
    resumed = trainer_of(name, tmp_path)
    with torch.no_grad():  # what is resumed is read from the file
        for value in getattr(resumed.model, ATTRIBUTE).parameters():
            value.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert logged(resumed)[STOP:] == logged(whole)[STOP:]
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert all(not torch.equal(start[key], value) for key, value in weights(whole.model).items() if ATTRIBUTE in key)
    assert not any("keys" in text for text in warnings_of_transformers)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_model_comes_with_its_modules(name, tmp_path, warnings_of_transformers):
    best = {"eval_strategy": "steps", "eval_steps": STOP, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = trainer_of(name, tmp_path, metric_for_best_model="eval_loss", **best)
    trainer.train()
    folder = Path(trainer.state.best_model_checkpoint)
    assert folder.name == f"checkpoint-{STOP}"  # the loss falls, and the greatest is asked for
    modules = getattr(trainer.model, ATTRIBUTE).state_dict()
    assert_same_bits(modules, {key: load_file(folder / FILE_NAME)[key] for key in modules})
    last = load_file(tmp_path / f"checkpoint-{STEPS}" / FILE_NAME)
    assert not any(torch.equal(modules[key], value) for key, value in last.items())
    assert not any("keys" in text for text in warnings_of_transformers)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_export_of_a_student_is_that_of_the_plain_model(name, tmp_path, warnings_of_transformers):
    trainer = trainer_of(name, tmp_path, max_steps=STOP)
    trainer.train()
    student = trainer.model
    trainer.save_model(str(tmp_path / "final"))
    trainer._save(str(tmp_path / "given"), state_dict={**student.state_dict()})  # as FSDP and DeepSpeed give it
    student.save_pretrained(tmp_path / "direct")
    student.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 1
    for folder in ("final", "given", "direct", "sharded", f"checkpoint-{STOP}"):
        assert not any(
            ATTRIBUTE.encode() in path.read_bytes()
            for path in (tmp_path / folder).iterdir()
            if path.name.startswith("model") or path.name == "config.json"
        )
        loaded, said = type(student).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(said.values()), said
        for key, value in loaded.state_dict().items():
            assert torch.equal(student.state_dict()[key], value), key
    assert (tmp_path / f"checkpoint-{STOP}" / FILE_NAME).is_file()
    assert not (tmp_path / "final" / FILE_NAME).exists()
    assert not any("keys" in text for text in warnings_of_transformers)


def test_an_adapter_is_saved_without_the_modules(tmp_path):
    trainer = trainer_of("llama with LoRA", tmp_path, max_steps=STOP)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer._save(str(tmp_path / "given"), state_dict={**trainer.model.state_dict()})
    trainer.model.save_pretrained(tmp_path / "direct")
    for folder in ("final", "given", "direct", f"checkpoint-{STOP}"):
        keys = {*load_file(tmp_path / folder / "adapter_model.safetensors")}
        assert keys
        assert all("lora_" in key for key in keys)
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / folder)


def test_resuming_warns_no_more_of_tied_weights(tmp_path, warnings_of_transformers):
    """`Trainer` does, of every tied weight; `lost_keys` knows which a checkpoint leaves out on purpose."""
    trainer_of("gpt2", tmp_path, max_steps=STOP).train()
    resumed = trainer_of("gpt2", tmp_path)
    checkpoint = str(tmp_path / f"checkpoint-{STOP}")
    resumed._load_from_checkpoint(checkpoint)
    assert not any("keys" in text for text in warnings_of_transformers)
    assert resumed.model.lm_head.weight is resumed.model.transformer.wte.weight
    missing = ["lm_head.weight", "transformer.ln_f.bias", f"{ATTRIBUTE}.wide.0.bias"]
    assert lost_keys(resumed.model, missing) == ["transformer.ln_f.bias"]
    both = ["lm_head.weight", "transformer.wte.weight"]
    assert lost_keys(resumed.model, both) == both


def test_a_student_of_model_init_trains_with_modules_of_its_own(tmp_path):
    trainer = trainer_of("bert", tmp_path, model_init=lambda: student_of("bert"), max_steps=STOP)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    held = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert {id(value) for value in getattr(trainer.model, ATTRIBUTE).parameters()} < held


def test_the_modules_are_clipped_with_the_student(tmp_path):
    recorder = GradientRecorder()
    trainer_of("bert", tmp_path, callbacks=[recorder], max_grad_norm=0.01).train()
    for gradients in recorder.steps:
        norm = torch.stack([value.norm() for value in gradients.values()]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert any(ATTRIBUTE in name for name in gradients)


# With activation checkpointing Trainer tells DDP to look for no unused parameters.
CASES = {"looking for unused parameters": {}, "activation checkpointing": {"activation_checkpointing": True}}


def gradients_of(case, folder, batch, **changes):
    """The gradients of two optimizer steps over 8 rows each, and whether DDP looked for unused parameters."""
    recorder = GradientRecorder()
    options = {"per_device_train_batch_size": batch, "max_steps": 2, "max_grad_norm": 0.0, "callbacks": [recorder]}
    options |= {"train_sampling_strategy": "sequential", "save_strategy": "no", **CASES[case], **changes}
    trainer = trainer_of("bert", folder, student=plain_bert(), **options)
    trainer.train()
    handler = trainer.accelerator.ddp_handler
    return {"steps": recorder.steps, "unused": None if handler is None else handler.find_unused_parameters}


def save_results(path):
    results = {case: gradients_of(case, f"{path}.output", 2, ddp_backend="gloo") for case in CASES}
    results["sharded"] = sharded_round_trip(Path(f"{path}.sharded"))
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)


def sharded_round_trip(folder):
    """The modules' gradients under FSDP2, and their weights before and after they were saved, changed and loaded."""
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    student, hook = plain_bert(), StudentHook()
    attach(student, modules_for(), hook)
    for layer in student.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    squared_modules(student, hook, batch_of(tiny.rows("sequence", count=4)[2 * rank : 2 * rank + 2])).backward()
    modules = getattr(student, ATTRIBUTE)
    gradients = {name: value.grad.full_tensor() for name, value in modules.named_parameters()}
    before = {name: value.full_tensor() for name, value in modules.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_modules(student, folder, is_main_process=rank == 0)
    torch.distributed.barrier()
    with torch.no_grad():
        for value in modules.parameters():
            value.add_(1.0)
    load_modules(student, folder)
    return gradients, before, {name: value.full_tensor() for name, value in modules.state_dict().items()}


def plain_bert():
    torch.manual_seed(0)
    return tiny.bert()


def squared_modules(student, hook, inputs):
    """A loss of what the modules make of the student's hidden states, in its forward."""

    def run(outputs):
        return {name: module(outputs.hidden_states[1]) for name, module in getattr(student, ATTRIBUTE).items()}

    with hook.running(run):
        outputs = student(**inputs, output_hidden_states=True)
    return outputs["student"].loss + sum(value.pow(2).mean() for value in outputs["features"].values())


def test_two_processes_give_the_modules_the_gradients_of_one(tmp_path, subtests):
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    for case in CASES:
        with subtests.test(case):
            one = gradients_of(case, tmp_path, 4)
            assert results[case]["unused"] is (case != "activation checkpointing")
            assert len(one["steps"]) == 2
            for actual, expected in zip(results[case]["steps"], one["steps"], strict=True):
                actual = {name.removeprefix("module."): value for name, value in actual.items()}
                assert sum(ATTRIBUTE in name for name in actual) == 4
                assert_same_gradients(actual, expected)
    with subtests.test("sharded"):
        gradients, before, after = results["sharded"]
        student, hook = plain_bert(), StudentHook()
        attach(student, modules_for(), hook)
        squared_modules(student, hook, batch_of(tiny.rows("sequence", count=4))).backward()
        expected = {name: value.grad for name, value in getattr(student, ATTRIBUTE).named_parameters()}
        assert_same_gradients(gradients, expected)
        assert_same_bits(after, before)
        assert_same_bits(load_file(Path(f"{path}.sharded", FILE_NAME)), {k: before[k] for k in sorted(before)})
