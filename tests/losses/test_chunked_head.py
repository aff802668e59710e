import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import LOSSES, chunked_head
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.fused import cross_entropy_and_forward_kl
from hf_distill.losses.head_products import Workspace
from hf_distill.losses.head_rows import Divergence
from hf_distill.losses.transforms import standardize
from hf_distill.signals import LogitFactors
from tests.losses.variants import variants

ITEMS, WIDTH = (5, 11), 6


class Case:
    """Random heads of two widths, weights that are 0 for a share of the items, and the loss of both ways."""

    def __init__(self, *, masked=0.4, classes=23, shared=23, temperature=2.0, dtype=torch.float32, bias=True, **post):
        draw = torch.Generator().manual_seed(0)

        def normal(*shape, **options):
            return torch.randn(*shape, generator=draw).to(dtype).requires_grad_(options.get("grad", False))

        self.student = LogitFactors(
            normal(*ITEMS, WIDTH, grad=True),
            normal(classes, WIDTH, grad=True),
            normal(classes, grad=True) if bias else None,
            **post,
        )
        self.teacher = LogitFactors(normal(*ITEMS, 9), normal(shared, 9), normal(shared), softcap=post.get("softcap"))
        self.targets = torch.randint(classes, ITEMS, generator=draw)
        weights = torch.rand(2, *ITEMS, generator=draw) + 0.1
        self.task, self.kd = weights * (torch.rand(2, *ITEMS, generator=draw) >= masked)
        self.temperature = torch.rand(ITEMS, generator=draw) * 3 + 0.5 if temperature == "per item" else temperature

    @property
    def leaves(self):
        sources = (self.student.hidden, self.student.weight, self.student.bias)
        return [tensor for tensor in sources if tensor is not None and tensor.requires_grad]

    def chunked(self, divergence=None, **options):
        return chunked_head_loss(
            self.student,
            self.teacher,
            self.targets,
            task_weights=self.task,
            kd_weights=self.kd,
            temperature=self.temperature,
            divergence=divergence,
            **options,
        )

    def dense(self, divergence=None):
        """The same from the logits of all items, in float64."""
        wide = [replace(side, **_doubled(side)) for side in (self.student, self.teacher)]
        student, teacher = (side.dense() for side in wide)
        shared = min(student.shape[-1], teacher.shape[-1])
        targets = self.targets.masked_fill(self.task == 0, 0)
        cross_entropy = F.cross_entropy(student.flatten(0, -2), targets.flatten(), reduction="none").view(ITEMS)
        labels = self.targets.masked_fill((self.targets < 0) | (self.targets >= shared), -100)
        divergence = divergence or Divergence()
        compared = [student[..., :shared], teacher[..., :shared] * divergence.teacher_scale]
        if divergence.transform is not None:
            compared = [(side - side.mean(-1, keepdim=True)) / side.std(-1, keepdim=True) for side in compared]
        found = self.temperature
        temperature = found(*compared).detach() if callable(found) else torch.as_tensor(found).expand(ITEMS)
        self.temperatures = temperature.double()
        value = divergence.spec.function(*compared, **keywords_of(divergence, temperature, labels))
        if not divergence.temperature_squared:
            value = value / temperature**2
        cross_entropy, value = cross_entropy * (self.task > 0), value * (self.kd > 0)
        return (self.task * cross_entropy + self.kd * value).sum(), cross_entropy, value


def keywords_of(divergence, temperature, labels):
    filled = {"temperature": temperature} if divergence.spec.takes_temperature else {}
    return {**divergence.options, **filled, **({"targets": labels} if divergence.spec.takes_targets else {})}


def _doubled(side):
    return {
        name: getattr(side, name).double() for name in ("hidden", "weight", "bias") if getattr(side, name) is not None
    }


def gradients(case, loss, incoming=1.0):
    return torch.autograd.grad(loss * incoming, case.leaves)


