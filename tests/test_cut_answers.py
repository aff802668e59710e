"""Question answering where the input was cut off between the start and the end of an answer."""

import pytest
import torch
from torch.nn import functional as F

from hf_distill import DistillationTrainer
from tests.tiny import pair, rows
from tests.training import arguments, batch_of


def _cut_rows() -> list[dict]:
    data = rows("spans")
    for row in data[2:5]:
        row["end_positions"] = torch.tensor(50)  # beyond the input
    data[6]["start_positions"] = torch.tensor(50)
    return data


def _expected(student, data) -> float:
    batch = batch_of(data)
    with torch.no_grad():
        outputs = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    sides = ((outputs.start_logits, batch["start_positions"]), (outputs.end_logits, batch["end_positions"]))
    means = []
    for logits, positions in sides:
        inside = positions < logits.shape[-1]
        means.append(F.cross_entropy(logits[inside].double(), positions[inside]).item())
    return sum(means) / 2


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_evaluation_loss_is_the_mean_of_both_sides_means_however_it_is_batched(batch_size, output_dir):
    student, teacher = pair("bert-spans")
    args = arguments(output_dir, per_device_eval_batch_size=batch_size)
    trainer = DistillationTrainer(student, args, teacher_model=teacher, eval_dataset=_cut_rows())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(_expected(student, _cut_rows()), rel=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_the_training_loss_is_too(batch_size, accumulation, output_dir):
    student, teacher = pair("bert-spans")
    expected = _expected(student, _cut_rows())
    args = arguments(
        output_dir, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1
    )
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=_cut_rows())
    trainer.train()
    assert trainer.state.log_history[0]["loss_task"] == pytest.approx(expected, rel=1e-5)


def test_a_side_without_any_position_is_no_nan(output_dir):
    student, teacher = pair("bert-spans")
    data = _cut_rows()[2:5]
    args = arguments(output_dir, max_steps=1)
    trainer = DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss_task"] < 10
    assert 0 < trainer.evaluate()["eval_loss"] < 10
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
