"""Evaluation with `generate`: what `Seq2SeqTrainer` does with and without labels."""

import pytest

from hf_distill import Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from tests.tiny import ZOO, rows
from tests.training import arguments, make_trainer


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_text_is_generated_for_rows_without_labels_too(tmp_path, name):
    args = arguments(
        tmp_path, Seq2SeqDistillationTrainingArguments, predict_with_generate=True, generation_max_length=6
    )
    trainer = make_trainer(tmp_path, name, cls=Seq2SeqDistillationTrainer, args=args)
    data = rows(ZOO[name][1])
    labelled = trainer.predict(data)
    unlabelled = trainer.predict([{key: value for key, value in row.items() if key != "labels"} for row in data])
    assert (unlabelled.predictions == labelled.predictions).all()
    assert unlabelled.label_ids is None
    assert labelled.label_ids is not None
    assert "test_loss" in labelled.metrics
    assert "test_loss" not in unlabelled.metrics