def assert_equal(case, divergence=None, tolerance=1e-5, incoming=1.0, **options):
    results, expected = case.chunked(divergence, **options)[:3], case.dense(divergence)
    pairs = list(zip(results, expected, strict=True))
    pairs += zip(gradients(case, results[0], incoming), gradients(case, expected[0], incoming), strict=True)
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype or wanted.dtype == torch.float64
        difference = (found.double() - wanted.double()).norm()
        assert difference <= tolerance * wanted.double().norm().clamp(min=1e-30), difference / wanted.norm()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few items, and row blocks of fewer."""
    monkeypatch.setattr(chunked_head, "_SMALLEST_CHUNK", 7)
    monkeypatch.setattr("hf_distill.losses.row_gradient._CPU_SCRATCH_BYTES", 5 * 4 * 23 * 3)
    monkeypatch.setattr(chunked_head, "_CPU_CHUNK_BYTES", 1)


@variants(lambda spec: not spec.compares_rows)
@pytest.mark.parametrize("post", [{}, {"scale": 0.3}, {"softcap": 3.0, "bias": False}], ids=str)
def test_every_divergence_equals_the_dense_one(loss, post, small_chunks):
    assert_equal(Case(**post), Divergence(loss.spec, loss.options), incoming=1.7)


@pytest.mark.parametrize("masked", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, "per item"])
@pytest.mark.parametrize("sizes", [(23, 23), (23, 17), (17, 23)])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
def test_masks_temperatures_and_vocabularies(masked, temperature, sizes, name, small_chunks):
    case = Case(masked=masked, temperature=temperature, classes=sizes[0], shared=sizes[1])
    assert_equal(case, Divergence(LOSSES.get(name)))


@pytest.mark.parametrize("quotient", [1e-30, 1e-9, 1e-4, 1e4, 1e9])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skewed_kl"])
def test_one_term_may_weigh_far_more_than_the_other(quotient, name, small_chunks):
    case = Case(masked=0.0)
    case.kd *= quotient
    assert_equal(case, Divergence(LOSSES.get(name)))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_an_item_that_counts_in_neither_term_may_hold_anything(name, small_chunks):
    case = Case(masked=0.7)
    unused = (case.task == 0) & (case.kd == 0)
    clean = case.chunked(Divergence(LOSSES.get(name)))
    with torch.no_grad():
        case.student.hidden[unused] = math.nan
        case.teacher.hidden[unused] = math.inf
        case.targets[case.task == 0] = -100
    poisoned = case.chunked(Divergence(LOSSES.get(name)))
    assert torch.equal(clean[0], poisoned[0])
    for gradient in gradients(case, poisoned[0]):
        assert gradient.isfinite().all()
    assert not gradients(case, case.chunked()[0])[0][unused].any()


def test_a_batch_in_which_nothing_counts_is_0_and_has_a_graph():
    case = Case(masked=2.0)
    loss, *values = case.chunked()[:3]
    assert loss == 0
    assert not any(value.any() for value in values)
    assert not any(gradient.any() for gradient in gradients(case, loss))


def test_only_items_that_count_are_projected(small_chunks, monkeypatch):
    case, projected = Case(masked=0.5), []
    logits = chunked_head.ChunkedHead.logits
    monkeypatch.setattr(
        chunked_head.ChunkedHead,
        "logits",
        lambda self, hidden, **factor: projected.append(len(hidden)) or logits(self, hidden, **factor),
    )
    case.chunked()
    assert sum(projected) == 2 * int(((case.task > 0) | (case.kd > 0)).sum())


def test_a_frozen_head_gets_no_gradient_and_no_memory(small_chunks, monkeypatch):
    case = Case()
    (expected,) = torch.autograd.grad(case.dense()[0], [case.student.hidden])
    frozen = case.student.weight.requires_grad_(False), case.student.bias.requires_grad_(False)
    heads, attached = [], chunked_head.ChunkedHead.attached
    monkeypatch.setattr(chunked_head.ChunkedHead, "attached", lambda self: heads.append(self) or attached(self))
    loss = case.chunked()[0]
    assert [*heads[0].gradients] == ["hidden"]
    torch.testing.assert_close(torch.autograd.grad(loss, [case.student.hidden]), (expected,))
    assert all(tensor.grad is None for tensor in frozen)


def test_without_gradients_there_is_no_graph():
    case = Case()
    with torch.no_grad():
        results = case.chunked()[:4]
    assert not any(result.requires_grad for result in results)
    torch.testing.assert_close(results[0], case.chunked()[0].detach())


def test_a_retained_graph_gives_its_gradients_twice():
    case = Case()
    loss = case.chunked()[0]
    first = torch.autograd.grad(2 * loss, case.leaves, retain_graph=True)
    torch.testing.assert_close(gradients(case, loss), tuple(gradient / 2 for gradient in first))


@pytest.mark.parametrize(
    ("items", "classes", "chunk"),
    [(8192, 32_000, 373), (2048, 32_000, 342), (1024, 151_936, 256), (700, 1_000, 700), (100, 32_000, 100), (0, 9, 0)],
)
def test_chunks_are_alike_and_at_most_the_whole_blocks_of_the_budget(items, classes, chunk):
    assert chunked_head.chunk_items(torch.arange(items), 8 * classes, None) == chunk


def test_a_row_of_half_precision_counts_as_much_as_the_sums_of_its_product(monkeypatch):
    counted, chunk_items = [], chunked_head.chunk_items
    monkeypatch.setattr(chunked_head, "chunk_items", lambda *given: counted.append(given[1]) or chunk_items(*given))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        Case(dtype=dtype).chunked()
    assert counted == [2 * 23 * size for size in (8, 4, 4)]


def test_what_tied_embeddings_add_to_a_heads_gradient_takes_no_third_tensor(monkeypatch):
    case, attached = Case(bias=False), chunked_head.ChunkedHead.attached
    weight = case.student.weight
    ids = torch.arange(math.prod(ITEMS)).view(ITEMS) % len(weight)
    case.student = replace(case.student, hidden=F.embedding(ids, weight))
    places = []

    def spied(head):
        pairs = attached(head)
        places.extend(gradient.data_ptr() for source, gradient in pairs if source is weight)
        return pairs

    monkeypatch.setattr(chunked_head.ChunkedHead, "attached", spied)
    case.chunked().loss.backward()
    assert [weight.grad.data_ptr()] == places  # autograd adds in place what has no views and no other owner


def test_memory_kept_for_the_next_call_changes_nothing(small_chunks, monkeypatch):
    workspace = Workspace()

    def kept_by(case):
        given = [], []
        for memory, found in zip((workspace, None), given, strict=True):
            terms = case.chunked(workspace=memory)
            found += [terms.loss, terms.divergence, *gradients(case, terms.loss)]
        assert all(map(torch.equal, *given))
        return [buffer.data_ptr() for buffer in workspace._kept.values()]

    kept_by(Case(masked=0.9))
    largest = kept_by(Case(classes=40, shared=30))
    assert len(largest) == 2
    assert kept_by(Case()) == largest
    kept_by(Case(dtype=torch.float64))
    monkeypatch.setattr("hf_distill.losses.head_products._LARGEST_KEPT_BYTES", 0)
    assert not kept_by(Case(classes=80, shared=80))


def test_a_second_derivative_is_refused():
    case = Case()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.chunked()[0], case.leaves, create_graph=True)


def error(case, loss):
    """How far the gradients are from float64's, relative to their length, at most."""
    pairs = zip(gradients(case, loss), gradients(case, case.dense()[0]), strict=True)
    return max(float((found.double() - wanted.double()).norm() / wanted.double().norm()) for found, wanted in pairs)


