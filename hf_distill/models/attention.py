"""Queries, keys and values as a model's own attention gets them, recorded where it looks its attention function up.

Transformers' attention layers ask `ALL_ATTENTION_FUNCTIONS` for the function of the implementation in their config. A
tap stands there under the implementation's own name: it keeps references to its arguments and calls the function that
stood there before. The config stays as it is, so masks, checks by name and shared configs behave as without it. Under
a name of its own, models that ask for `== "sdpa"`, as those with sparse indices do, would compute something else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.models.architectures import interface_forward
from hf_distill.signals import Scores

EAGER, SDPA = "eager", "sdpa"
# The attribute of an attention module that holds the calls of the forward being recorded; absent at any other time.
_CALLS = "_hf_distill_calls"
# What the factors of `Scores` can say of the options that an eager attention function takes by name.
_EXPRESSED = {"scaling", "dropout", "softcap", "position_bias", "s_aux", "sliding_window", "is_causal", "kwargs"}


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """What one attention layer was called with in one forward.

    Attributes:
        module: the attention layer.
        implementation: the attention implementation it ran, `eager` or `sdpa`.
        query: (batch, heads, queries, width).
        key: (batch, kv_heads, keys, width).
        value: (batch, kv_heads, keys, value width).
        mask: as the model made it: None, bool, or a float added to the scores; (batch, 1 or heads, queries, keys).
        options: the other arguments, such as scaling and position_bias.
        grad_enabled: whether gradients were on.
    """

    module: nn.Module
    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    grad_enabled: bool

    @property
    def causal(self) -> bool:
        """Whether a position only attends to itself and those before it."""
        declared = self.options.get("is_causal")
        if declared is None:
            # SDPA takes a layer that does not say to be causal, where it gets no mask.
            declared = getattr(self.module, "is_causal", self.mask is None and self.implementation == SDPA)
        # Eager attention masks nothing but what the mask says.
        return bool(declared) and (self.mask is not None or self.implementation == SDPA)

    def to(self, device: torch.device) -> "AttentionRecord":
        """The record with its tensors on a device."""
        if self.query.device == device:
            return self
        vectors = {name: getattr(self, name).to(device) for name in ("query", "key", "value")}
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return replace(self, **vectors, mask=None if self.mask is None else self.mask.to(device), options=options)

    def scores(self) -> Scores:
        """The scores before the softmax and before masking, in factors.

        Raises:
            ValueError: the layer's own formula has a part that the factors cannot say.
        """
        consumed = set(signature(eager_attention(self.module)).parameters) - _EXPRESSED
        if unknown := [name for name, value in self.options.items() if name in consumed and value is not None]:
            raise ValueError(
                f"The attention scores of {type(self.module).__name__} also depend on {', '.join(unknown)}, beyond "
                "queries, keys, scale, position bias, softcap and sinks. Match hidden[i] of this model instead."
            )
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        scale = self.options.get("scaling")
        return Scores(
            left=self.query,
            right=self.key if heads == kv_heads else self.key.repeat_interleave(heads // kv_heads, dim=1),
            scale=self.query.shape[-1] ** -0.5 if scale is None else scale,
            bias=self._bias(),
            softcap=self.options.get("softcap"),
            causal=self.causal,
            sinks=self.options.get("s_aux"),
            allowed=self._allowed(),
        )

    def probabilities(self) -> Tensor:
        """(batch, heads, queries, keys): the attention maps without dropout, by the model's own eager function."""
        mask, queries, keys = self.mask, self.query.shape[2], self.key.shape[2]
        if mask is None and self.causal and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device).tril()[None, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = self.query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(self.query.dtype).min)
        options = {**self.options, "dropout": 0.0}
        _, maps = eager_attention(self.module)(self.module, self.query, self.key, self.value, mask, **options)
        return maps

    def _allowed(self) -> Tensor | None:
        if self.mask is None or self.mask.dtype == torch.bool:
            return self.mask
        return self.mask > torch.finfo(self.mask.dtype).min / 2

    def _bias(self) -> Tensor | None:
        bias = self.options.get("position_bias")
        if self.mask is None or self.mask.dtype == torch.bool:
            return bias
        # Some models add their relative positions to the mask.
        added = torch.where(self.mask > torch.finfo(self.mask.dtype).min / 2, self.mask, 0.0)
        return added if bias is None else bias + added


