"""Encoder-decoder models with a head of classes: their labels are no text to decode."""

import pytest
import torch
import transformers as hf

from tests.tiny import bart, rows
from tests.training import logged, make_trainer

TEXT = {"sequence": "SequenceClassification", "spans": "QuestionAnswering"}


def classifier(head, seed):
    torch.manual_seed(seed)
    return getattr(hf, f"BartFor{head}")(hf.BartConfig(**{**bart().config.to_dict(), "num_labels": 3}))


@pytest.mark.parametrize("kind", [*TEXT])
def test_bart_teaches_bart(tmp_path, kind):
    data = rows(kind)
    for row in data:  # a classifier reads the state at the end-of-sequence token
        row["input_ids"][-1] = 2
        row["attention_mask"][:] = 1
    for row in data:
        row["input_ids"][:-1][row["input_ids"][:-1] == 2] = 3
    models = classifier(TEXT[kind], seed=0), classifier(TEXT[kind], seed=1)
    trainer = make_trainer(tmp_path, models=models, train_dataset=data, eval_dataset=data, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0
    student, teacher = models
    batch = {key: torch.stack([row[key] for row in data]) for key in ("input_ids", "attention_mask")}
    student.eval()
    with torch.no_grad():
        choices = [model(**batch)[0].argmax(-1) for model in (student, teacher)]
    if kind == "sequence":
        agreement = (choices[0] == choices[1]).float().mean().item()
        assert trainer.evaluate()["eval_agreement"] == pytest.approx(agreement)
