"""The site of the docs: it builds without a warning, holds together, loads nothing from elsewhere, and is true."""

import ast
import inspect
import json
import os
import posixpath
import re
import statistics
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec

import pytest
import yaml

import hf_distill
from docs import make_options
from hf_distill.cli.main import COMMANDS
from hf_distill.losses import LOSSES
from hf_distill.presets import preset_names
from hf_distill.recipes.data import COLUMNS
from hf_distill.recipes.reading import recipe_of
from hf_distill.recipes.recipe import Recipe
from hf_distill.report.baselines import BASELINES
from hf_distill.report.options import ReportOptions
from tests.test_docs import DOCS, ROOT, blocks

CSS = (DOCS / "assets" / "site.css").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
PUBLIC = ("", ".config", ".losses", ".metrics", ".models.student", ".presets", ".stages", ".teachers", ".temperature")
PUBLIC += (".losses.batch_relations", ".losses.domain", ".report", ".report.results")
# The build must not need what the package needs: names and docstrings are read, not imported.
BUILD = """
import sys
from mkdocs.__main__ import cli
cli(["build", "--strict", "--quiet", "--site-dir", sys.argv[1]], standalone_mode=False)
assert not {"torch", "transformers", "hf_distill"} & {*sys.modules}
"""


class Page(HTMLParser):
    """What a page of the site has: ids, links, what it loads, and its paragraphs."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.paragraphs, self.within = set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in attrs:
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(attrs["href"])
        if tag == "p":
            self.paragraphs.append("")
        self.within.append(tag)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if "p" in self.within and "code" not in self.within:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not all(map(find_spec, ("mkdocs", "material", "mkdocstrings_handlers"))):
        pytest.skip("the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_page_and_an_anchor_of_it(site, pages):
    lost = []
    for name, page in pages.items():
        if name == "404.html":  # served in place of any page, so its links begin at the root
            continue
        for link in page.links:
            path, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            found = (site / target).is_file()
            if not found or (anchor and target in pages and anchor not in pages[target].ids):
                lost.append((name, link))
    assert lost == []


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site, pages):
    loaded = {(name, source) for name, page in pages.items() if name != "404.html" for source in page.loads}
    assert [
        pair for pair in sorted(loaded) if re.match(r"(\w+:)?//", pair[1]) or pair[1].startswith("data:text")
    ] == []
    for name, source in loaded:
        assert (site / posixpath.normpath(posixpath.join(posixpath.dirname(name), source))).is_file(), (name, source)


@pytest.mark.slow
def test_lists_and_tables_are_shown_as_such(pages):
    broken = [
        (name, text[:100])
        for name, page in pages.items()
        for text in page.paragraphs
        if re.search(r"^\s*\||^- |\n(- |\| |#+ |\d\. )", text)
    ]
    assert broken == []


@pytest.mark.slow
@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_function_and_class_has_its_place_in_the_api_pages(pages, module):
    found = import_module(f"hf_distill{module}")
    names = getattr(found, "__all__", None) or [
        name
        for name, own in vars(found).items()
        if name[0] != "_" and getattr(own, "__module__", "") == found.__name__
    ]
    shown = {
        str(key).rpartition(".")[2] for name, page in pages.items() if name.startswith("api/") for key in page.ids
    }
    callables = [name for name in names if inspect.isfunction(own := getattr(found, name)) or inspect.isclass(own)]
    assert {*callables} - shown == set()
    assert callables


@pytest.mark.slow
@pytest.mark.parametrize("word", ["forward_kl", "kd_weight", "DistillationTrainer", "there is no teacher"])
def test_the_search_knows(site, word):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any(word in entry["text"] or word in entry["title"] for entry in index["docs"])


def test_the_page_of_arguments_is_what_its_script_writes():
    assert (DOCS / "options.md").read_text(encoding="utf-8") == make_options.page(), "python -m docs.make_options"


def test_every_argument_has_a_row():
    from transformers import TrainingArguments

    own = {*inspect.signature(hf_distill.DistillationTrainingArguments).parameters}
    rows = {*re.findall(r"^\| `(\w+)` \|", make_options.page(), flags=re.MULTILINE)}
    assert own - {*inspect.signature(TrainingArguments).parameters} <= rows


def messages():
    """Every text in the package, with … for what is filled in."""
    for path in (ROOT / "hf_distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_messages_in_the_troubleshooting_are_those_of_the_code():
    known = [*messages()]
    assert [quoted for quoted in QUOTED if not any(quoted in message for message in known)] == []
    assert len({*QUOTED}) == len(QUOTED) >= 30


@pytest.mark.parametrize("data", ["trec6", "snips"])
def test_the_accuracies_in_the_guide_to_choosing_are_those_measured(data):
    measured = json.loads((ROOT / "benchmarks" / "results" / f"quality-{data}.json").read_text(encoding="utf-8"))
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    for runs in measured["arms"].values():
        accuracies = [run["accuracy"] for run in runs]
        assert f"| {statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} |" in page


def test_the_page_of_the_command_line_names_every_command_and_reads_as_a_recipe():
    page = (DOCS / "command_line.md").read_text(encoding="utf-8")
    table = "".join(re.findall(r"^\| `.*$", page.split("## Recipes")[0], flags=re.MULTILINE))
    assert [command for command in COMMANDS if f"`{command} " not in table] == []
    (written,) = blocks(page, "yaml")
    assert recipe_of(yaml.safe_load(written)).arguments["temperature"] == 2
    for section in fields(Recipe):
        assert f"| `{section.name}` |" in page
    for needed, more in COLUMNS.values():
        assert all(f"`{column}`" in page for column in (*needed, *more))
    assert {*re.findall(r"\(\.\./examples/recipes/(.*?)\)", page)} == {
        path.name for path in (ROOT / "examples" / "recipes").glob("*.yaml")
    }


def test_the_page_of_the_report_names_what_there_is():
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    first = {
        word for row in re.findall(r"^\| (`.+?) \|", page, flags=re.MULTILINE) for word in re.findall(r"`(\S+?)`", row)
    }
    known = {field.name for field in fields(ReportOptions)} | {*BASELINES} | {"undistilled="}
    assert {word for word in first if not word.endswith(".png")} <= known
    assert {*BASELINES} <= first
    assert {word for word in first if word.endswith(".png")} == {
        f"{draw}.png" for draw in ("tradeoff", "confusion", "losses", "dynamics")
    }


def test_the_guide_to_choosing_names_presets_and_losses_that_there_are():
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    presets = page.split("## A preset\n")[1].split("\n## ")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"\|([^|]*)\|$", presets, flags=re.MULTILINE)))
    assert named
    assert {*named} <= {*preset_names()}
    losses = page.split("## The loss\n")[1].split("\n## ")[0]
    tried = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|([^|]*)\|", losses, flags=re.MULTILINE)))
    assert tried
    assert {*tried} - {"temperature"} <= {*preset_names(), *LOSSES}


def luminance(colour):
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """As WCAG 2 has it: 1 for equal colours, 21 for black on white."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


