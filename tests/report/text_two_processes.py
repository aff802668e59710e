"""Two processes report on raw text, which one of them measures."""

import json

import torch
from datasets import Dataset

from tests.text import corpus, models
from tests.training import make_trainer

CHEAP = {"baselines": (), "batch_sizes": (1,), "lengths": (8,), "repeats": 1, "warm_up": 0}


def run(folder):
    student, teacher = models.pair("llama")
    text = Dataset.from_dict({"text": corpus.SENTENCES})
    trainer = make_trainer(
        folder / "student",
        model=student,
        teacher_model=teacher,
        train_dataset=text,
        eval_dataset=None,
        processing_class=corpus.tokenizer(),
        max_length=16,
        ddp_backend="gloo",
        ddp_timeout=60,
    )
    report = trainer.report(text, **CHEAP)
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