def test_half_precision_is_no_worse_than_the_dense_path_and_float32_logits_better(small_chunks):
    case = Case(dtype=torch.bfloat16, masked=0.1)
    dense, *_ = cross_entropy_and_forward_kl(
        case.student.dense(),
        case.teacher.dense(),
        case.targets,
        task_weights=case.task,
        kd_weights=case.kd,
        temperature=case.temperature,
    )
    assert error(case, case.chunked()[0]) <= 1.5 * error(case, dense)
    assert error(case, case.chunked(float32_logits=True)[0]) <= 5e-3


def test_autocast_chooses_the_dtype_of_the_products(small_chunks):
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.chunked()[0]
    assert loss.dtype == torch.float32
    found, expected = gradients(case, loss), gradients(case, case.dense()[0])
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert 1e-5 < float((gradient - wanted).norm() / wanted.norm()) < 5e-2


def test_autocast_to_float16_is_refused():
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="Autocast asks for float16"):
        Case().chunked()


def doubt(student, teacher):
    """A temperature that hangs on both sides."""
    return 1 + teacher.softmax(-1).amax(-1) + 2 * student.softmax(-1).amax(-1)


AROUND = [
    {},
    {"teacher_scale": 0.3},
    {"temperature_squared": False},
    {"transform": standardize},
    {"transform": standardize, "teacher_scale": 0.3, "temperature_squared": False},
]


