"""Times distillation steps with terms between the layers, and measures their memory.

How to run it and what it shows: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from benchmarks.layers.contenders import CONTENDERS
from benchmarks.layers.measure import extra_peak, extra_peak_here, time_in_turns
from benchmarks.layers.workloads import GOALS, title


def measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One length: time and memory of every contender, and how ours stands to the goals."""
    where = {"device": options.device, "bf16": options.bf16, "dropout": options.attention_dropout}
    rows = time_in_turns(length, rounds=options.rounds, **where)
    for contender, row in rows.items():
        row["extra_peak_mib"] = extra_peak(length, contender, **where)
    for row in rows.values():
        row["extra_peak_over_eager"] = row["extra_peak_mib"] / rows["eager"]["extra_peak_mib"]
    goals = {name: most for name, most in asdict(GOALS[length]).items() if most is not None}
    return {"title": title(length), "contenders": rows, "goals": goals}


def markdown(results: dict[str, Any]) -> str:
    """One table per length, with the goals below it."""
    parts = []
    for entry in results["lengths"].values():
        lines = [
            f"### {entry['title']}",
            "",
            "| trainer | time / floor | quartiles | processor time / floor | time / eager | seconds "
            "| extra peak memory | / eager |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, row in entry["contenders"].items():
            quartiles = f"{row['time_over_floor_lower_quartile']:.3f} to {row['time_over_floor_upper_quartile']:.3f}"
            lines.append(
                f"| {name} | {row['time_over_floor']:.3f} | {quartiles} | {row['processor_time_over_floor']:.3f} "
                f"| {row['time_over_eager']:.3f} | {row['seconds']:.4g} | {row['extra_peak_mib']:.0f} MiB "
                f"| {row['extra_peak_over_eager']:.2f} |"
            )
        lines += ["", *(f"- ours, {name}: {entry['contenders']['ours'][name]:.3f}, goal at most {most}"
                        for name, most in entry["goals"].items())]  # fmt: skip
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def missed(results: dict[str, Any]) -> list[str]:
    """The goals that were not reached."""
    return [
        f"length {length}: {goal}"
        for length, entry in results["lengths"].items()
        for goal, most in entry["goals"].items()
        if entry["contenders"]["ours"][goal] > most
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as TrainingArguments(bf16=True)")
    parser.add_argument("--attention-dropout", type=float, default=0.0, help="of both models; BERT's own is 0.1")
    parser.add_argument("--require", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """The exit status: 1 if a goal is required and missed."""
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if options.memory_of:
        peak = extra_peak_here(
            options.lengths[0],
            options.memory_of,
            device=options.device,
            bf16=options.bf16,
            dropout=options.attention_dropout,
        )
        print(json.dumps(peak))
        return 0
    results = {
        "environment": environment(device=options.device)
        | {"bf16": options.bf16, "attention_dropout": options.attention_dropout},
        "lengths": {str(length): measure(length, options) for length in options.lengths},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), end="")
    faults = missed(results) if options.require else []
    print("".join(f"missed: {fault}\n" for fault in faults), end="", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
