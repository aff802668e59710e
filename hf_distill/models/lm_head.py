"""A language model's logits as what they are made of: its head, and what the head reads, in place of the logits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_distill.models.heads import task_model
from hf_distill.signals import LogitFactors

# What models of Transformers (5.23) do to the products of their head, by the name in the config: a factor, or what
# divides (Granite), and the cap.
_FACTORS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Of the largest logit, by the mantissa of the dtype that the model forms its logits in.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_HALF_TOLERANCE = 1e-2

# The positions whose logits are compared.
WINDOW = slice(0, 4)


class HeadTap:
    """Makes a model's forward stop before its head, but for a few positions, while it is open.

    The forward then returns the logits of those positions alone, and nothing of tokens x vocabulary exists. What the
    head read is handed to a function that runs while the head does, so that whoever gathers its weights for its
    forward (FSDP, ZeRO-3) has gathered them, and so that the function's results are part of the model's own forward.

    Attributes:
        reason: why this model's logits cannot be taken apart; None while they can, as far as is known.
        verified: whether the model's own logits have been shown to be these factors'.
        shape: (batch, length) of the forward that showed it.
        result: what the function returned.
    """

    def __init__(self, model: nn.Module) -> None:
        """Finds the head and what follows it; the model is left alone until `attach`."""
        self._model = task_model(model)
        self._named = _output_embeddings(self._model)
        self.head, self.reason = _find_head(self._model)
        self.verified = False
        self.shape: tuple[int, ...] = ()
        self.result: Any = None
        self._run: Callable[[LogitFactors], Any] | None = None
        self._window, self._with_graph = slice(0, 0), False
        self._hidden: Tensor | None = None
        self._post: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def reads(self, model: nn.Module) -> bool:
        """Whether it was made for this model with the head that it has."""
        return self._model is task_model(model) and self._named is _output_embeddings(self._model)

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        model: nn.Module = self._model
        return model

    @property
    def is_attached(self) -> bool:
        """Whether the hooks hang on the head."""
        return bool(self._handles)

    def attach(self) -> None:
        """Hangs idle hooks on the head; before the model is compiled or wrapped."""
        if self.head is not None and not self._handles:
            before, after = _Hook(self, HeadTap._before), _Hook(self, HeadTap._after)
            # In front of hooks that give gathered weights away.
            handles = (
                self.head.register_forward_pre_hook(before),
                self.head.register_forward_hook(after, prepend=True),
            )
            self._handles = [*handles]

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def open(
        self, run: Callable[[LogitFactors], Any], *, window: slice = slice(0, 1), with_graph: bool = False
    ) -> Iterator[None]:
        """Around one forward: its logits are those of the positions in `window` alone.

        Where the tap is not attached it is for that long, which a model that is compiled by then does not notice.

        Args:
            run: of the factors of all positions, (batch, length, width); what it returns becomes `result`, which
                stays None where the head did not run on such hidden states.
            window: at least one position.
            with_graph: whether what follows the head's call has a graph where nothing before it has one.
        """
        self._run, self._window, self._hidden, self.result = run, window, None, None
        self._with_graph = with_graph
        was_attached = self.is_attached
        self.attach()
        try:
            yield
        except BaseException:
            self.result = None  # which holds the step's graph
            raise
        finally:
            self._run = self._hidden = None
            if not was_attached:
                self.detach()

    def verify(self, model: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Runs a forward that compares the model's own logits of a few positions with those of its factors.

        It settles `verified` or `reason`, and waits for the device, so once is enough.

        Args:
            model: the model, bare or wrapped.
            arguments: what its forward takes, without labels.
        """
        if self.reason is not None or self.verified:
            return
        posts = [*self._candidates()]
        # What follows the head is looked at with its graph: a parameter that is 0 as yet changes no number.
        with torch.no_grad(), self.open(partial(_logits_after, posts), window=WINDOW, with_graph=True):
            outputs = model(**arguments)
        name, result = type(self._model).__name__, self.take()
        if result is None:
            self.reason = f"{name} forms its logits otherwise than by its head's forward on (batch, length, width)"
            return
        formed, self.shape = result
        if _reads_parameters(outputs["logits"]):
            self.reason = f"{name} has parameters behind its head, of which its logits are made too"
            return
        own = outputs["logits"].detach()
        for post, logits in zip(posts, formed, strict=True):
            if _agrees(logits, own):
                self._post, self.verified = post, True
                return
        self.reason = (
            f"{name} does more to the products of its head than {', '.join([*_FACTORS, *_CAPS])} in its config say"
        )

    def take(self) -> Any:
        """The result of the last forward, which the tap forgets."""
        result, self.result = self.result, None
        return result

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Scales and caps that the config names, all of them first, in every combination."""
        config = self._model.config.get_text_config(decoder=True)
        scales, caps = [1.0], [None]
        for name, power in _FACTORS.items():
            value = getattr(config, name, None)
            if isinstance(value, int | float) and value:
                scales.insert(0, float(value) ** power)
        for name in _CAPS:
            if getattr(config, name, None):
                caps.insert(0, getattr(config, name))
        for scale, cap in product(scales, caps):
            yield {"scale": scale, "softcap": cap}

    def _factors(self, hidden: Tensor) -> LogitFactors:
        assert self.head is not None
        linear: Any = _linear(self.head)
        bias = linear.bias
        extra = getattr(self._model, "final_logits_bias", None)  # of BART and its kin
        if isinstance(extra, Tensor):
            bias = extra.flatten() if bias is None else bias + extra.flatten()
        return LogitFactors(hidden, linear.weight, bias, **self._post)

    def _before(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._run is None or not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 3:
            return None
        self._hidden = inputs[0]
        if self._with_graph:
            torch.set_grad_enabled(True)
        # With its graph, of which DDP learns which weights are used.
        return (inputs[0][:, self._window], *inputs[1:])

    def _after(self, head: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._run is None or self._hidden is None:
            return None
        self.result = self._run(self._factors(self._hidden))
        return _EndOfGradient.apply(output) if isinstance(output, Tensor) else None


class _Hook:
    """A hook of a tap, which a compiled model leaves its graph for; copies of it do nothing."""

    def __init__(self, tap: HeadTap | None = None, method: Callable[..., Any] | None = None) -> None:
        self._tap, self._method = tap, method

    @torch.compiler.disable
    def __call__(self, *arguments: Any) -> Any:
        return None if self._tap is None or self._method is None else self._method(self._tap, *arguments)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        # Of `copy.deepcopy` too: the model would otherwise be copied with the tap.
        return _Hook, ()


class _EndOfGradient(torch.autograd.Function):
    """The same tensor with its graph, which DDP reads, and without its gradient.

    FSDP2 waits at a module's outputs for the backward to begin: whatever else the loss is made of, it has to depend on
    them. What comes back to the few logits is 0, and would be multiplied by the whole head.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def _find_head(model: Any) -> tuple[nn.Module | None, str | None]:
    """The layer that makes the logits, or why there is none that can be taken apart."""
    name = type(model).__name__
    head = _output_embeddings(model)
    if head is None:
        return None, f"{name} names no output embeddings"
    linear = _linear(head)
    if isinstance(linear, BaseTunerLayer):
        return None, f"the head of {name} has an adapter, which is not part of its weight"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return None, f"the head of {name} is a {type(linear).__name__}, not a plain linear layer"
    weight = linear.weight
    if weight.dtype == torch.float16:
        return None, f"the head of {name} is held in torch.float16; load it in bfloat16 or float32"
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        return None, f"the head of {name} is held in {weight.dtype} as {type(weight.data).__name__}"
    return head, None