class AttentionTaps:
    """Taps at the attention functions of some attention layers, until closed.

    Several may be open at once, on one model or on several.
    """

    def __init__(self, sites: Sequence[nn.Module]) -> None:
        """Opens the taps.

        Raises:
            ValueError: a layer runs an implementation whose masks cannot be read.
        """
        self.sites = list(dict.fromkeys(sites))
        self._implementations = {site: _implementation(site) for site in self.sites}
        self._open = [(_interface(site), name) for site, name in self._implementations.items()]
        for interface, name in self._open:
            _open_tap(interface, name)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Calls of the layers are kept while inside, for `take`.

        Raises:
            RuntimeError: one of the layers is being recorded already.
        """
        if any(hasattr(site, _CALLS) for site in self.sites):
            raise RuntimeError("This model's attention is being recorded already: leave the first recording() before.")
        for site in self.sites:
            setattr(site, _CALLS, [])
        try:
            yield
        finally:
            for site in self.sites:
                delattr(site, _CALLS)

    def take(self) -> dict[nn.Module, list[AttentionRecord]]:
        """What each layer was called with since the recording began, in order; forgotten here."""
        taken = {}
        for site in self.sites:
            calls = getattr(site, _CALLS)
            taken[site] = [AttentionRecord(site, self._implementations[site], *call) for call in calls]
            calls.clear()
        return taken

    def close(self) -> None:
        """Puts the functions back that stood there before, unless other taps still need them."""
        for interface, name in self._open:
            _close_tap(interface, name)
        self._open = []


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function that an attention layer names as its default.

    Raises:
        ValueError: it names none.
    """
    forward = interface_forward(module)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    if not names:
        raise ValueError(
            f"{type(module).__name__} names no eager attention function, so its attention maps cannot be computed. "
            "Match hidden[i] or module:dotted.path of this model instead."
        )
    return forward.__globals__[names[0]]


# (id of an interface, implementation) -> [open taps, the function that the interface had of its own or None]
_OPEN: dict[tuple[int, str], list[Any]] = {}


def _open_tap(interface: Any, name: str) -> None:
    if (id(interface), name) not in _OPEN:
        _OPEN[id(interface), name] = [0, interface._local_mapping.get(name)]
        interface[name] = _recording(interface.get(name))
    _OPEN[id(interface), name][0] += 1


def _close_tap(interface: Any, name: str) -> None:
    tap = _OPEN[id(interface), name]
    tap[0] -= 1
    if tap[0] == 0:
        del _OPEN[id(interface), name]
        if tap[1] is None:
            del interface[name]
        else:
            interface[name] = tap[1]


def _recording(base: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        calls = getattr(module, _CALLS, None)
        if calls is not None:
            calls.append((query, key, value, attention_mask, options, torch.is_grad_enabled()))
        function = eager_attention(module) if base is None else base
        return function(module, query, key, value, attention_mask, **options)

    return attention


def _interface(site: nn.Module) -> Any:
    # A model file may have an interface of its own, as Doge's does.
    return interface_forward(site).__globals__["ALL_ATTENTION_FUNCTIONS"]


def _implementation(site: Any) -> str:
    name = site.config._attn_implementation
    if name not in (EAGER, SDPA):
        raise ValueError(
            f"{type(site).__name__} runs attention implementation {name!r}, which keeps its masks to itself; "
            "attention is recorded under 'sdpa' and 'eager'. Call model.set_attn_implementation('sdpa'): it runs "
            "flash kernels of its own where it can."
        )
    return name
