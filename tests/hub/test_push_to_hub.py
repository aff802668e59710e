"""A distilled student on the Hub is the student alone: whoever loads it needs none of this, and finds no secret."""

import pytest
import torch

from tests.hub.hub_server import running
from tests.hub.processes import EVIDENCE, MODEL, SECRETS, TOKENIZER, download, holding, push

GENERATION = {"generation_config.json"}
REPORT = {
    f"distillation/{name}" for name in ("report.json", "report.md", "confusion.png", "losses.png", "tradeoff.png")
}
FILES = {
    "layers": MODEL | TOKENIZER | REPORT,
    "causal": MODEL | TOKENIZER | GENERATION,
    "adapter": {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin", *TOKENIZER},
    "speech": MODEL | TOKENIZER | GENERATION | {"processor_config.json"},
}


@pytest.mark.slow
def test_pushed_students_are_loaded_again_without_us_and_say_the_same(tmp_path, subtests):
    with running() as hub:
        pushed = push(hub, tmp_path, *FILES)
        loaded = download(hub, tmp_path, *FILES)
    for name, files in FILES.items():
        repo = hub.repos[f"me/{name}"]
        with subtests.test("files", student=name):
            assert {path for path in repo.files if not path.startswith("runs/")} == files | EVIDENCE
        with subtests.test("logits", student=name):
            assert torch.equal(loaded[name]["logits"], pushed[name]["logits"])
            assert (loaded[name]["keys"], loaded[name]["said"]) == ({}, [])
        with subtests.test("commits", student=name):
            assert len(repo.pushes) == 1
    with subtests.test("message, privacy"):
        assert [hub.repos[f"me/{n}"].pushes[0].message for n in FILES] == [
            "A student",
            "Model save",
            "End of training",
            "End of training",
        ]
        assert [hub.repos[f"me/{n}"].private for n in FILES] == [False, True, False, False]
        assert pushed["layers"]["commit"] == hub.repos["me/layers"].pushes[0].oid
    with subtests.test("secrets"):
        assert {"Bearer " + token for token in SECRETS[:2]} == hub.tokens
        assert pushed["layers"]["kept"] == SECRETS[0]
        assert pushed["layers"]["saved"] == (None, "me/layers", 1.0)
        assert [holding(hub, token) for token in SECRETS] == [set(), set(), set()]
    with subtests.test("local paths"):
        # `output_dir` among the arguments: as any Trainer saves and logs it, and as resuming tools expect it.
        logs = [path for path in hub.repos["me/layers"].files if path.startswith("runs/")]
        kept = {f"me/{name}/training_args.bin" for name in FILES} | {f"me/layers/{path}" for path in logs}
        assert len(logs) == 1
        assert {place for place in holding(hub, str(tmp_path)) if not place.startswith("PUT ")} == kept
        assert holding(hub, "home-of-alice") == set()
