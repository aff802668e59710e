"""What a model costs to keep and to run: parameters, bytes on disk, memory, operations and time."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig
from transformers.utils import logging

from hf_distill.models.heads import context_length, task_model
from hf_distill.models.modules import ATTRIBUTE
from hf_distill.report.results import Cost, Timing
from hf_distill.teachers import in_eval_mode

# Attention that is made of operations which the counter knows; kernels of other packages are not.
_COUNTED_ATTENTION = (None, "eager", "sdpa", "flex_attention")
_SILENT = "6"

# What a model raises that cannot do with some inputs, or finds no memory for them.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)
# A model right after another finds its weights out of the processor's caches, which a small one pays for with a
# quarter of its time: it runs so often in a row, after a pass that is not timed.
_IN_A_ROW = 5

MakeBatch: TypeAlias = Callable[[int, int | None], Mapping[str, Any]]


@dataclass(frozen=True)
class Runner:
    """A model and what its time is taken on.

    Attributes:
        model: a Transformers or PEFT model, or any module whose forward takes a batch's entries by name.
        make_batch: from a number of rows and a length to the forward's inputs, on any device and without labels.
        lengths: tokens of a row, or frames; None stands for inputs of one size, as images. Those that the model cannot
            read are left out.
    """

    model: nn.Module
    make_batch: MakeBatch
    lengths: Sequence[int | None]

    def fitting(self) -> list[int | None]:
        """The lengths that the model can read."""
        # A module that is none of Transformers' says nothing of its positions.
        limit = context_length(self.model) if hasattr(task_model(self.model), "config") else None
        return [length for length in self.lengths if length is None or limit is None or length <= limit]

    def batch(self, batch_size: int, length: int | None) -> dict[str, Any]:
        """A batch on the model's device."""
        return on_device(self.make_batch(batch_size, length), self.model)


def measure_latencies(
    runners: Sequence[Runner],
    *,
    batch_sizes: Sequence[int],
    repeats: int,
    warm_up: int,
    seconds: float = math.inf,
    progress: Callable[[int, int | None], None] = lambda batch_size, length: None,
) -> list[tuple[Timing, ...] | Exception]:
    """How long a forward pass of each model takes, measured in turns.

    A machine whose speed drifts would make one model look faster than another that is timed minutes apart from it.
    In each cell of the grid the models therefore take turns, a few passes each, in one order and then in the other, so
    that a drift is in the times of all alike. The price: all of them are in memory at once, and a turn begins with a
    pass that is not timed. A model alone runs through.

    Cells come one after the other, batch sizes in the outer loop. Every module is in evaluation mode meanwhile, and
    then in the mode that it had.

    Args:
        runners: the models, each where and in the dtype that it is.
        batch_sizes: rows of a batch.
        repeats: timed passes of a model in a cell.
        warm_up: passes before them.
        seconds: of a cell, all models together, after which it gets no more passes: two turns each it has always.
        progress: is told the batch size and the length of each cell before it is measured.

    Returns: the grid of each model, or the error that ended it; the others go on without that one.
    """
    lengths = [runner.fitting() for runner in runners]
    cells = dict.fromkeys((rows, length) for rows in batch_sizes for own in lengths for length in own)
    found: list[list[Timing] | Exception] = [[] for _ in runners]
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(in_eval_mode(runner.model))
        stack.enter_context(torch.no_grad())  # inference_mode would leave its mark on tensors that a model caches
        for batch_size, length in cells:
            progress(batch_size, length)
            cell = {
                place: _Passes(runner, batch_size, length)
                for place, runner in enumerate(runners)
                if length in lengths[place] and isinstance(found[place], list)
            }
            _take_turns([*cell.values()], repeats=repeats, warm_up=warm_up, seconds=seconds)
            for place, passes in cell.items():
                own = found[place]
                if passes.error is not None:
                    found[place] = passes.error
                elif isinstance(own, list):
                    own.append(_timing(passes.seconds, batch_size, length))
    return [own if isinstance(own, Exception) else tuple(own) for own in found]


