"""A Hub that refuses says why, as with `Trainer`, and the student stays whole in its folder."""

import pytest
import torch
from safetensors.torch import load, load_file

from tests.hub.hub_server import Repo, running
from tests.hub.processes import EVIDENCE, MODEL, TOKENIZER, push


@pytest.mark.slow
def test_a_push_that_fails_says_why_and_loses_nothing(tmp_path, subtests):
    with running() as hub:
        hub.failures = {
            "POST /api/models/me/forbidden/commit/": [403],
            "POST /api/models/me/forbidden_stages/commit/": [403],
            "POST /api/models/me/flaky/preupload/": [500],
            "POST /api/models/me/flaky/commit/": [500],
        }
        left = push(hub, tmp_path, "forbidden", "forbidden_stages", "flaky")
    with subtests.test("403 of a commit"):
        assert "403 Forbidden" in left["forbidden"]["errors"][0]
        assert "me/forbidden" in left["forbidden"]["errors"][0]
        assert hub.repos["me/forbidden"].pushes == []
    with subtests.test("the student is there"):
        folder = tmp_path / "forbidden"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == MODEL | TOKENIZER | EVIDENCE
        weights, saved = left["forbidden"]["weights"], load_file(folder / "model.safetensors")
        assert {*weights} == {*saved}
        assert all(torch.equal(weights[key], saved[key]) for key in saved)
    with subtests.test("403 before the training"):
        assert "403 Forbidden" in left["forbidden"]["errors"][1]
        assert "theirs" in left["forbidden"]["errors"][1]
        assert "theirs/forbidden" not in hub.repos
    with subtests.test("403 before the stages"):
        assert "403 Forbidden" in left["forbidden_stages"]["refused"]
        assert "theirs" in left["forbidden_stages"]["refused"]
        assert "theirs/stages" not in hub.repos
        assert not left["forbidden_stages"]["trained"]
    with subtests.test("403 after stages, whose student is pushed later without training"):
        assert "403 Forbidden" in left["forbidden_stages"]["error"]
        assert left["forbidden_stages"]["steps"] == 0
        weights, repo = left["forbidden_stages"]["weights"], hub.repos["me/again"]
        pushed = load(repo.files["model.safetensors"])
        assert all(torch.equal(weights[key], pushed[key]) for key in weights)
        assert {*repo.files} == MODEL | TOKENIZER | EVIDENCE | {"lineage.json"}
    with subtests.test("500 once: the request is repeated, the commit is not"):
        asked = [request.split("/")[5] for request in hub.requests if "POST /api/models/me/flaky/" in request]
        assert asked == ["preupload", "preupload", "commit", "preupload", "commit"]
        assert "500" in left["flaky"]["error"]
    with subtests.test("pushed at the second try"):
        assert [commit.message for commit in hub.repos["me/flaky"].pushes] == ["Second try"]
        assert {*hub.repos["me/flaky"].files} == MODEL | TOKENIZER | EVIDENCE


@pytest.mark.slow
def test_a_repository_that_may_not_be_written_to_is_told_of_before_the_training(tmp_path, subtests):
    with running() as hub:
        hub.repos["me/read_only"] = repo = Repo(private=False)
        repo.add("initial commit", "main", {}, ())
        hub.read_only = {"me/read_only"}
        hub.failures = {"GET /api/models/me/unasked/auth-check/write": [404]}
        left = push(hub, tmp_path, "read_only", "unasked")
    for place in ("training", "stages", "push"):
        with subtests.test(place):
            assert "403 Forbidden" in left["read_only"][place]
            assert "The student cannot be pushed to me/read_only: this token may" in left["read_only"][place]
    assert not left["read_only"]["trained"]
    assert repo.pushes == []
    with subtests.test("a Hub that is no answer to it"):
        assert [commit.message for commit in hub.repos["me/unasked"].pushes][-1] == "Went well"
        assert hub.failures == {"GET /api/models/me/unasked/auth-check/write": []}
