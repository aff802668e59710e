"""`train(resume_from_checkpoint=True)` where the last checkpoint is not what a finished saving leaves."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.processes import run_twice
from tests.training import make_trainer

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 0.01}
LOGGER = "hf_distill.checkpoints"


class Beginning(TrainerCallback):
    """The step that a training begins at."""

    step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def trainer_in(folder, **options):
    return make_trainer(folder, callbacks=[beginning := Beginning()], **EVERY_STEP | options), beginning


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of the steps 1 to 4, and the weights after them."""
    trainer, _ = trainer_in(tmp_path_factory.mktemp("trained"))
    trainer.train()
    return Path(trainer.args.output_dir), trainer.model.state_dict()


@pytest.fixture
def out(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    return tmp_path / "out"


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize(
    ("torn", "begins", "said"),
    [
        ({}, 4, []),
        (
            {3: "model.safetensors", 4: "trainer_state.json"},
            2,
            ["{0}/checkpoint-4 (no trainer_state.json), {0}/checkpoint-3 (no weights)."],
        ),
    ],
)
def test_the_last_whole_checkpoint_is_taken_and_what_is_passed_over_is_said_once(
    torn, begins, said, trained, out, caplog
):
    for step, name in torn.items():
        (out / f"checkpoint-{step}" / name).unlink()
    trainer, beginning = trainer_in(out)
    trainer.train(resume_from_checkpoint=True)
    assert beginning.step == begins
    head = "Passed over, as cut off while it was saved or removed: "
    assert warnings_of(caplog) == [head + each.format(out) for each in said]
    assert trainer.state.global_step == 4
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, trained[1][name]), name


@pytest.mark.parametrize("resume", [None, False, "checkpoint-1"])
def test_what_is_not_true_is_as_of_trainer(resume, out, caplog):
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    trainer, beginning = trainer_in(out)
    trainer.train(f"{out}/{resume}" if resume else resume)
    assert beginning.step == (1 if resume else 0)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("torn", [True, False])
def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(torn, tmp_path, caplog):
    if torn:
        (tmp_path / "checkpoint-3").mkdir()
    trainer, beginning = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory .* or name a checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert beginning.step is None
    assert len(warnings_of(caplog)) == torn


def test_a_damaged_file_is_named_with_what_mends_it(out):
    damaged = out / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    trainer, beginning = trainer_in(out)
    with pytest.raises(ValueError, match=r"optimizer\.pt is damaged .* Delete .*checkpoint-4 to go on"):
        trainer.train(resume_from_checkpoint=True)
    assert beginning.step is None


def resume_on_two_nodes(folder):
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(LOGGER).addHandler(handler)
    trainer, beginning = trainer_in(folder, ddp_backend="gloo", ddp_timeout=60)
    rank = torch.distributed.get_rank()
    trainer.args.output_dir = str(folder / f"node-{rank}")
    trainer.train(resume_from_checkpoint=True)
    found = {"began": beginning.step, "ended": trainer.state.global_step, "said": said}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.slow
def test_nodes_with_folders_of_their_own_take_the_last_that_is_whole_on_all(trained, tmp_path):
    for rank in (0, 1):
        shutil.copytree(trained[0], tmp_path / f"node-{rank}")
    (tmp_path / "node-0" / "checkpoint-3" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "node-1" / "checkpoint-4")  # cut off before it was begun
    run_twice(resume_on_two_nodes, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert [first["began"], second["began"], first["ended"], second["ended"]] == [2, 2, 4, 4]
    (warning,) = first["said"]
    assert "node-0/checkpoint-4 (not on every node), " in warning
    assert "node-0/checkpoint-3 (no weights)." in warning
    assert second["said"] == []