def measure_cost(
    model: nn.Module,
    *,
    make_batch: MakeBatch,
    batch_sizes: Sequence[int],
    lengths: Sequence[int | None],
    repeats: int,
    warm_up: int,
    size_bytes: int | None = None,
    timings: Sequence[Timing] | None = None,
) -> Cost:
    """What one model costs, measured where it is and in the dtype that it has.

    Every module is in evaluation mode meanwhile, and then in the mode that it had.

    Args:
        model: as of `Runner`.
        make_batch: likewise.
        batch_sizes: rows of a batch.
        lengths: as of `Runner`.
        repeats: timed passes of a cell, >= 1.
        warm_up: passes before them.
        size_bytes: of its weights on disk, where that is known; else `saved_bytes` writes them.
        timings: the grid, where it was measured beside other models; else the model is timed alone.

    Raises:
        ValueError: no batch size, no length or no repeat.
    """
    if not batch_sizes or not lengths or repeats < 1:
        raise ValueError(
            f"The grid has batch_sizes={tuple(batch_sizes)}, lengths={tuple(lengths)} and repeats={repeats}. It needs "
            "at least one of each; for inputs of one size, as images, the lengths are (None,)."
        )
    runner = Runner(model, make_batch, lengths)
    if timings is None:
        (alone,) = measure_latencies([runner], batch_sizes=batch_sizes, repeats=repeats, warm_up=warm_up)
        if isinstance(alone, Exception):
            raise alone
        timings = alone
    fitting = runner.fitting()
    peak = flops = None
    if fitting:
        longest = max(fitting, key=lambda length: length or 0)
        with in_eval_mode(model), torch.no_grad():
            peak = peak_memory(model, runner.batch(max(batch_sizes), longest))
            flops = forward_flops(model, runner.batch(1, longest))
    return Cost(
        parameters=parameter_count(model),
        size_bytes=saved_bytes(model) if size_bytes is None else size_bytes,
        peak_memory_bytes=peak,
        flops=flops,
        timings=tuple(timings),
    )


def parameter_count(model: nn.Module) -> int:
    """All parameters, shared ones once, in whatever format; without those of modules that trained beside a student."""
    own = getattr(model, "_orig_mod", model).named_parameters()
    count = sum(_elements(value) for name, value in own if not name.startswith(f"{ATTRIBUTE}."))
    return count + sum(value.numel() for value in _packed(model))


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the weights as `save_pretrained` writes them, all shards together.

    They are written to a temporary folder. A PEFT model counts with its base. Where `save_pretrained` cannot write
    the weights, as with tensors of torchao, the bytes are those of the state dict that `torch.save` writes.
    """
    inner = task_model(model)
    with TemporaryDirectory() as folder:
        if not hasattr(inner, "save_pretrained") or (
            _is_packed(inner) and getattr(inner, "hf_quantizer", None) is None
        ):
            path = Path(folder, "state.pt")
            torch.save(inner.state_dict(), path)
            return path.stat().st_size
        with _other_configs(inner), _no_bars():
            inner.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors where the model's first parameter is."""
    device = _device(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def peak_memory(model: nn.Module, batch: Mapping[str, Any]) -> int | None:
    """Bytes that one forward pass holds at most above what was held before it; None on devices that do not tell.

    These are the bytes that torch's allocator gives out, outputs and key-value caches included. On a CPU the profiler
    sees every one of them, in the order in which they come and go; the resident set would hide whatever fits into
    memory that was freed before. What libraries take without torch, such as oneDNN for its scratch, is in neither
    figure.

    Args:
        model: in the mode that it shall run in.
        batch: the forward's inputs, on the model's device.
    """
    device = _device(model)
    if device.type == "cpu":
        return _peak_on_cpu(model, batch)
    if device.type not in ("cuda", "xpu"):
        return None
    torch.accelerator.synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    model(**batch)
    torch.accelerator.synchronize(device)
    return torch.accelerator.max_memory_allocated(device) - before


def forward_flops(model: nn.Module, batch: Mapping[str, Any]) -> int | None:
    """Floating-point operations of one forward pass: two for each multiplication and addition of a matrix product.

    Attention counts in full, masked positions too, and as it is written, whichever kernel runs. Element-wise work is
    not counted.

    Returns: None where products would be passed over: with integer weights, or attention kernels of other packages.
    """
    config = getattr(task_model(model), "config", None)
    if _is_packed(model) or getattr(config, "_attn_implementation", None) not in _COUNTED_ATTENTION:
        return None
    counter = FlopCounterMode(display=False)
    # The counter knows neither the CPU's kernel of attention nor grouped products of experts (torch 2.13).
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), _plain_experts(model), counter:
        getattr(model, "_orig_mod", model)(**batch)
    return counter.get_total_flops()


