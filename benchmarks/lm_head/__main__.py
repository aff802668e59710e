"""Task and logit term from hidden states: time and peak memory against the bare products and the naive composition.

    python -m benchmarks.lm_head                              # one CPU thread, float32 and bfloat16
    python -m benchmarks.lm_head --sizes 8192x151936x896x1536 --contenders "products alone" ours
    python -m benchmarks.lm_head --device cuda --dtypes bfloat16

A size is items x classes x width of the student x width of the teacher. Rivals are measured where they are installed.
Writes benchmarks/results/lm_head.json (lm_head-cuda.json on a GPU). On a CPU it needs Linux, which keeps the peak of a
process's resident memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.lm_head.contenders import FLOOR, contenders
from benchmarks.lm_head.measure import Size, measure

RESULTS = Path(__file__).parents[1] / "results"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2048x32000x512x1024"], metavar="NxVxHxH")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", help=f"default: all that are installed; needs {FLOOR!r}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    known = contenders()
    options.contenders = options.contenders or [*known]
    if FLOOR not in options.contenders or not {*options.contenders} <= {*known}:
        parser.error(f"--contenders: {FLOOR!r} and any of {', '.join(map(repr, known))}")
    return options


def main() -> None:
    """Measures, prints and writes the results."""
    options = parse()
    torch.set_num_threads(options.threads)
    cases = []
    for text in options.sizes:
        size = Size(*(int(number) for number in text.split("x")))
        for dtype in options.dtypes:
            found = measure(size, dtype, options.contenders, options)
            cases.append({**size._asdict(), "dtype": dtype, "rounds": options.rounds, "contenders": found})
            print(json.dumps(cases[-1], indent=1), flush=True)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    output = options.output or RESULTS / f"lm_head{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(device=options.device), "results": cases}
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
