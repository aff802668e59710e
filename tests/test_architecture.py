"""The layers of the design, read from the source, and the sizes that keep a file about one thing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_distill
from tests import loading
from tests.processes import run_alone

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_distill"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_SCRIPT_LINES = 80
MAX_PUBLIC_NAMES = 20

# A module may import from its own layer and from the layers before it. A new file of the package gets its place here.
LAYERS = (
    ("words", {"registry", "signals", "features", "files"}),
    (
        "pure functions",
        {"losses", "schedules", "layer_mapping", "alignment", "metrics", "items", "shared_tokens", "token_alignment"},
    ),
    ("model surgery", {"models"}),
    (
        "sources and settings",
        {"temperature", "teachers", "config", "presets", "collator", "pairing"}
        | {"weighting", "phrase_index", "phrases", "row_weights", "generation", "text", "sources"},
    ),
    (
        "composition",
        {"accounting", "batches", "objective", "task_loss", "fused_terms", "gathering", "matching", "progress"}
        | {"targets", "objective_checks", "balancing", "temperature_log", "item_weights", "learned", "chunked_terms"}
        | {"sparse_terms"},
    ),
    (
        "glue",
        {
            "arguments",
            "trainer",
            "layer_setup",
            "layer_training",
            "callbacks",
            "checks",
            "dataset_checks",
            "setup",
            "evaluation",
            "histograms",
            "step",
        }
        | {"stages", "stage_plan", "stage_runner", "lineage", "weighting_checks", "logit_setup", "chunked_step"}
        | {"publishing", "checkpoints"}
        | {"provenance", "run_record", "evidence", "card", "report"}
        | {"adapters", "on_policy", "on_policy_arguments", "text_setup", "teacher_scores"},
    ),
    ("edges", {"cli", "demo", "recipes", "__main__"}),
)
LAYER_OF = {part: number for number, (_, parts) in enumerate(LAYERS) for part in parts}
EDGES = len(LAYERS) - 1

MODULES = sorted(PACKAGE.rglob("*.py"))
CODE = sorted(
    path for folder in ("hf_distill", "scripts", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def name_of(path):
    """The dotted name of a file: `hf_distill.losses.base`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree, importer):
    """The modules of the package that an import statement anywhere in the tree names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "hf_distill"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer} has a relative import on line {node.lineno}; write the whole name"
            if node.module.split(".")[0] != "hf_distill":
                continue
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in NAMES else node.module)
    return found


def part_of(module):
    """The file or folder directly under the package: `losses` for `hf_distill.losses.base`, '' for the package."""
    return [*module.split("."), ""][1]


def layer_breaks(importer, modules):
    """What the importer may not import, with the reason."""
    own = LAYER_OF[part_of(importer)]
    for module in sorted(modules):
        part = part_of(module)
        if part == "":
            if own < EDGES:
                yield f"{importer} imports from the package's root, which imports everything"
        elif LAYER_OF[part] > own:
            yield f"{importer} ({LAYERS[own][0]}) imports {module} ({LAYERS[LAYER_OF[part]][0]}), a later layer"


def test_every_module_has_its_layer():
    parts = {part_of(name) for name in NAMES} - {""}
    assert parts <= set(LAYER_OF), f"give these a layer in LAYERS: {sorted(parts - set(LAYER_OF))}"


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_a_module_imports_only_from_its_layer_or_before(path):
    name = name_of(path)
    assert list(layer_breaks(name, imported(parse(path), name))) == []


def test_a_break_of_the_layers_would_be_seen():
    tree = ast.parse("def late():\n    from hf_distill.trainer import DistillationTrainer\n")
    assert len(list(layer_breaks("hf_distill.losses.base", imported(tree, "hf_distill.losses.base")))) == 1
    assert list(layer_breaks("hf_distill.demo.training", imported(tree, "hf_distill.demo.training"))) == []
    root = ast.parse("from hf_distill import forward_kl\n")
    assert len(list(layer_breaks("hf_distill.objective", imported(root, "hf_distill.objective")))) == 1


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        name_of(path): imported(parse(path), name_of(path)) & NAMES
        for path in MODULES
        if path.parent != PACKAGE.parent
    }
    graph["hf_distill"] = set()  # lazy: its imports run on first use
    done, open_path = set(), []

    def visit(name):
        assert name not in open_path, " -> ".join([*open_path[open_path.index(name) :], name])
        if name in done:
            return
        open_path.append(name)
        for other in sorted(graph[name] - {name}):
            visit(other)
        done.add(open_path.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    limit = MAX_SCRIPT_LINES if path.parent == ROOT / "scripts" else MAX_FILE_LINES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{lines} lines; split by what changes together"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_file_is_called_utils():
    assert [str(path) for path in CODE if path.stem in ("utils", "util", "helpers", "misc")] == []


def loaded_by(statement, *packages):
    """Which of the packages a fresh interpreter has loaded after the statement."""
    code = f"{statement}; import sys; print(*[name for name in {packages!r} if name in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()


def test_importing_the_package_loads_no_torch():
    assert loaded_by("import hf_distill", "torch", "transformers", "evaluate", "datasets") == []


def test_importing_the_losses_and_making_metrics_load_no_transformers():
    statement = "import hf_distill.losses, hf_distill.metrics as m; m.compute_metrics_for('causal_lm')"
    assert loaded_by(statement, "torch", "transformers", "evaluate", "datasets") == ["torch"]


def test_the_trainer_does_not_load_evaluate():
    run_alone(loading.load_the_trainer)


def test_public_names_are_few_and_all_there():
    assert len(hf_distill.__all__) <= MAX_PUBLIC_NAMES
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name).__module__.startswith("hf_distill."), name
    with pytest.raises(AttributeError, match="DistillationTrainer"):
        importlib.import_module("hf_distill").no_such_name  # noqa: B018
