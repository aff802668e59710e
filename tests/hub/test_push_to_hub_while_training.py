"""Pushes of checkpoints are those that `Trainer` documents, and what lies on the Hub is enough to go on."""

import pytest
import torch
from safetensors.torch import load

from tests.hub.hub_server import running
from tests.hub.processes import CHECKPOINT, EVIDENCE, MODEL, TOKENIZER, push, run

ROOT_FILES = (MODEL | TOKENIZER) - {"README.md"}
CASES = ("strategies", "resumed", "resumed_adapter", "stages", "branch", "background")


def within(folder, files):
    return {f"{folder}/{name}" for name in files}


def messages(repo):
    return [commit.message for commit in repo.pushes]


@pytest.mark.slow
def test_checkpoints_are_pushed_as_trainer_documents_it(tmp_path, subtests):
    with running() as hub:
        hub.failures = {"POST /api/models/me/background/commit/": [500]}
        left = push(hub, tmp_path, *CASES)
    each_save = ["Training in progress, step 1", "Training in progress, step 2"]
    with_checkpoints = [f"{save}{part}" for save in each_save for part in ("", ", checkpoint")]
    with subtests.test("end"):
        assert messages(hub.repos["me/end"]) == []
    with subtests.test("every_save"):
        repo = hub.repos["me/every_save"]
        assert messages(repo) == each_save
        assert [{*commit.files} for commit in repo.pushes] == [ROOT_FILES] * 2
        assert repo.pushes[1].changed == ("model.safetensors",)
        own = {*left["resumed"]["weights"][0]}
        assert [{*load(commit.files["model.safetensors"])} for commit in repo.pushes] == [own] * 2
    with subtests.test("checkpoint"):
        repo = hub.repos["me/checkpoint"]
        assert messages(repo) == with_checkpoints
        assert {*repo.files} == ROOT_FILES | within("last-checkpoint", CHECKPOINT)
        assert repo.files["last-checkpoint/model.safetensors"] == repo.files["model.safetensors"]
    with subtests.test("all_checkpoints"):
        repo = hub.repos["me/all_checkpoints"]
        assert messages(repo) == with_checkpoints
        assert {*repo.files} == ROOT_FILES | within("checkpoint-1", CHECKPOINT) | within("checkpoint-2", CHECKPOINT)
    for case in ("resumed", "resumed_adapter"):
        with subtests.test("a downloaded last-checkpoint goes on with the bits of a training not cut", case=case):
            whole, again, cut = left[case]["weights"]
            assert left[case]["steps"] == (2, 4)
            assert all(torch.equal(whole[key], again[key]) for key in whole)
            assert not all(torch.equal(whole[key], cut[key]) for key in whole)
            assert left[case]["losses"][0] == left[case]["losses"][1]
    with subtests.test("of a PEFT student the adapter alone"):
        adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        files = CHECKPOINT - {"config.json", "model.safetensors"} | adapter
        found = {path for path in hub.repos["me/resumed_adapter"].files if "/" in path}
        assert found == within("last-checkpoint", files)
    with subtests.test("of a run of stages the last student alone"):
        repo = hub.repos["me/stages"]
        assert messages(repo) == ["Model save"]
        assert {*repo.files} == MODEL | TOKENIZER | EVIDENCE | {"lineage.json"}
        weights, pushed = left["stages"]["weights"], load(repo.files["model.safetensors"])
        assert {*pushed} == {*weights}
        assert all(torch.equal(weights[key], pushed[key]) for key in pushed)
    with subtests.test("a revision"):
        repo = hub.repos["me/branch"]
        assert left["branch"]["error"].startswith("RevisionNotFoundError")
        assert {*repo.files} == set()
        assert {*repo.branches["dev"].files} == MODEL | EVIDENCE
        assert messages(repo) == ["On a branch"]
    with subtests.test("a push that fails in the background stops no training, and is told of"):
        (said,) = left["background"]["said"]
        assert "me/background" in said
        assert "500" in said
        assert left["background"]["steps"] == 2
        assert messages(hub.repos["me/background"]) == each_save[1:]
        assert {path.name for path in (tmp_path / "background" / "checkpoint-1").iterdir()} == CHECKPOINT


@pytest.mark.slow
def test_two_processes_push_once(tmp_path):
    with running() as hub:
        run(hub, "tests.hub.pushes", tmp_path / "home", tmp_path, "two_processes")
    repo = hub.repos["me/two_processes"]
    saves = [f"Training in progress, step {step}{part}" for step in (1, 2) for part in ("", ", checkpoint")]
    assert messages(repo) == [*saves, "End of training"]
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert {*repo.files} == MODEL | TOKENIZER | EVIDENCE | within(
        "last-checkpoint", CHECKPOINT - {"rng_state.pth"} | states
    )
    assert sum("repos/create" in request for request in hub.requests) == 1
