"""Where the layers of a Transformers model are, and the attention inside each: one rule, and what breaks it."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_distill.features import STACKS
from hf_distill.models.heads import task_model

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Their tuple of hidden states begins with the output of the first layer and ends with that of the final norm as well.
_WITHOUT_EMBEDDINGS = ("mamba", "mamba2", "falcon_mamba", "rwkv")
_CROSS_ATTENTION = ("cross", "encoder_attn", "encdecattention", "encoder_attention")


class _Stack(NamedTuple):
    path: str
    owner: Any
    layers: list[nn.Module]

    @property
    def config(self) -> Any:
        return getattr(self.owner, "config", None)


def layer_stacks(model: nn.Module) -> dict[str | None, list[nn.Module]]:
    """The layers of a model in the order in which they run, by stack.

    A layer is what Transformers itself records a hidden state of. One that runs several times (ALBERT) stands in the
    list as often. Of several stacks that are no encoder and decoder, as in a vision-language model, the text's count.

    Args:
        model: a Transformers model with or without a head, PEFT or compile wrapper.

    Returns: `{None: layers}`, or `{"encoder": layers, "decoder": layers}` for a model that has both.

    Raises:
        ValueError: no layers are found, or several stacks of which none is the text's.
    """
    return {name: stack.layers for name, stack in _named_stacks(model).items()}


def depth(model: nn.Module, stack: str | None) -> int:
    """How many layers a stack has: hidden states are numbered 0 to depth.

    Raises:
        ValueError: the model has no such stack.
    """
    stacks = layer_stacks(model)
    if stack not in stacks:
        raise ValueError(
            f"{type(task_model(model)).__name__} has no stack {stack!r}. "
            + (
                f"Write {' or '.join(f'{name}.hidden[1]' for name in stacks)}."
                if None not in stacks
                else "It has one only: leave out encoder. and decoder."
            )
        )
    return len(stacks[stack])


def attention_sites(model: nn.Module, stack: str | None) -> list[nn.Module | None]:
    """The self-attention of each layer; None where a layer has none, as every other one of a hybrid model.

    Raises:
        ValueError: no layer has one that Transformers' attention interface serves, or a layer has several.
    """
    depth(model, stack)
    name = type(task_model(model)).__name__
    sites = [_site(layer, f"Layer {i} of {name}") for i, layer in enumerate(layer_stacks(model)[stack], 1)]
    if not any(sites):
        raise ValueError(
            f"The layers of {name} do not call Transformers' attention interface, so their queries, keys and scores "
            "cannot be recorded. Match hidden[i] or module:dotted.path of this model instead."
        )
    return sites


def layerdrop(model: nn.Module) -> float:
    """The largest probability with which a whole layer is skipped in training; 0 for most models."""
    config = task_model(model).config
    configs = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    return max(float(getattr(c, name, None) or 0.0) for c in configs for name in names)


def gives_hidden_states(model: nn.Module) -> bool:
    """Whether the model's forward takes `output_hidden_states`; the layers' own outputs are hooked otherwise."""
    inner = task_model(model)
    specified = any(_specs(module) for module in inner.modules())
    return specified or "output_hidden_states" in inspect.signature(inner.forward).parameters


def gives_embeddings(model: nn.Module) -> bool:
    """Whether the tuple of hidden states begins with the output of the embeddings."""
    if getattr(getattr(task_model(model), "config", None), "model_type", None) in _WITHOUT_EMBEDDINGS:
        return False
    specs = [spec for stack in _named_stacks(model).values() for spec in _specs(stack.owner)]
    return all(getattr(spec, "capture_initial_hidden_state", True) for spec in specs)


def hidden_states_request(model: nn.Module, layers: list[int]) -> list[int] | bool:
    """The value of `output_hidden_states` that gives at least these layers: their numbers, or True for all."""
    # transformers 5.23 drops numbers above config.num_hidden_layers, which for BART means the encoder's depth, and
    # shifts them where the embeddings are not recorded.
    known = (getattr(stack.config, "num_hidden_layers", None) for stack in _named_stacks(model).values())
    limit = min((number for number in known if number is not None), default=max(layers))
    return sorted(set(layers)) if max(layers) <= limit and gives_embeddings(model) else True


def serves_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in Transformers' interface."""
    code = getattr(interface_forward(module), "__code__", None)
    return code is not None and _INTERFACE in code.co_names


def interface_forward(module: nn.Module) -> Any:
    """The function behind a module's forward, without decorators and whatever replaced it on the instance."""
    return inspect.unwrap(type(module).forward)