@pytest.mark.parametrize("temperature", [2.0, doubt], ids=["of all", "of each"])
@pytest.mark.parametrize("around", AROUND, ids=lambda around: "-".join(around))
@pytest.mark.parametrize("options", [{}, {"shared": 17, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "skewed_reverse_kl", "dkd", "tvd"])
def test_temperatures_of_the_logits_and_what_is_done_to_them(name, options, around, temperature, small_chunks):
    case, divergence = Case(temperature=temperature, **options), Divergence(LOSSES.get(name), **around)
    assert_equal(case, divergence)
    kept = (case.task > 0) | (case.kd > 0)
    found = torch.where(kept, case.chunked(divergence).temperature, 0.0)
    torch.testing.assert_close(found.double(), torch.where(kept, case.temperatures, 0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [23, 17])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_agreement_is_that_of_the_largest_logits_of_the_shared_classes(masked, shared, small_chunks):
    case = Case(masked=masked, shared=shared)
    with torch.no_grad():
        case.student.bias.mul_(3)
        case.teacher.bias.copy_(case.student.bias[:shared])
        expected = case.student.dense()[..., :shared].argmax(-1) == case.teacher.dense().argmax(-1)
        found = case.chunked(agreement=True).agreement
    kept = (case.task > 0) | (case.kd > 0)
    assert torch.equal(found, expected & kept)
    assert found.any()
    assert not (found | ~kept).all()
    assert case.chunked().agreement is None


def test_labels_reach_a_divergence_where_the_task_weighs_nothing():
    case = Case(masked=0.0)
    case.task.zero_()
    case.targets[0] = -100
    assert_equal(case, Divergence(LOSSES.get("dkd")))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, "per item"])
@pytest.mark.parametrize("sizes", [(23, 23), (23, 17), (17, 23)])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_without_a_task_term_the_comparison_stands_alone(name, sizes, temperature, small_chunks):
    case = Case(classes=sizes[0], shared=sizes[1], temperature=temperature)
    case.task.zero_()
    assert_equal(case, Divergence(LOSSES.get(name)))


@pytest.mark.parametrize("name", ["dist", "hidden_mse"])
def test_what_is_no_comparison_of_one_positions_logits_is_refused(name):
    with pytest.raises(ValueError, match=name):
        Divergence(LOSSES.get(name))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": torch.ones(3)}, ValueError, r"task_weights has shape \(3,\)"),
        ({"targets": torch.zeros(ITEMS)}, TypeError, r"targets\.long\(\)"),
        ({"teacher": LogitFactors(torch.ones(4, 9), torch.ones(23, 9))}, ValueError, "same positions"),
        ({"teacher": LogitFactors(torch.ones(*ITEMS, 9).half(), torch.ones(23, 9).half())}, ValueError, "float16"),
        ({"temperature": 0.0}, ValueError, "temperature is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    case = Case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(error, match=message):
        case.chunked()


@pytest.mark.parametrize("sizes", [(23, 23), (23, 17), (17, 23)])
def test_items_without_a_label_stand_beside_others(sizes, small_chunks):
    case = Case(masked=0.0, classes=sizes[0], shared=sizes[1])
    case.task[:, ::3] = 0
    assert_equal(case)
