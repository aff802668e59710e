"""What one would try instead of a student: the teacher in int8, with half its weights, or of low rank."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_distill.models.heads import task_model
from hf_distill.provenance import without_paths_inside
from hf_distill.registry import Registry
from hf_distill.report.cost import on_device, parameter_count, saved_bytes
from hf_distill.report.factored_linear import FactoredLinear

# From a copy of the teacher, which it may change, to the model and a note for the reader of the report. An error
# stands in the report in place of the numbers.
MakeBaseline: TypeAlias = Callable[[nn.Module], tuple[nn.Module, str]]
BASELINES: Registry[MakeBaseline] = Registry("baseline")
_UNTRAINED = "Not trained after it."


class Baseline(NamedTuple):
    """A model made of the teacher.

    Attributes:
        name: as `BASELINES` has it.
        model: in evaluation mode, called as the teacher is; None where it cannot be made, for the reason in `note`.
        size_bytes: of its weights on disk; None without a model.
        note: how it was made and what its numbers leave out.
    """

    name: str
    model: nn.Module | None
    size_bytes: int | None
    note: str


def baselines_of(
    teacher: nn.Module, names: Sequence[str], *, example: Mapping[str, Any] | None = None
) -> Iterator[Baseline]:
    """The baselines in the order of their names, each made when it is asked for, of a copy of the teacher.

    A copy is as large as the teacher: drop one before you take the next.

    Args:
        teacher: a Transformers or PEFT model, or another module; it is not changed. Adapters are merged into the copy.
        names: of `BASELINES`.
        example: inputs of the teacher's forward. A baseline that fails on them, as where a model reads the weights of
            its layers past their forward, has no model, and the error in its note.

    Raises:
        ValueError: an unknown name.
    """
    makers = {name: BASELINES.get(name) for name in names}
    return (_baseline(teacher, name, make, example) for name, make in makers.items())


def int8(model: nn.Module) -> tuple[nn.Module, str]:
    """The model with int8 weights, one scale for an output, and activations quantised as they come.

    On a CPU in float32 torch's own int8 kernels run, which save time without compiling; elsewhere torchao's tensors.

    Raises:
        ValueError: no layer to quantise.
        ImportError: torchao is needed and missing.
    """
    inner, linears = task_model(model), _linears(model)
    for name, layer in linears.items():
        if isinstance(layer, Conv1D):
            inner.set_submodule(name, _as_linear(layer))
    quantise, by = _quantiser([layer.weight for layer in linears.values()])
    quantise(inner, list(linears))
    note = f"Dynamic int8, by {by}, in {_extent(linears, model)}; head and embeddings as they were. {_UNTRAINED}"
    return model, f"{note} Size of the state that torch.save writes, since safetensors holds no such weights."


def pruned(model: nn.Module) -> tuple[nn.Module, str]:
    """The model without the smaller half of its linear layers' weights, by magnitude over all layers together.

    Raises:
        ValueError: no layer to prune.
    """
    linears = _linears(model)
    weights = [layer.weight.detach() for layer in linears.values()]
    magnitudes = torch.cat([weight.abs().flatten().to(weights[0].device) for weight in weights])
    smaller = magnitudes.topk(len(magnitudes) // 2, largest=False, sorted=False).indices
    drop = torch.zeros_like(magnitudes, dtype=torch.bool).index_fill_(0, smaller, True)
    for weight, part in zip(weights, drop.split([weight.numel() for weight in weights]), strict=True):
        weight.masked_fill_(part.view_as(weight).to(weight.device), 0)
    return model, (
        f"Half of the weights is 0 in {_extent(linears, model)}. {_UNTRAINED} Zeros are stored and multiplied as "
        "other numbers are: size and time shrink only with a sparse format and kernels for it."
    )


def low_rank(model: nn.Module) -> tuple[nn.Module, str]:
    """The model with each linear layer as two of half its weights in all, the nearest such by squared error.

    Raises:
        ValueError: no layer that is large enough.
    """
    inner, linears = task_model(model), _linears(model)
    ranks = {name: _rank(layer) for name, layer in linears.items()}
    factored = {name: layer for name, layer in linears.items() if ranks[name] > 0}
    if not factored:
        raise ValueError("No linear layer is large enough to be two layers of half its weights.")
    note = f"Rank cut until half of the weights is left in {_extent(factored, model)}. {_UNTRAINED}"
    for name, layer in factored.items():
        plain = _as_linear(layer) if isinstance(layer, Conv1D) else layer
        inner.set_submodule(name, FactoredLinear(plain, ranks[name]))
    return model, note


def _baseline(teacher: nn.Module, name: str, make: MakeBaseline, example: Mapping[str, Any] | None) -> Baseline:
    try:
        model, note = make(_copy(teacher))
        model.eval()
        if example is not None:
            with torch.no_grad():
                model(**on_device(example, model))
        return Baseline(name, model, saved_bytes(model), note)
    except (ImportError, ValueError) as refusal:
        return Baseline(name, None, None, without_paths_inside(str(refusal)))
    except Exception as error:  # no row of a report may end it: a whole training can be behind it
        first_line, _, _ = str(error).partition("\n")
        return Baseline(name, None, None, f"It fails with {type(error).__name__}: {without_paths_inside(first_line)}")


def _copy(teacher: nn.Module) -> nn.Module:
    model: Any = copy.deepcopy(getattr(teacher, "_orig_mod", teacher))
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers of the body by their names in `task_model(model)`.

    Those of the head are left alone, as are weights that anything shares and such as are no plain floating-point
    tensors. Subclasses are, too: they are there for what reads their weights otherwise.

    Raises:
        ValueError: there is none.
    """
    inner = task_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    body = {id(module) for module in getattr(inner, "base_model", inner).modules() if module is not head}
    uses = Counter(id(value) for _, value in inner.named_parameters(remove_duplicate=False))
    linears = {
        name: module
        for name, module in inner.named_modules()
        if name and type(module) in (nn.Linear, Conv1D) and id(module) in body and _is_own(module.weight, uses)
    }
    if not linears:
        raise ValueError(
            f"{type(inner).__name__} has no linear layer of plain floating-point weights in its body: it is quantised "
            "already, offloaded, or made of other layers."
        )
    return linears


