"""A training step reads nothing back from the device beyond what the two models' own forwards read."""

from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.losses import row_gradient

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
    args = DistillationTrainingArguments(
        tmp_path, report_to="none", use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data)
    batches = [*trainer.get_train_dataloader()]
    student.train()
    trainer.compute_loss(student, batches[1])  # the first batch decides, once a run, whether the terms may be fused
    monkeypatch.setattr(row_gradient, "may_read", lambda tensor: False)  # as on a device
    teacher.config.use_cache = False  # as the step runs it; the masks of a model with a cache read less
    decodes = student.config.is_encoder_decoder
    with _Reads() as floor:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "label_mask"}
            student(**inputs)
            with torch.no_grad():
                teacher(**{name: value for name, value in inputs.items() if decodes or name != "labels"})
    with _Reads() as step:
        windows, counts = trainer.get_batch_samples(iter(batches), 2, args.device)
        for batch in windows:
            trainer.compute_loss(student, batch, num_items_in_batch=counts)
    assert step.counts - floor.counts == {}
