"""Records what a model's forward computes inside: hidden states, modules' outputs and the calls of its attention."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_distill.features import ATTENTION, HIDDEN, MODULE, Feature
from hf_distill.models.architectures import (
    attention_sites,
    depth,
    gives_embeddings,
    gives_hidden_states,
    hidden_states_request,
    layer_stacks,
)
from hf_distill.models.attention import AttentionRecord, AttentionTaps
from hf_distill.models.heads import task_model


class _Call(NamedTuple):
    """The tensor that a hooked module took or gave, and whether it has no gradient though the module trains."""

    tensor: Tensor | None
    lost: bool


class Capture:
    """Records some features of a model in the forwards inside `recording()`, until closed.

    It changes no result, and outside `recording()` it keeps nothing. Two captures may be open on one model and record
    in turns, as where the student without its adapters is the teacher.

    Attributes:
        forward_arguments: what to pass to the forward besides its inputs.
    """

    def __init__(self, model: nn.Module, features: Sequence[Feature]) -> None:
        """Finds the places and stands ready; before the model is compiled or wrapped.

        Args:
            model: a Transformers model, with or without a PEFT wrapper.
            features: sources (`Feature.source`), each with one layer from 0 on and, where the model has an encoder
                and a decoder, the stack.

        Raises:
            ValueError: the model has no such layer, module or stack, or cannot tell what is asked for.
        """
        self._name = type(task_model(model)).__name__
        self._features = list(dict.fromkeys(features))
        self._depths = {f.stack: depth(model, f.stack) for f in self._features if f.kind != MODULE}
        for feature in self._features:
            self._check(feature)
        self._calls: dict[Feature, list[_Call]] | None = None
        self._starts_with_embeddings = True
        self.forward_arguments: dict[str, Any] = {}
        self._sites = self._attention_sites(model)
        hooked = self._request_hidden_states(model) | {
            f: self._module(model, f) for f in self._features if f.kind == MODULE
        }
        self._taps = AttentionTaps([site for site, *_ in self._sites.values()])
        self._hooks = [self._hook(feature, module) for feature, module in hooked.items()]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around one forward of the model, `forward_arguments` given, and its `collect`."""
        with self._taps.recording():
            self._calls = {}
            try:
                yield
            finally:
                self._calls = None

    def collect(self, outputs: Any) -> dict[Feature, Tensor | AttentionRecord]:
        """The features of the forward that has just run, by feature; callable once, while recording.

        Args:
            outputs: what the forward returned, or its root forward hook got: a `ModelOutput` or dict.

        Returns: hidden states (batch, length, width) as `output_hidden_states` gives them, the first tensor of a
        module's output, and an `AttentionRecord` per attention layer. All of them are part of the graph.

        Raises:
            ValueError: something asked for was not computed, or not in the way it was asked for.
        """
        if self._calls is None:
            raise RuntimeError("Nothing is being recorded: run the forward and collect() inside recording().")
        calls, self._calls = self._calls, {}
        records = self._taps.take()
        features: dict[Feature, Tensor | AttentionRecord] = {}
        for feature in self._features:
            if feature in self._sites:
                features[feature] = self._record(feature, records)
            elif feature.kind == HIDDEN and self.forward_arguments:
                features[feature] = self._hidden_state(feature, outputs)
            else:
                features[feature] = self._only(feature, calls.get(feature, []))
        return features

    def close(self) -> None:
        """Takes all hooks and taps off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._taps.close()

    def _check(self, feature: Feature) -> None:
        if feature.kind not in (HIDDEN, MODULE, ATTENTION) or feature.pooling is not None:
            raise ValueError(f"{feature} is no source; a capture records {feature.source}. Pass feature.source.")
        if feature.kind == MODULE:
            return
        first, last = int(feature.kind == ATTENTION), self._depths[feature.stack]
        if feature.layer is None or not first <= feature.layer <= last:
            raise ValueError(
                f"{self._name} has no {feature}: its layers are {first} to {last}. Choose one of them, or count from "
                "the end: -1 is the last."
            )

    def _attention_sites(self, model: nn.Module) -> dict[Feature, tuple[nn.Module, int, int]]:
        """The attention layer of each feature, which of its calls in a forward is meant, and out of how many."""
        found = {}
        stacks = {f.stack: attention_sites(model, f.stack) for f in self._features if f.kind == ATTENTION}
        for feature in self._features:
            if feature.kind == ATTENTION:
                sites, index = stacks[feature.stack], (feature.layer or 0) - 1
                if (site := sites[index]) is None:
                    having = [i for i, other in enumerate(sites, 1) if other is not None]
                    raise ValueError(
                        f"Layer {feature.layer} of {self._name} has no attention that queries and keys could be "
                        f"recorded of; layers {having} have. Choose among these with an explicit layer map."
                    )
                found[feature] = (site, sites[:index].count(site), sites.count(site))
        return found

    def _request_hidden_states(self, model: nn.Module) -> dict[Feature, nn.Module]:
        """Settles how hidden states are had; returns the layers to hook where the model does not give them."""
        wanted = [f for f in self._features if f.kind == HIDDEN]
        if not wanted:
            return {}
        if not gives_hidden_states(model):
            stacks = layer_stacks(model)
            return {f: stacks[f.stack][max((f.layer or 0) - 1, 0)] for f in wanted}
        self._starts_with_embeddings = gives_embeddings(model)
        if not self._starts_with_embeddings and any(f.layer == 0 for f in wanted):
            raise ValueError(
                f"{self._name} does not give the output of its embeddings, hidden[0], among its hidden states. Use "
                "hidden[1] and up, or module:dotted.path of the embeddings."
            )
        layers = [f.layer for f in wanted if f.layer is not None]
        self.forward_arguments = {"output_hidden_states": hidden_states_request(model, layers)}
        return {}

    def _module(self, model: nn.Module, feature: Feature) -> nn.Module:
        modules = dict(task_model(model).named_modules())
        if feature.path not in modules:
            near = difflib.get_close_matches(str(feature.path), modules, n=3, cutoff=0.5)
            raise ValueError(
                f"{self._name} has no module {feature.path!r}. "
                + (f"Did you mean {' or '.join(near)}?" if near else f"It begins with {list(modules)[1:4]}.")
            )
        return modules[feature.path]

    def _hook(self, feature: Feature, module: nn.Module) -> Any:
        takes_input = feature.kind == HIDDEN and feature.layer == 0

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if self._calls is not None:
                kept = _first_tensor((args, kwargs) if takes_input else output)
                lost = module.training and not torch.is_grad_enabled()
                self._calls.setdefault(feature, []).append(_Call(kept, lost))

        return module.register_forward_hook(keep, with_kwargs=True)

    def _hidden_state(self, feature: Feature, outputs: Any) -> Tensor:
        field = f"{feature.stack}_hidden_states" if feature.stack else "hidden_states"
        states = outputs.get(field) if isinstance(outputs, Mapping) else None
        layer, last = feature.layer or 0, self._depths[feature.stack]
        if not self._starts_with_embeddings:
            layer = len(states) - 1 if states and layer == last else layer - 1
        if not states or layer >= len(states) or states[layer] is None:
            held = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(
                f"The forward of {self._name} gave no {field}[{feature.layer}]; its output is {held}. Pass "
                "capture.forward_arguments to it and keep return_dict=True; or match module:dotted.path."
            )
        return states[layer]

    def _record(self, feature: Feature, records: Mapping[nn.Module, list[AttentionRecord]]) -> AttentionRecord:
        site, turn, turns = self._sites[feature]
        if len(records[site]) != turns:
            raise ValueError(
                f"{feature} of {self._name}: its attention was recorded {len(records[site])} times in one forward; "
                f"expected {turns}. Choose the attention implementation before the capture is made, and run one "
                "forward in each recording()."
            )
        record = records[site][turn]
        self._check_gradient(feature, lost=site.training and not record.grad_enabled)
        return record

    def _check_gradient(self, feature: Feature, *, lost: bool) -> None:
        if lost and torch.is_grad_enabled():
            raise ValueError(
                f"{feature} of {self._name} has no gradient: re-entrant checkpointing runs the layers without one. "
                "Set use_reentrant=False in activation_checkpointing_kwargs."
            )

    def _only(self, feature: Feature, calls: list[_Call]) -> Tensor:
        tensors = [call.tensor for call in calls if call.tensor is not None]
        if len(calls) != 1 or not tensors:
            raise ValueError(
                f"{feature} of {self._name} ran {len(calls)} times in one forward and gave {len(tensors)} tensors; "
                "expected one. Choose a module that runs once in each forward and returns a tensor."
            )
        self._check_gradient(feature, lost=calls[0].lost)
        return tensors[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
