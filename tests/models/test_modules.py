"""What trains beside a student: attached and detached, saved and loaded, and its learning rates."""

import copy
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_distill.models.modules import (
    ATTRIBUTE,
    FILE_NAME,
    DistillationModules,
    StudentHook,
    attach,
    detach,
    learning_rate_groups,
    load_modules,
    save_modules,
)
from hf_distill.models.projections import make_projection
from tests import tiny
from tests.invariants.steps import with_dropout
from tests.training import batch_of


def modules_for(width=48, **changes):
    options = {"kind": "linear", "init": "default", "bias": True, "dtype": torch.float32, "device": "cpu"} | changes
    return DistillationModules(
        {
            "hidden": make_projection(32, width, seed=0, **options),
            "wide": make_projection(32, width, seed=1, **options),
        }
    )


def lora(model, **options):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], **options
    )
    return peft.get_peft_model(model, config)


def student_of(name):
    torch.manual_seed(0)
    if name == "llama with LoRA":
        return lora(with_dropout(tiny.llama()))
    return with_dropout({"bert": tiny.bert, "llama": tiny.llama, "gpt2": tiny.gpt2}[name]())


def attached(name="bert", **changes):
    student = student_of(name)
    attach(student, modules_for(**changes), StudentHook())
    return student


def parameters_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_an_adapter_that_would_save_modules_is_refused_and_left_as_it_was():
    student = lora(tiny.llama(), bias="all")
    before = [*student.state_dict()]
    with pytest.raises(ValueError, match=r"distillation_modules\.hidden\.0\.bias.*bias: false"):
        attach(student, modules_for(), StudentHook())
    assert [*student.state_dict()] == before
    attach(student, modules_for(bias=False), StudentHook())


@pytest.mark.parametrize("name", ["bert", "llama", "llama with LoRA", "gpt2"])
def test_a_detached_student_is_the_plain_model(name):
    student, plain = student_of(name), student_of(name)
    inputs = batch_of(tiny.rows("sequence" if name == "bert" else "causal", count=3))
    hook, modules = StudentHook(), modules_for()
    attach(student, modules, hook)
    outputs = student.eval()(**inputs)
    assert type(outputs) is type(plain.eval()(**inputs))  # an idle hook is no hook
    assert {key for key in student.state_dict() if ATTRIBUTE in key} == {
        f"{ATTRIBUTE}.{key}" for key in modules.state_dict()
    }
    assert detach(student) is modules
    for both in ("named_parameters", "named_modules", "named_children"):
        assert [key for key, _ in getattr(student, both)()] == [key for key, _ in getattr(plain, both)()]
    assert student.__dict__.keys() == plain.__dict__.keys()
    assert student._keys_to_ignore_on_save == plain._keys_to_ignore_on_save
    assert not student._forward_hooks
    assert all(torch.equal(value, parameters_of(plain)[key]) for key, value in parameters_of(student).items())
    with hook.running(lambda outputs: {}):
        assert torch.equal(student(**inputs).logits, plain(**inputs).logits)


def test_a_running_hook_gives_a_plain_dict_and_stops_after_an_error():
    student, hook = tiny.bert(), StudentHook()
    attach(student, modules_for(), hook)
    inputs = batch_of(tiny.rows("sequence", count=2))
    plain = student(**inputs)
    with hook.running(lambda outputs: {"logits": outputs.logits * 2}):
        outputs = student(**inputs)
    assert type(outputs) is dict
    assert type(outputs["student"]) is type(plain)
    assert torch.equal(outputs["features"]["logits"], plain.logits * 2)
    with pytest.raises(ZeroDivisionError), hook.running(lambda outputs: 1 / 0):
        student(**inputs)
    assert type(student(**inputs)) is type(plain)


class Heavy:
    """Stands for a trainer: neither to be copied nor pickled."""

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    def __reduce__(self):
        raise AssertionError("pickled")

    def run(self, outputs):
        return {}


def test_copies_and_pickles_of_a_running_hook_are_idle_and_take_nothing_along():
    student, hook = tiny.bert(), StudentHook()
    attach(student, modules_for(), hook)
    inputs = batch_of(tiny.rows("sequence", count=2))
    with hook.running(Heavy().run):
        copied = copy.deepcopy(student)
        assert pickle.loads(pickle.dumps(hook)).run is None
        assert copy.copy(hook).run is None
        assert type(student(**inputs)) is dict
        assert type(copied(**inputs)) is not dict
    detach(copied)
    assert not copied._forward_hooks
    assert hasattr(student, ATTRIBUTE)