def _named_stacks(model: nn.Module) -> dict[str | None, _Stack]:
    inner = task_model(model)
    stacks = _recorded_stacks(inner) or _listed_stacks(inner)
    named = _by_name(stacks) or _by_name(_text_stacks(inner, stacks))
    if named:
        return named
    found = f"several: {', '.join(stack.path or 'the model itself' for stack in stacks)}" if stacks else "none"
    raise ValueError(
        f"Cannot tell which layers of {type(inner).__name__} to number as hidden[1], hidden[2], ...; found {found}. "
        "Refer to its modules by name instead, as in module:encoder.blocks.3, or pass the submodel that you mean."
    )


def _by_name(stacks: list[_Stack]) -> dict[str | None, _Stack]:
    """The only stack, or an encoder and a decoder; empty for anything else."""
    if len(stacks) == 1:
        return {None: stacks[0]}
    named: dict[str | None, _Stack] = {n: s for n in STACKS for s in stacks if n in s.path.split(".")}
    return named if len(stacks) == len(named) == len(STACKS) else {}


def _site(layer: nn.Module, where: str) -> nn.Module | None:
    found = [(name, module) for name, module in layer.named_modules() if serves_interface(module)]
    own = [(name, module) for name, module in found if not any(word in name.lower() for word in _CROSS_ATTENTION)]
    if len(own) > 1:
        raise ValueError(
            f"{where} has several attentions: {', '.join(name for name, _ in own)}; which one attention_scores[i] "
            "means is open. Match hidden[i] or module:dotted.path of this model instead."
        )
    return own[0][1] if own else None


def _recorded_stacks(model: nn.Module) -> list[_Stack]:
    """The modules whose output `output_hidden_states` records, by the submodel that owns them."""
    found: dict[str, _Stack] = {}

    def walk(module: nn.Module, path: str, owner: Any, owner_path: str) -> None:
        if isinstance(module, PreTrainedModel):
            owner, owner_path = module, path
        elif any(_matches(spec, module, path) for spec in _specs(owner)):
            found.setdefault(owner_path, _Stack(owner_path, owner, [])).layers.append(module)
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name, owner, owner_path)

    walk(model, "", model, "")
    return [stack._replace(layers=_in_running_order(stack)) for stack in found.values()]


def _specs(owner: Any) -> list[Any]:
    specs = (getattr(owner, "_can_record_outputs", None) or {}).get("hidden_states", [])
    return specs if isinstance(specs, list) else [specs]


def _matches(spec: Any, module: nn.Module, path: str) -> bool:
    # A spec is a class, the name of one's place in its parent, or both in an OutputRecorder.
    place = spec if isinstance(spec, str) else getattr(spec, "class_name", None)
    cls = spec if isinstance(spec, type) else getattr(spec, "target_class", None)
    below = getattr(spec, "layer_name", None)
    found = (cls is not None and isinstance(module, cls)) or (place is not None and f".{path}".endswith(place))
    return found and (below is None or f".{below.strip('.')}." in f".{path}.")


def _in_running_order(stack: _Stack) -> list[nn.Module]:
    groups = getattr(stack.config, "num_hidden_groups", None)
    if groups is None:
        return stack.layers
    # ALBERT spreads its layers evenly over the groups, and each runs all the modules of its group.
    layers, inner = stack.config.num_hidden_layers, len(stack.layers) // groups
    starts = (int(i / (layers / groups)) * inner for i in range(layers))
    return [module for start in starts for module in stack.layers[start : start + inner]]


def _listed_stacks(model: nn.Module) -> list[_Stack]:
    """The outermost lists of modules of one class; those that can be checkpointed, where there are such."""
    lists = [_Stack(path, owner, list(layers)) for path, layers, owner in _module_lists(model, "", model)]
    checkpointed = [stack for stack in lists if isinstance(stack.layers[0], GradientCheckpointingLayer)]
    return checkpointed or lists


def _module_lists(module: nn.Module, path: str, owner: Any) -> Iterator[tuple[str, nn.ModuleList, Any]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        is_stack = isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
        if is_stack and any(True for _ in child[0].children()):  # type: ignore[index]
            yield child_path, child, owner  # type: ignore[misc]
        else:
            yield from _module_lists(child, child_path, child if isinstance(child, PreTrainedModel) else owner)


def _text_stacks(model: Any, stacks: list[_Stack]) -> list[_Stack]:
    text = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    return [stack for stack in stacks if text is not None and stack.config is text]
