"""Two processes train, and one of them measures and writes. `python -m tests.card.evidence_two_processes FOLDER`."""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    debug_launcher(run, args=(Path(sys.argv[1]),), num_processes=2)