PAPER = {"default": "#ffffff", "slate": "#1e2129"}  # what pages are printed on; Material's own


@pytest.mark.parametrize("scheme", PAPER)
def test_text_of_every_colour_can_be_read(scheme):
    block = re.search(rf'\[data-md-color-scheme="{scheme}"\] {{(.*?)}}', CSS, flags=re.DOTALL)[1]
    colours = dict(re.findall(r"--md-([\w-]+): (#\w{6})\b", block))
    pairs = [(colours["primary-bg-color"], colours["primary-fg-color"])]
    pairs += [(colours[name], PAPER[scheme]) for name in ("typeset-a-color", "accent-fg-color")]
    pairs += [(colour, colours["code-bg-color"]) for name, colour in colours.items() if name.startswith("code-hl")]
    assert len(pairs) >= 9
    assert [(pair, contrast(*pair)) for pair in pairs if contrast(*pair) < 4.5] == []


def test_a_notebook_becomes_a_page_of_its_cells(tmp_path):
    pytest.importorskip("mkdocs")
    from docs.site_pages import text_of

    cells = [{"cell_type": "markdown", "source": ["# One\n", "text"]}, {"cell_type": "code", "source": ["a = 1"]}]
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": cells}))
    assert text_of(tmp_path / "one.ipynb") == "# One\ntext\n\n```python\na = 1\n```\n"
