"""Functions of tests in processes of their own, forked by a server that has imported the libraries and run nothing.

So they inherit neither threads nor `accelerate`'s state from the tests, and do not wait for the imports each time.
"""

import gc
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from accelerate import debug_launcher

_SERVER = multiprocessing.get_context("forkserver")
# Without hf_distill, whose own imports take no time after these: what loads without it is shown by such processes.
_SERVER.set_forkserver_preload(
    ["accelerate", "datasets", "peft", "scipy.stats", "sklearn.metrics", "transformers.trainer"]
)
_TIMEOUT_S = 600


def run_alone(function: Callable[..., Any], *args: Any) -> None:
    """Runs a function of a module in a process of its own; what it raises there is on the test's stderr."""
    process = _SERVER.Process(target=_quietly, args=(function, *args))
    process.start()
    process.join(_TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{function.__module__}.{function.__name__} ended with {process.exitcode}"


def run_twice(function: Callable[..., Any], *args: Any) -> None:
    """Runs a function of a module in two processes at once, which reach each other over gloo."""
    run_alone(_launch, function, *args)


def _quietly(function: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each training collects garbage over all that was imported
    function(*args)


def _launch(function: Callable[..., Any], *args: Any) -> None:
    debug_launcher(function, args=args, num_processes=2)
