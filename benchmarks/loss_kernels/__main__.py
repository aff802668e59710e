"""Value and gradient of the losses on given logits: time and peak memory against the naive composition.

    python -m benchmarks.loss_kernels                  # one CPU thread, float32 and bfloat16
    python -m benchmarks.loss_kernels --cases tvd top_k_kl --temperatures 2 --dtypes float32 --output tvd.json
    python -m benchmarks.loss_kernels --device cuda --items 8192 --classes 152000

Writes benchmarks/results/loss_kernels.json (loss_kernels-cuda.json on a GPU). On a CPU it needs Linux, which keeps the
peak of a process's resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.loss_kernels.contenders import BY_DEFAULT, CASES
from benchmarks.loss_kernels.measure import Setting, measure

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(BY_DEFAULT))
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = itertools.starmap(Setting, itertools.product(options.cases, options.dtypes, options.temperatures))
    results = {
        "environment": environment(device=options.device),
        "settings": {name: getattr(options, name) for name in ("items", "classes", "rounds")},
        "results": [{**setting._asdict(), "contenders": measure(options, setting)} for setting in settings],
    }
    text = json.dumps(results, indent=2)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    output = options.output or RESULTS / f"loss_kernels{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