def test_a_second_attachment_and_a_wrapped_student_are_refused():
    student = tiny.bert()
    attach(student, modules_for(), StudentHook())
    with pytest.raises(ValueError, match=r"has distillation_modules already.*detach\(student\)"):
        attach(student, modules_for(), StudentHook())
    with pytest.raises(TypeError, match="student is a DataParallel"):
        attach(nn.DataParallel(tiny.bert()), modules_for(), StudentHook())


@pytest.mark.parametrize("name", ["bert", "llama with LoRA"])
def test_saved_modules_are_loaded_bit_for_bit(name, tmp_path):
    student = attached(name, kind="mlp")
    save_modules(student, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    saved = parameters_of(getattr(student, ATTRIBUTE))
    other = attached(name, kind="mlp", init="orthogonal")
    before = parameters_of(detached_copy(other))
    load_modules(other, tmp_path)
    loaded = parameters_of(getattr(other, ATTRIBUTE))
    assert loaded.keys() == saved.keys() == load_file(tmp_path / FILE_NAME).keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())
    after = parameters_of(detached_copy(other))
    assert all(torch.equal(after[key], value) for key, value in before.items())  # nothing else is loaded
    assert all(value.requires_grad for value in getattr(other, ATTRIBUTE).parameters())


def detached_copy(student):
    student = copy.deepcopy(student)
    detach(student)
    return student


def test_modules_without_weights_need_no_file(tmp_path):
    student = student_of("bert")
    attach(student, DistillationModules(), StudentHook())
    save_modules(student, tmp_path)
    load_modules(student, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_module_under_two_names_is_saved(tmp_path):
    student, shared = student_of("bert"), nn.Linear(2, 2)
    attach(student, DistillationModules({"one": shared, "other": shared}), StudentHook())
    save_modules(student, tmp_path)
    load_modules(student, tmp_path)


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    save_modules(attached(), tmp_path, is_main_process=False)
    assert [*tmp_path.iterdir()] == []


def test_a_checkpoint_of_other_terms_is_refused_with_what_differs(tmp_path):
    student = attached()
    with pytest.raises(
        ValueError, match=r"no distillation_modules.safetensors, so what trains .* student, \['hidden', 'wide'\]"
    ):
        load_modules(student, tmp_path)
    save_modules(student, tmp_path)
    with pytest.raises(ValueError, match=r"of another shape: hidden.0.weight is \(48, 32\), not \(40, 32\)"):
        load_modules(attached(width=40), tmp_path)
    with pytest.raises(ValueError, match=r"only in the file: hidden.0.bias, wide.0.bias\. It was written with"):
        load_modules(attached(bias=False), tmp_path)
    empty = student_of("bert")
    attach(empty, DistillationModules(), StudentHook())
    with pytest.raises(ValueError, match=r"only in the file: hidden.0.bias, hidden.0.weight, wide.0.bias"):
        load_modules(empty, tmp_path)
    with pytest.raises(ValueError, match=r"not in the file: hidden.2.bias"):
        load_modules(attached(kind="mlp"), tmp_path)


def optimizer_of(student):
    """Groups as `Trainer` makes them."""
    named = [*student.named_parameters()]
    decayed = [value for key, value in named if not key.endswith("bias")]
    others = [value for key, value in named if key.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2e-3, betas=(0.8, 0.9))


def test_factors_move_weights_to_groups_of_their_own_rate_and_the_same_decay():
    student = attached()
    optimizer = optimizer_of(student)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    learning_rate_groups(optimizer, student, {"wide": 5.0, "hidden": 1.0})
    assert [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [
        (2e-3, 0.1, (0.8, 0.9)),
        (2e-3, 0.0, (0.8, 0.9)),
        (1e-2, 0.1, (0.8, 0.9)),
        (1e-2, 0.0, (0.8, 0.9)),
    ]
    weight, bias = getattr(student, ATTRIBUTE)["wide"].parameters()
    assert [group["params"] for group in optimizer.param_groups[2:]] == [[weight], [bias]]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == count


def test_groups_come_in_the_order_of_the_modules_and_follow_the_schedule():
    student = attached()
    optimizer = optimizer_of(student)
    learning_rate_groups(optimizer, student, {"wide": 5.0, "hidden": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 2e-3, 1e-3, 1e-3, 1e-2, 1e-2]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [1e-3, 1e-3, 5e-4, 5e-4, 5e-3, 5e-3]


def test_an_optimizer_without_the_modules_and_unknown_names_are_refused():
    student = attached()
    with pytest.raises(ValueError, match=r"\['width'\], which do not train. Known: \['hidden', 'wide'\]"):
        learning_rate_groups(optimizer_of(student), student, {"width": 2.0})
    with pytest.raises(ValueError, match=r"does not hold \['hidden.0.weight', 'hidden.0.bias', 'wide.0.weight'\]"):
        learning_rate_groups(torch.optim.SGD(student.bert.parameters(), lr=1.0), student, {})
