"""A training step reads nothing back from the device beyond what the two models' own forwards read."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.chunked_terms import KeptPlaces
from tests import tiny
from tests.invariants.objective_cases import EXACT_TEMPERATURES, WEIGHTS, losses_and_heads, weighted_rows
from tests.invariants.test_layer_exactness import BATCH_SCOPED, ITEM_SCOPED, config, rows_of

# What waits for a GPU: reading a number, and every operation whose output's shape depends on values.
_SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
    "bincount",
    "repeat_interleave",
)
OUR_COLUMNS = ("label_mask", "domain", "item_weight")


class _Reads(TorchDispatchMode):
    """Counts the synchronising operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in _SYNCHRONISING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_detector_sees_a_read():
    with _Reads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert reads.counts == {"_local_scalar_dense": 1, "index": 1}


@pytest.mark.parametrize("partly_labelled", [False, True])
@pytest.mark.parametrize("name", [name for name in tiny.ZOO if "ctc" not in name])
def test_a_step_waits_for_the_device_no_more_than_its_models_do(name, partly_labelled, tmp_path, monkeypatch):
    student, teacher = tiny.pair(name)
    data = tiny.rows(tiny.ZOO[name][1], 4)
    if partly_labelled:
        for key in {"labels", "start_positions", "end_positions"} & {*data[0]}:
            data[0][key] = torch.full_like(data[0][key], -100)
    assert reads_of_a_step(student, teacher, data, tmp_path, monkeypatch) == {}


LAYERS = [
    ("bert", {"distillation_config": config(*ITEM_SCOPED, *BATCH_SCOPED)}),
    ("bert-choices", {"hidden_weight": 1.0, "attention_weight": 1.0}),
    ("llama", {"distillation_config": config(*ITEM_SCOPED)}),
    ("t5", {"hidden_weight": 1.0, "attention_weight": 1.0}),
    ("vit", {"hidden_weight": 1.0, "attention_weight": 1.0}),
    ("whisper", {"hidden_weight": 1.0, "attention_weight": 1.0}),
]


@pytest.mark.parametrize(("name", "settings"), LAYERS, ids=[name for name, _ in LAYERS])
def test_terms_between_layers_wait_no_more_than_the_models_do(name, settings, tmp_path, monkeypatch):
    student, teacher = tiny.pair(name)
    data = rows_of(name, {"domain": "domain"} if name == "bert" else None)[:4]
    assert reads_of_a_step(student, teacher, data, tmp_path, monkeypatch, **settings) == {}


OBJECTIVES = [
    ("bert", {"item_weights": WEIGHTS["all"], "temperature": "adaptive"}),
    ("llama", {"item_weights": WEIGHTS["all"], "temperature": EXACT_TEMPERATURES["disagreement"]}),
    ("t5", {"item_weights": WEIGHTS["correctness"], "temperature": EXACT_TEMPERATURES["instance"]}),
    ("bert-spans", {"temperature": EXACT_TEMPERATURES["learned"]}),
    ("bert-tokens", {"temperature": "flsw", "logit_transform": "standardize"}),
    ("llama", {"temperature": "cwsm", "kd_loss": "reverse_kl"}),
    ("bert", {"loss_balance": "uncertainty", "hidden_weight": 1.0}),
    ("llama", {"loss_balance": "magnitude", "hidden_weight": 1.0}),
    *((name, {"kd_loss": loss}) for loss, name in losses_and_heads()),
]


@pytest.mark.parametrize(("name", "settings"), OBJECTIVES)
def test_what_changes_from_item_to_item_waits_no_more_than_the_models_do(name, settings, tmp_path, monkeypatch):
    student, teacher = tiny.pair(name)
    assert reads_of_a_step(student, teacher, weighted_rows(name, 4), tmp_path, monkeypatch, **settings) == {}


FROM_HIDDEN_STATES = [
    {},
    {"task_weight": 0.0},
    {"kd_loss": "jsd", "temperature": 1.0},
    {"kd_loss": "dkd", "logit_transform": "standardize"},
    {"kd_loss": "reverse_kl", "temperature": EXACT_TEMPERATURES["disagreement"], "teacher_scale": 0.5},
    {"temperature": EXACT_TEMPERATURES["loss"], "item_weights": WEIGHTS["rows"], "hidden_weight": 1.0},
]


@pytest.mark.parametrize("settings", FROM_HIDDEN_STATES, ids=str)
@pytest.mark.parametrize("name", ["llama", "t5", "bert-masked"])
def test_a_step_from_hidden_states_asks_for_nothing_but_where_its_items_are(name, settings, tmp_path, monkeypatch):
    student, teacher = tiny.pair(name)
    reads = reads_of_a_step(student, teacher, weighted_rows(name, 4), tmp_path, monkeypatch, chunked=True, **settings)
    assert reads == {"nonzero": 2}  # once a micro-batch; a device has been asked before, as the next test has it


def test_where_the_items_are_is_asked_before_the_teacher_has_work_and_read_after(tmp_path, monkeypatch):
    order = []
    asks, reads = KeptPlaces.__init__, KeptPlaces.places
    monkeypatch.setattr(KeptPlaces, "__init__", lambda self, mask: order.append("asked") or asks(self, mask))
    monkeypatch.setattr(KeptPlaces, "places", lambda self: order.append("read") or reads(self))
    student, teacher = tiny.pair("llama")
    trainer = step_trainer(student, teacher, tiny.rows("causal", 4), tmp_path, chunked=True)
    student.train()
    (first, second) = trainer.get_train_dataloader()
    trainer.compute_loss(student, first)  # decides, once a run, whether the terms may be formed so
    order.clear()
    teacher.register_forward_hook(lambda *_: order.append("teacher"))
    trainer.compute_loss(student, second)
    assert order == ["asked", "teacher", "read"]


def step_trainer(student, teacher, data, tmp_path, *, chunked, **settings):
    """A trainer of steps of two micro-batches, ready for the first."""
    args = DistillationTrainingArguments(
        tmp_path,
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data)
    trainer._start_layers()
    if chunked:
        trainer._chunked.attach(student)
    return trainer


def reads_of_a_step(student, teacher, data, tmp_path, monkeypatch, *, chunked=False, **settings):
    """What a step of two micro-batches reads beyond the forwards of its two models."""
    trainer = step_trainer(student, teacher, data, tmp_path, chunked=chunked, **settings)
    batches = [*trainer.get_train_dataloader()]
    student.train()
    trainer.compute_loss(student, batches[1])  # the first batch decides, once a run, whether the terms may be fused
    for name, module in [*sys.modules.items()]:
        if name.startswith("hf_distill.losses") and hasattr(module, "may_read"):
            monkeypatch.setattr(module, "may_read", lambda tensor: False)  # as on a device
    teacher.config.use_cache = False  # as the step runs it; the masks of a model with a cache read less
    decodes = student.config.is_encoder_decoder
    with _Reads() as floor:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in OUR_COLUMNS}
            student(**inputs)
            with torch.no_grad():
                teacher(**{name: value for name, value in inputs.items() if decodes or name != "labels"})
    with _Reads() as step:
        windows, counts = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
        for batch in windows:
            trainer.compute_loss(student, batch, num_items_in_batch=counts)
    return step.counts - floor.counts
