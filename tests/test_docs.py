"""The user's pages say what the code does: recipes, names and examples are read back from them."""

import re
from pathlib import Path

import pytest

from hf_distill.config import DistillationConfig
from hf_distill.config.matches import MASKS
from hf_distill.features import ATTENTION_KINDS, POOLINGS
from hf_distill.layer_mapping import MAPS
from hf_distill.losses import LOSSES
from hf_distill.presets import load_preset, preset_names
from tests import tiny

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LAYERS = (DOCS / "layers.md").read_text(encoding="utf-8")
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """As GitHub makes them: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", preset_names())
def test_the_page_of_a_preset_has_its_file_word_for_word_and_its_paper(name):
    page = (DOCS / "presets" / f"{name}.md").read_text(encoding="utf-8")
    packaged = (ROOT / "hf_distill" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert blocks(page, "yaml") == [packaged]
    assert f"# {load_preset(name).title}\n" in page
    assert f'preset="{name}"' in page
    assert load_preset(name).paper.rpartition("arXiv:")[2] in page


def test_the_table_of_presets_has_them_all():
    table = (DOCS / "presets" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]\(\1\.md\)", table, flags=re.MULTILINE) == [*preset_names()]


BETWEEN_LAYERS = [name for name in LOSSES if LOSSES.get(name).feature != "logits"]  # the others: test_objective_docs


@pytest.mark.parametrize("name", [*BETWEEN_LAYERS, *MASKS, *ATTENTION_KINDS, *POOLINGS, *MAPS])
def test_every_loss_map_mask_feature_and_pooling_is_explained(name):
    assert re.search(rf"\b{name}\b", LAYERS)


def test_every_loss_between_layers_has_a_row_with_its_item_and_its_paper():
    rows = {row[0]: row for row in re.findall(r"^\| `(\w+)` \|(.+)$", LAYERS, flags=re.MULTILINE)}
    for spec in map(LOSSES.get, BETWEEN_LAYERS):
        cells = rows[spec.name][1]
        assert f"| {spec.item}" in cells, spec.name
        assert all(number in cells for number in re.findall(r"arXiv:\S+\d", spec.paper)), spec.name


@pytest.mark.parametrize("text", blocks(LAYERS, "yaml"))
def test_the_recipes_load_and_survive_being_written(text):
    config = DistillationConfig.from_yaml(text)
    assert DistillationConfig.from_yaml(config.to_yaml()) == config


def test_the_quick_start_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, teacher = tiny.pair("bert")
    names = {"student": student, "teacher": teacher, "train": tiny.rows("sequence")}
    exec(blocks(LAYERS, "python")[0], names)
    logged = names["trainer"].state.log_history[-1]
    assert logged["train_loss"] > 0
    assert [match.name for match in names["args"].distillation.matches] == ["hidden", "attention"]
    assert (tmp_path / "distilled" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
