"""What a model costs to keep and to run: parameters, bytes on disk, memory, operations and time."""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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


def measure_cost(
    model: nn.Module,
    *,
    make_batch: Callable[[int, int | None], Mapping[str, Any]],
    batch_sizes: Sequence[int],
    lengths: Sequence[int | None],
    repeats: int,
    warm_up: int,
    size_bytes: int | None = None,
) -> Cost:
    """What one model costs, measured where it is and in the dtype that it has.

    Cells are timed one after the other, batch sizes in the outer loop. A length that the model cannot read is left
    out. Every module is in evaluation mode meanwhile, and then in the mode that it had.

    Args:
        model: a Transformers or PEFT model, or any module whose forward takes a batch's entries by name.
        make_batch: from a number of rows and a length to the forward's inputs, on any device and without labels.
        batch_sizes: rows of a batch.
        lengths: tokens of a row, or frames; None stands for inputs of one size, as images.
        repeats: timed passes of a cell, >= 1.
        warm_up: passes before them.
        size_bytes: of its weights on disk, where that is known; else `saved_bytes` writes them.

    Raises:
        ValueError: no batch size, no length or no repeat.
    """
    if not batch_sizes or not lengths or repeats < 1:
        raise ValueError(
            f"The grid has batch_sizes={tuple(batch_sizes)}, lengths={tuple(lengths)} and repeats={repeats}. It needs "
            "at least one of each; for inputs of one size, as images, the lengths are (None,)."
        )
    # A module that is none of Transformers' says nothing of its positions.
    limit = context_length(model) if hasattr(task_model(model), "config") else None
    fitting = [length for length in lengths if length is None or limit is None or length <= limit]
    timings: list[Timing] = []
    peak = flops = None
    with in_eval_mode(model), torch.no_grad():  # inference_mode would leave its mark on tensors that a model caches
        for batch_size in batch_sizes:
            for length in fitting:
                batch = on_device(make_batch(batch_size, length), model)
                seconds = _seconds(model, batch, passes=warm_up + repeats)[warm_up:]
                timings.append(_timing(seconds, batch_size, length))
        if fitting:
            longest = max(fitting, key=lambda length: length or 0)
            peak = peak_memory(model, on_device(make_batch(max(batch_sizes), longest), model))
            flops = forward_flops(model, on_device(make_batch(1, longest), model))
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
