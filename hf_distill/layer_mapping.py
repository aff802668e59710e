"""Which layers of the teacher the layers of the student learn from.

Layers count from 1; 0 is the output of the embeddings. Static maps are (student layer, teacher layer) pairs, fixed
before training. Dynamic maps choose among the teacher's candidate layers per epoch (`random`) or from the batch at
hand (`argmin`, `emd`, `attention`).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from hf_distill.losses.base import compute_dtype
from hf_distill.registry import Registry

Pairs = tuple[tuple[int, int], ...]

# The teacher layer of student layer s, for s = 1..m student layers and n teacher layers. A student deeper than its
# teacher would round down to layer 0, which is none.
_TEACHER_LAYERS: dict[str, Callable[[int, int, int], int]] = {
    "uniform": lambda s, m, n: max(1, (2 * s * n + m) // (2 * m)),
    "uniform_last": lambda s, m, n: max(1, s * n // m),
    "last": lambda s, m, n: n - m + s,
    "first": lambda s, m, n: s,
    "skip": lambda s, m, n: s * (n // m),
}
STATIC_MAPS = tuple(_TEACHER_LAYERS)
DYNAMIC_MAPS = ("argmin", "attention", "emd", "random")
EXPLICIT_MAP = "explicit"
COPIED_MAP = "copied"  # read from the weights of both models, not from their depths

# Every map by its name, with its kind: "static", "explicit" or "dynamic".
MAPS: Registry[str] = Registry("layer map")
for _kind, _names in (
    ("static", STATIC_MAPS),
    (EXPLICIT_MAP, (EXPLICIT_MAP,)),
    (COPIED_MAP, (COPIED_MAP,)),
    ("dynamic", DYNAMIC_MAPS),
):
    for _name in _names:
        MAPS.register(_name, _kind)


def layer_pairs(strategy: str, *, student_depth: int, teacher_depth: int, with_embeddings: bool) -> Pairs:
    """The (student layer, teacher layer) pairs of a static map, ordered, every student layer at most once.

    With M student and N teacher layers, s = 1..M:

    - `uniform`: s -> s N / M, rounded (halves up); with embeddings also 0 -> 0. TinyBERT's g(m), arXiv:1909.10351.
    - `uniform_last`: s -> s N / M, rounded down: the last layer of each of M blocks. TinyBERT's code, for attention.
    - `first`: s -> s, and `last`: s -> N - M + s, the teacher's first or last M layers. PKD-last, Sun et al. 2019,
      arXiv:1908.09355, is `last` without the last layers.
    - `skip`: s -> s floor(N / M) for s < M. PKD-skip of the same paper; the last layers are left to the logits.

    A student deeper than its teacher has several layers for one of the teacher's in the uniform maps, layer 1 at
    least, and no place in the others.

    Args:
        strategy: one of `STATIC_MAPS`.
        student_depth: M, the number of layers.
        teacher_depth: N.
        with_embeddings: whether the feature has a layer 0, as hidden states do and attention does not. Only `uniform`
            maps it.

    Raises:
        ValueError: the strategy is unknown or not static, or it maps nothing at these depths.
    """
    kind = MAPS.get(strategy)
    if kind != "static":
        raise ValueError(
            f"The layer map {strategy!r} is {kind}: the depths alone do not give its pairs. Those that they give: "
            f"{', '.join(STATIC_MAPS)}."
        )
    depths = f"{student_depth} student and {teacher_depth} teacher layers"
    if min(student_depth, teacher_depth) < 1:
        raise ValueError(f"A layer map needs layers on both sides; it has {depths}.")
    if student_depth > teacher_depth and not strategy.startswith("uniform"):
        raise ValueError(
            f"The layer map {strategy!r} needs a teacher at least as deep as the student; it has {depths}. Use "
            "uniform, or explicit pairs."
        )
    first = 0 if with_embeddings and strategy == "uniform" else 1
    last = student_depth - 1 if strategy == "skip" else student_depth
    if last < first:
        raise ValueError(
            f"The layer map {strategy!r} leaves the student's last layer out, and so maps nothing with {depths}. Use "
            "uniform or last."
        )
    teacher_layer = _TEACHER_LAYERS[strategy]
    return tuple((s, teacher_layer(s, student_depth, teacher_depth) if s else 0) for s in range(first, last + 1))


def explicit_pairs(
    pairs: Mapping[int, int] | Iterable[Sequence[int]],
    *,
    student_depth: int,
    teacher_depth: int,
    with_embeddings: bool,
) -> Pairs:
    """The pairs that a user wrote, in their order, with negative layers counted from the end.

    Args:
        pairs: {student layer: teacher layer}, or [student layer, teacher layer] each; a layer may be in several.
        student_depth: the number of the student's layers; -1 is the last of them.
        teacher_depth: that of the teacher.
        with_embeddings: whether layer 0 exists, as in `layer_pairs`.

    Raises:
        ValueError: there is no pair, one is given twice, or it names a layer that does not exist.
    """
    written = [tuple(pair) for pair in (pairs.items() if isinstance(pairs, Mapping) else pairs)]
    depths = (student_depth, teacher_depth)
    has = f"The student has {student_depth} layers, the teacher {teacher_depth}."
    if not written:
        raise ValueError(
            f"The layer map is empty. {has} Write pairs such as [[1, {teacher_depth}]], or drop the term."
        )
    first = 0 if with_embeddings else 1
    resolved: list[tuple[int, int]] = []
    for pair in written:
        if len(pair) != 2 or not all(type(layer) is int for layer in pair):
            raise ValueError(
                f"The layer map holds {list(pair)!r}; expected two whole numbers, a student and a teacher layer."
            )
        student, teacher = (
            layer + depth + 1 if layer < 0 else layer for layer, depth in zip(pair, depths, strict=True)
        )
        if not (first <= student <= student_depth and first <= teacher <= teacher_depth):
            layers = "from 1; 0 is the embeddings" if with_embeddings else "from 1, and this feature has no layer 0"
            raise ValueError(
                f"The layer map holds {list(pair)}, a layer that does not exist. {has} Layers count {layers}, and -1 "
                "is the last."
            )
        if (student, teacher) in resolved:
            raise ValueError(f"The layer map holds the pair {[student, teacher]} twice, as {list(pair)}. {has}")
        resolved.append((student, teacher))
    return tuple(resolved)


def random_pairs(student_layers: Sequence[int], candidates: Sequence[int], *, epoch: int, seed: int) -> Pairs:
    """Each student layer with one of the teacher's candidates, drawn without replacement for this epoch, in order.

    The same seed and epoch give the same pairs in every process and after resuming.

    Args:
        student_layers: layers of the student, ascending.
        candidates: layers of the teacher, at least as many.
        epoch: from 0.
        seed: of the run.

    Source: RAIL-KD, Haidar et al. 2022, arXiv:2109.10164, section 3.
    """
    if len(candidates) < len(student_layers):
        raise ValueError(
            f"A random layer map draws a teacher layer for each of the {len(student_layers)} student layers "
            f"{list(student_layers)}, but has {len(candidates)} candidates {list(candidates)}. Give more candidates."
        )
    drawn = random.Random(f"{seed} {epoch}").sample(sorted(candidates), len(student_layers))
    return tuple(zip(student_layers, sorted(drawn), strict=True))


def ordered_argmin(costs: Tensor) -> Tensor:
    """One student layer for each candidate, in order and of least total cost, as (student, candidates) weights 0 or 1.

    Later candidates get later student layers. Where there are more candidates than student layers, neighbours may
    share one. Found by dynamic programming on the device; nothing is read back.

    Args:
        costs: (student layers, candidates), both in ascending order. A NaN makes the choice arbitrary.

    Returns: (student layers, candidates) in the dtype of `costs`, without a graph; each column sums to 1. The term is
        (weights * costs).sum().
    Source: CoFi, Xia et al. 2022, arXiv:2204.00408, eq. 4-5. Its code goes from the last candidate down and gives each
        the best layer below the one before; this is the best of all orders.
    """
    costs = costs.detach()
    student_layers, candidates = costs.shape
    shared = candidates > student_layers
    least, origins = costs[:, 0], []  # least cost of the candidates so far, if the last of them has this layer
    for candidate in range(1, candidates):
        least, origin = least.cummin(0)
        if not shared:
            least, origin = (_moved_up(least, fill=torch.inf), _moved_up(origin, fill=0))
        origins.append(origin)
        least = least + costs[:, candidate]
    chosen = [least.argmin(0, keepdim=True)]
    for origin in reversed(origins):
        chosen.append(origin.gather(0, chosen[-1]))
    layers = torch.stack(chosen[::-1], dim=-1)  # (1, candidates)
    return torch.zeros_like(costs).scatter_(0, layers, 1.0)


def transport(costs: Tensor) -> Tensor:
    """The cheapest flow from student layers to candidates, each side's mass spread evenly, as (student, candidates).

    Solved on the host, so that a device is waited for. A NaN or infinite cost gives the even flow, with which it
    reaches the loss.

    Args:
        costs: (student layers, candidates), >= 0.

    Returns: (student layers, candidates) in the dtype and on the device of `costs`, without a graph; it sums to 1. The
        term is (flow * costs).sum().
    Source: BERT-EMD, Li et al. 2020, arXiv:2010.06133, eq. 3-6. The authors' code moves mass towards cheap layers from
        step to step; here it stays even, so that a step depends on its batch alone.
    """
    shape = student_layers, candidates = costs.shape
    numbers = costs.detach().double().cpu().numpy()
    flow = np.full(shape, 1 / (student_layers * candidates))
    largest = np.abs(numbers).max()
    if np.isfinite(largest) and largest > 0:
        leaving = np.kron(np.eye(student_layers), np.ones(candidates))
        arriving = np.tile(np.eye(candidates), student_layers)
        masses = np.repeat([1 / student_layers, 1 / candidates], shape)
        # Relative costs: the solver's tolerance is absolute.
        solution = linprog(numbers.ravel() / largest, A_eq=np.vstack([leaving, arriving]), b_eq=masses, method="highs")
        flow = solution.x.reshape(shape)
    return torch.from_numpy(flow).to(costs)


def attend(student: Tensor, teacher: Tensor) -> Tensor:
    """For each student layer the mean of the teacher's layers, weighted by a softmax of their products with it.

    The gradient goes through the weights too, as in the paper.

    Args:
        student: (student layers, batch, width).
        teacher: (candidates, batch, width), the same width.

    Returns: (student layers, batch, width) float32.
    Source: ALP-KD, Passban et al. 2021, arXiv:2012.14022, eq. 5-7.
    """
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"The student's layers have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; expected "
            "(layers, batch, width) of equal batch and width. Give the match a projection."
        )
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        teacher = teacher.detach().to(dtype)
        products = torch.einsum("sbw,cbw->sbc", student.to(dtype), teacher)
        return torch.einsum("sbc,cbw->sbw", products.softmax(-1), teacher)


def _moved_up(values: Tensor, *, fill: float) -> Tensor:
    return torch.cat([torch.full_like(values[:1], fill), values[:-1]])
