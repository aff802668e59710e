"""Words for what is inside a model: `hidden[3]`, `decoder.attention_scores[-1]`, `pooled(cls)@hidden[*]`."""

import re
from dataclasses import dataclass, replace

HIDDEN, MODULE, ATTENTION = "hidden", "module", "attention"
ATTENTION_KINDS = ("attention_scores", "attention_probs", "query", "key", "value")
POOLINGS = ("cls", "mean", "max")
STACKS = ("encoder", "decoder")
_LAYERED = (HIDDEN, *ATTENTION_KINDS)
_REFERENCE = re.compile(
    r"(?:pooled\((?P<pooling>\w+)\)@)?(?:(?P<stack>encoder|decoder)\.)?(?P<kind>[a-z_]+)(?:\[(?P<layer>-?\d+|\*)\])?"
)
_MODULE = re.compile(r"(?:pooled\((?P<pooling>\w+)\)@)?module:(?P<path>[\w.]+)")


@dataclass(frozen=True)
class Feature:
    """A reference to one feature of a model, or to one in every layer.

    Attributes:
        kind: `hidden`, an attention kind, or `module`; captures also know `attention`, the source of all its kinds.
        layer: the layer counted from 1, 0 for the embeddings' output (hidden alone), negative from the end; None where
            every layer or a layer map says which.
        every: whether the reference was written `[*]`.
        stack: `encoder` or `decoder` of an encoder-decoder model; None for the only stack, or for both.
        pooling: how the positions become one vector: `cls` (the first real position), `mean`, `max`, or None.
        path: the module's dotted name, for `module:` alone.
    """

    kind: str
    layer: int | None = None
    every: bool = False
    stack: str | None = None
    pooling: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        pooled = f"pooled({self.pooling})@" if self.pooling else ""
        if self.kind == MODULE:
            return f"{pooled}module:{self.path}"
        index = "[*]" if self.every else "" if self.layer is None else f"[{self.layer}]"
        return f"{pooled}{f'{self.stack}.' if self.stack else ''}{self.kind}{index}"

    @property
    def is_attention(self) -> bool:
        """Whether it comes out of an attention layer: scores, probabilities, queries, keys or values."""
        return self.kind in ATTENTION_KINDS

    def at(self, layer: int, stack: str | None) -> "Feature":
        """The same feature of one layer of one stack."""
        return replace(self, layer=layer, every=False, stack=stack)

    @property
    def source(self) -> "Feature":
        """What a capture records for it: the whole sequence, and for attention kinds the layer's attention."""
        return replace(self, kind=ATTENTION if self.is_attention else self.kind, pooling=None)


def parse_feature(text: str) -> Feature:
    """The feature that a reference names.

    Args:
        text: `hidden[2]`, `hidden[*]`, `hidden` (the layers are the map's), `embeddings` (= `hidden[0]`),
            `attention_scores[-1]`, `attention_probs[*]`, `query[1]`, `key[1]`, `value[1]`, `module:bert.pooler`; with
            `encoder.` or `decoder.` before it, and `pooled(cls|mean|max)@` before that.

    Raises:
        ValueError: the text is no reference.
    """
    if match := _MODULE.fullmatch(text):
        return Feature(MODULE, pooling=_pooling(match["pooling"], text), path=match["path"])
    match = _REFERENCE.fullmatch(text)
    if match is None or match["kind"] not in (*_LAYERED, "embeddings"):
        raise ValueError(
            f"{text!r} refers to no feature. Write hidden[2], hidden[*], embeddings, attention_scores[-1], "
            "attention_probs[*], query[1], key[1], value[1], pooled(cls|mean|max)@hidden[-1] or "
            "module:dotted.path, with encoder. or decoder. before it for encoder-decoder models. The logits are no "
            "match: they have a term of their own."
        )
    kind, index, pooling = match["kind"], match["layer"], _pooling(match["pooling"], text)
    if kind == "embeddings":
        if index is not None:
            raise ValueError(f"{text!r}: the embeddings have no index. hidden[i] is the output of layer i.")
        return Feature(HIDDEN, 0, stack=match["stack"], pooling=pooling)
    if kind != HIDDEN and (pooling or index == "0"):
        wrong = "cannot be pooled" if pooling else "has no layer 0: layers count from 1"
        raise ValueError(f"{text!r}: {kind} {wrong}. Pool hidden[i]; hidden[0] is the output of the embeddings.")
    every = index == "*"
    return Feature(kind, None if every or index is None else int(index), every, match["stack"], pooling)


def _pooling(name: str | None, text: str) -> str | None:
    if name is not None and name not in POOLINGS:
        raise ValueError(f"{text!r}: unknown pooling {name!r}. Known: {', '.join(POOLINGS)}.")
    return name