def _is_own(weight: Any, uses: Mapping[int, int]) -> bool:
    is_plain = type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
    return is_plain and uses[id(weight)] == 1


def _extent(linears: Mapping[str, Any], model: nn.Module) -> str:
    share = sum(layer.weight.numel() for layer in linears.values()) / parameter_count(model)
    return f"{len(linears)} linear layers with {share:.0%} of the parameters"


def _as_linear(layer: Any) -> nn.Linear:
    """GPT-2's Conv1D, whose weight is (in, out), as a linear layer."""
    features_in, features_out = layer.weight.shape
    linear = nn.Linear(features_in, features_out, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    linear.bias = layer.bias
    return linear


def _rank(layer: Any) -> int:
    """The largest with which two layers have no more than half the weights."""
    rows, columns = layer.weight.shape
    return math.floor(rows * columns / (2 * (rows + columns)))


def _quantiser(weights: Iterable[Tensor]) -> tuple[Callable[[nn.Module, list[str]], None], str]:
    """What quantises the layers of these names in place, and the name of its maker."""
    if all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights):
        return _with_torch, "torch.ao"
    if find_spec("torchao") is None:
        raise ImportError(
            'int8 weights on this device and in this dtype need torchao: pip install "hf-distill[quantised]".'
        )
    return _with_torchao, "torchao"


def _with_torch(model: nn.Module, names: list[str]) -> None:
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, whose tensors without compiling are slower on a CPU than float32.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        quantize_dynamic(model, dict.fromkeys(names, per_channel_dynamic_qconfig), inplace=True)


def _with_torchao(model: nn.Module, names: list[str]) -> None:
    from torchao import quantization  # type: ignore[import-untyped]

    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, config, filter_fn=lambda _, name: name in names)


BASELINES.register("int8", int8)
BASELINES.register("pruned", pruned)
BASELINES.register("low_rank", low_rank)
