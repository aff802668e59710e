"""A Hub that refuses says why, as with `Trainer`, and the student stays whole in its folder."""

import pytest
import torch
from safetensors.torch import load, load_file

from tests.hub.hub_server import running
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
        asked = [request.split("/")[5] for request in hub.requests if "/me/flaky/" in request and "/api/" in request]
        assert asked == ["preupload", "preupload", "commit", "preupload", "commit"]
        assert "500" in left["flaky"]["error"]
    with subtests.test("pushed at the second try"):
        assert [commit.message for commit in hub.repos["me/flaky"].pushes] == ["Second try"]
        assert {*hub.repos["me/flaky"].files} == MODEL | TOKENIZER | EVIDENCE
