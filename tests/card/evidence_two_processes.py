"""Two processes train, and one of them measures and writes."""

import json

import torch

from tests import tiny
from tests.training import make_trainer

CHEAP = {"baselines": (), "batch_sizes": (1,), "lengths": (8,), "repeats": 1, "warm_up": 0}


def run(folder):
    trainer = make_trainer(folder / "student", processing_class=tiny.tokenizer(), ddp_backend="gloo")
    trainer.train()
    trainer.save_model()
    report = trainer.report(**CHEAP)
    try:
        trainer.report(batch_size=0, **CHEAP)
        refused = None
    except ValueError as error:
        refused = str(error)
    trainer.create_model_card()
    rank = torch.distributed.get_rank()
    found = {"report": report.to_dict(), "refused": refused, "processes": torch.distributed.get_world_size()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