@dataclass
class _Passes:
    """The timed passes of a model in one cell, until one fails."""

    runner: Runner
    batch_size: int
    length: int | None
    seconds: list[float] = field(default_factory=list)
    error: Exception | None = None
    _batch: dict[str, Any] | None = None

    def run(self, *, untimed: int, timed: int) -> None:
        if self.error is not None:
            return
        try:
            if self._batch is None:
                self._batch = self.runner.batch(self.batch_size, self.length)
            self.seconds += _seconds(self.runner.model, self._batch, passes=untimed + timed)[untimed:]
        except FAILURES as error:
            self.error = error.with_traceback(None)  # whose frames would keep the model in memory


def _take_turns(models: list[_Passes], *, repeats: int, warm_up: int, seconds: float) -> None:
    for passes in models:
        passes.run(untimed=warm_up, timed=0)
    untimed = 1 if len(models) > 1 else 0
    for turn, start in enumerate(range(0, repeats, _IN_A_ROW)):
        # As many turns in one order as in the other.
        if turn > 0 and turn % 2 == 0 and sum(sum(passes.seconds) for passes in models) >= seconds:
            break
        # The order changes, or the last one would always be timed on what the machine is by then.
        for passes in models if turn % 2 == 0 else models[::-1]:
            passes.run(untimed=untimed, timed=min(_IN_A_ROW, repeats - start))


def _seconds(model: nn.Module, batch: Mapping[str, Any], *, passes: int) -> list[float]:
    device = _device(model)
    taken = []
    for _ in range(passes):
        _finish(device)
        start = time.perf_counter()
        model(**batch)
        _finish(device)
        taken.append(time.perf_counter() - start)
    return taken


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timing(seconds: Sequence[float], batch_size: int, length: int | None) -> Timing:
    middle, slow = (float(value) for value in np.percentile(seconds, [50, 95]))
    return Timing(
        batch_size=batch_size,
        length=length,
        p50_ms=1000 * middle,
        p95_ms=1000 * slow,
        repeats=len(seconds),
        rows_per_second=batch_size / middle,
    )


def _peak_on_cpu(model: nn.Module, batch: Mapping[str, Any]) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(**batch)
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    changes = [size for _, size in sorted(events, key=lambda event: event[0])]
    return max(accumulate(changes, initial=0))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Kineto writes lines to the terminal as it starts and stops, unless this stands before its first use."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, _SILENT)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    inner = task_model(model)
    before = getattr(getattr(inner, "config", None), "_experts_implementation", None)
    with ExitStack() as stack:
        if before is not None:
            inner.set_experts_implementation("eager")
            stack.callback(inner.set_experts_implementation, before)
        yield


@contextmanager
def _other_configs(model: Any) -> Iterator[None]:
    """`save_pretrained` writes into the config, and refuses some generation configs that models come with."""
    before = {name: vars(model)[name] for name in ("config", "generation_config") if name in vars(model)}
    model.config = copy.deepcopy(model.config)
    if before.get("generation_config") is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        vars(model).update(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _elements(parameter: Tensor) -> int:
    # bitsandbytes keeps two weights of 4 bits in a byte, and their shape beside them.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _packed(model: nn.Module) -> Iterator[Tensor]:
    """What torch.ao's quantised layers hold instead of parameters."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "_packed_params", None), torch.ScriptObject):
            yield from (value for value in module._weight_bias() if value is not None)


def _is_packed(model: nn.Module) -> bool:
    """Whether some weights are no plain floating-point tensors."""
    plain = all(type(value) is nn.Parameter and value.is_floating_point() for value in model.parameters())
    return not plain or next(_packed(model), None) is not None