def _output_embeddings(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def holds_head(model: nn.Module, path: str) -> bool:
    """Whether a module of the model is its head, or has it inside: its output is that of a few positions alone."""
    inner = task_model(model)
    head = _output_embeddings(inner)
    return head is not None and any(part is head for part in inner.get_submodule(path).modules())


def _logits_after(posts: list[dict[str, Any]], factors: LogitFactors) -> tuple[list[Tensor], tuple[int, ...]]:
    """The logits of the first positions after each of the maps, and how many rows and positions there are."""
    part = replace(factors, hidden=factors.hidden.detach()[:, WINDOW])
    return [replace(part, **post).dense() for post in posts], factors.hidden.shape[:-1]


def _linear(head: nn.Module) -> nn.Module:
    """The layer that runs where `head` does: PEFT keeps a copy for each adapter, and the original beside them."""
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    return head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]


def _agrees(formed: Tensor, own: Tensor) -> bool:
    if formed.shape != own.shape:
        return False
    tolerance = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in (formed.dtype, own.dtype))
    finite = own.isfinite()
    largest = own.where(finite, 0.0).abs().amax().clamp(min=1e-3)
    # A class that the model makes impossible behind its head is at -inf on one side alone.
    alike = (formed == own) | (formed.isnan() & own.isnan())
    same = torch.where(finite, (formed - own).abs() <= tolerance * largest, alike)
    return bool(same.all())


def _reads_parameters(logits: Tensor) -> bool:
    """Whether a gradient of the logits reaches parameters otherwise than through the head's output."""
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or type(node).__name__ == f"{_EndOfGradient.__name__}Backward":
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False
