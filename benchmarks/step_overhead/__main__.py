"""Times a distillation step against its floor and against the naive trainer, and measures its memory.

How to run it and what it shows: benchmarks/README.md.
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

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.environment import environment
from benchmarks.step_overhead.contenders import BACKBONES, OF_LANGUAGE_MODELS
from benchmarks.step_overhead.measure import MEMORY_RUNS, extra_peak, extra_peak_here, time_in_turns, waits_of_the_host
from benchmarks.step_overhead.workloads import WORKLOADS

ROUNDS = {"bert": 20, "llama": 7, "llama-152k": 3}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One workload: time, memory and, on a GPU where asked, waits of the host."""
    workload, where = WORKLOADS[name], {"device": options.device, "bf16": options.bf16}
    rows = time_in_turns(name, rounds=options.rounds or ROUNDS[name], **where)
    for contender, row in rows.items():
        row["extra_peak_mib"] = extra_peak(name, contender, runs=options.memory_runs, **where)
        if options.check_sync:
            row["host_waits_at"] = waits_of_the_host(name, contender, bf16=options.bf16)
    goals, reached = {"time_over_floor": workload.time_goal}, {"time_over_floor": rows["ours"]["time_over_floor"]}
    if workload.memory_goal is not None:
        before = rows[BACKBONES]["extra_peak_mib"]
        own, naive = (rows[contender]["extra_peak_mib"] - before for contender in ("ours", "naive"))
        goals["extra_peak_over_naive"], reached["extra_peak_over_naive"] = workload.memory_goal, own / naive
    return {"title": workload.title, "contenders": rows, "goals": goals, "reached": reached}


def markdown(results: dict[str, Any]) -> str:
    """One table per workload, with the goals below it."""
    parts = []
    for entry in results["workloads"].values():
        lines = [
            f"### {entry['title']}",
            "",
            "| trainer | time / floor | quartiles | processor time / floor | seconds | extra peak memory |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, row in entry["contenders"].items():
            quartiles = f"{row['time_over_floor_lower_quartile']:.3f} to {row['time_over_floor_upper_quartile']:.3f}"
            lines.append(
                f"| {name} | {row['time_over_floor']:.3f} | {quartiles} "
                f"| {row['processor_time_over_floor']:.3f} | {row['seconds']:.4g} "
                f"| {row['extra_peak_mib']:.0f} MiB |"
            )
        lines += ["", *(f"- {name}: {entry['reached'][name]:.3f}, goal at most {goal}"
                        for name, goal in entry["goals"].items())]  # fmt: skip
        waits = {name: row["host_waits_at"] for name, row in entry["contenders"].items() if "host_waits_at" in row}
        lines += [f"- {name} waits for the GPU: {place or 'nowhere'}" for name, place in waits.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def missed(results: dict[str, Any]) -> list[str]:
    """The goals that were not reached, and a wait of the host in our loss."""
    faults = []
    for name, entry in results["workloads"].items():
        faults += [f"{name}: {goal}" for goal, most in entry["goals"].items() if entry["reached"][goal] > most]
        place = entry["contenders"]["ours"].get("host_waits_at")
        faults += [f"{name}: the host waits at {place}"] if place else []
    return faults


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, help=f"at least 2; default by workload: {ROUNDS}")
    parser.add_argument("--memory-runs", type=int, default=MEMORY_RUNS, help="processes whose median peak is taken")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as TrainingArguments(bf16=True)")
    parser.add_argument("--check-sync", action="store_true", help="also find waits for the GPU in compute_loss")
    parser.add_argument("--require", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_overhead.json"))
    parser.add_argument("--memory-of", choices=list(OF_LANGUAGE_MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check_sync and options.device != "cuda":
        parser.error("--check-sync looks for waits for a GPU; add --device cuda")
    return options


def main() -> int:
    """The exit status: 1 if a goal is required and missed."""
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    if options.memory_of:
        peak = extra_peak_here(options.workloads[0], options.memory_of, device=options.device, bf16=options.bf16)
        print(json.dumps(peak))
        return 0
    results = {
        "environment": environment(device=options.device) | {"bf16": options.bf16},
        "workloads": {name: measure(name, options) for name in options.workloads},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results), end="")
    faults = missed(results) if options.require else []
    print("".join(f"missed: {fault}\n" for fault in faults), end="", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
