"""Runs the contenders that this environment can import, or prints the table of earlier runs.

How to run it and what it shows: benchmarks/README.md and docs/exactness.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from benchmarks.exactness.contenders import CONTENDERS
from benchmarks.exactness.models import CASES
from benchmarks.exactness.steps import SPLITS, Step, steps_of, worker
from benchmarks.exactness.table import REFERENCE, is_exact, markdown

TRL_STABLE = (
    "trl.DistillationTrainer is always on-policy: it generates the completions it trains on, "
    "so the same static rows cannot be given to it"
)


def measured(name: str, split: str, step: Step | str, reference: Step | str) -> dict[str, Any]:
    """One line of results: a step compared with the 8x1 step of the same contender and model."""
    row: dict[str, Any] = {"model": name, "split": split}
    for outcome in (step, reference):
        if isinstance(outcome, str):
            return row | {"failed": outcome}
    difference = (step.gradient - reference.gradient).norm() / reference.gradient.norm()
    return row | {
        "loss": step.loss,
        "gradient_norm": step.gradient.norm().item(),
        "loss_ratio": step.loss / reference.loss,
        "gradient_error": difference.item(),
    }


def run_contender(key: str, models: list[str]) -> dict[str, Any]:
    """All splits of one contender."""
    contender = CONTENDERS[key]
    refused = {name: contender.refuses(CASES[name]) for name in models}
    cases = [name for name in models if refused[name] is None]
    rows, references = [], {}
    for split in SPLITS:
        steps = steps_of(key, split, cases)
        references = steps if split == REFERENCE else references
        rows += [measured(name, split, step, references[name]) for name, step in steps.items()]
        print(f"{key}, {split}: {len(steps)} models", file=sys.stderr, flush=True)
    return {
        "title": contender.title,
        "version": contender.version(),
        "not_made_for": [{"model": name, "reason": reason} for name, reason in refused.items() if reason],
        "steps": rows,
    }


def run(keys: list[str], models: list[str], destination: Path) -> dict[str, Any]:
    """Runs what can be run here, writes the results with their environment, and returns them."""
    skipped = {key: reason for key in keys if (reason := CONTENDERS[key].unavailable())}
    for key, reason in skipped.items():
        print(f"{key} skipped: {reason}", file=sys.stderr)
    results = {
        "environment": environment(),
        "contenders": {key: run_contender(key, models) for key in keys if key not in skipped},
        "skipped": skipped | {"trl_distillation": TRL_STABLE},
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_text(json.dumps(results, indent=1) + "\n")
    return results


def merged(files: list[Path]) -> dict[str, Any]:
    """The contenders of several results files, in the order of `CONTENDERS`; a later file wins."""
    found: dict[str, Any] = {}
    for file in files:
        found |= json.loads(file.read_text())["contenders"]
    return {key: found[key] for key in CONTENDERS if key in found}


def inexact(entry: dict[str, Any]) -> list[str]:
    """The steps of one contender that failed or that depend on the split."""
    faults = [row for row in entry["steps"] if "failed" in row or not is_exact(row)]
    return [f"{row['model']}, {row['split']}" for row in faults]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma separated; default: all")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exactness.json"))
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="print these results; run nothing")
    parser.add_argument("--require", choices=list(CONTENDERS), help="exit 1 unless every step of this one is exact")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--split", choices=list(SPLITS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """The exit status: 1 if a required contender is not exact."""
    options = parse()
    if options.table:
        print(markdown(merged(options.table)), end="")
        return 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if options.worker:
        worker(options.worker, options.split, options.models, options.out)
        return 0
    keys = options.contenders.split(",")
    unknown = [key for key in keys if key not in CONTENDERS]
    if unknown:
        raise SystemExit(f"Unknown contenders {unknown}; known: {', '.join(CONTENDERS)}.")
    results = run(keys, options.models, options.out)
    print(markdown(results["contenders"]), end="")
    if options.require:
        entry = results["contenders"].get(options.require)
        faults = inexact(entry) if entry else [f"{options.require} did not run"]
        print("\n".join(faults), file=sys.stderr)
        return 1 if faults else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
