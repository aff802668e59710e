"""Compares our losses of logits, value and gradient, with those of other packages.

How to run it and what it shows: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.environment import environment, installed_version
from benchmarks.parity.contenders import ABSENT, COMPARISONS, PACKAGES
from benchmarks.parity.measure import AGREES_BELOW, compared
from benchmarks.parity.table import markdown


def main() -> int:
    """The exit status: 1 if all was required to be as `contenders.py` has it, and is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--packages", default=",".join(PACKAGES), help="comma separated; default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    parser.add_argument("--table", type=Path, metavar="JSON", help="print these results; run nothing")
    parser.add_argument("--require", action="store_true", help="exit 1 unless all is as contenders.py has it")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())), end="")
        return 0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    packages = options.packages.split(",")
    if unknown := [package for package in packages if package not in PACKAGES]:
        raise SystemExit(f"Unknown packages {unknown}; known: {', '.join(PACKAGES)}.")
    versions = {package: installed_version(package) for package in packages}
    results = {
        "environment": environment(),
        "contenders": {package: version for package, version in versions.items() if version},
        "skipped": {package: "not installed here" for package, version in versions.items() if not version},
        "absent": ABSENT,
        "dtype": "float64",
        "agrees_below": AGREES_BELOW,
        "comparisons": [compared(comparison) for comparison in COMPARISONS if versions.get(comparison.package)],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(markdown(results), end="")
    surprises = [
        f"{result['rival']} / {result['ours']}" for result in results["comparisons"] if not result["as_expected"]
    ]
    surprises += [f"{package} did not run" for package in results["skipped"]]
    if options.require and surprises:
        print("not as expected:", *surprises, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
