"""The kernel of a head's rows: what only it can get wrong, against float64."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_distill.losses import LOSSES, head_device
from hf_distill.losses.chunked_head import chunked_head_loss
from hf_distill.losses.head_device import proven_kernel
from hf_distill.losses.head_formulas import closed_form
from hf_distill.losses.head_rows import Divergence, HeadItems, RowLosses
from hf_distill.losses.kernel_rows import KernelCase, KernelRows
from hf_distill.signals import LogitFactors
from tests.losses.kernels import DEVICE, kernel_of_heads

pytest.importorskip("triton")

from hf_distill.losses import head_kernel

FORMS = {
    name: closed_form(name.split()[0], options)
    for name, options in {
        "forward_kl": {},
        "reverse_kl": {},
        "jsd": {},
        "jsd 0.01": {"beta": 0.01},
        "generalized_jsd": {"beta": 0.9},
        "skewed_kl": {},
        "skewed_reverse_kl": {},
    }.items()
}


def case_of(form="forward_kl", **changes):
    float32 = torch.float32
    plain = KernelCase(FORMS[form], None, None, (float32, float32), float32, False, False, torch.device(DEVICE))
    return plain._replace(**changes)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(head_kernel, "BLOCK", 64)


def error(case, classes):
    return head_device._error_in_trial(head_kernel.HeadKernel(case), case, classes=classes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {"is_wider": True, "find_agreement": True},
        {"softcap": 5.0, "teacher_softcap": 4.0, "is_wider": True},
        {"gradient_dtype": None, "find_agreement": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_rows_of_several_blocks_are_as_in_float64(form, changes):
    assert error(case_of(form, **changes), classes=150) <= 5e-6


@pytest.mark.parametrize("classes", [20, 64, 65, 128])
def test_a_last_block_may_be_full_or_of_one_class(classes):
    assert error(case_of("reverse_kl"), classes) <= 5e-6


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_a_gradient_in_half_precision_goes_over_the_logits(logits):
    case = case_of("jsd", dtypes=(logits, torch.float32), gradient_dtype=torch.bfloat16)
    assert error(case, classes=150) <= 8e-3


def heads(*, classes=70, shared=70, items=6, **post):
    """Two heads, (items,) targets, and weights of either term that leave one item out of both."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=draw) for size in ((items, 8), (classes, 8), (classes,)))
    student = LogitFactors(*(tensor.to(DEVICE).requires_grad_() for tensor in (hidden, weight, bias)), **post)
    other = [torch.randn(*size, generator=draw).to(DEVICE) for size in ((items, 12), (shared, 12), (shared,))]
    teacher = LogitFactors(*other, softcap=post.get("softcap"))
    weights = torch.rand(2, items, generator=draw).add_(0.1).to(DEVICE)
    weights[0, 0] = weights[1, 1] = 0
    weights[:, 2] = 0
    return student, teacher, torch.randint(classes, (items,), generator=draw).to(DEVICE), *weights


def results(given, name, **options):
    """Loss, values and gradients of a chunked head."""
    student, teacher, targets, task, kd = given
    around = {key: options.pop(key) for key in ("teacher_scale", "temperature_squared") if key in options}
    terms = chunked_head_loss(
        student,
        teacher,
        targets,
        task_weights=task,
        kd_weights=kd,
        divergence=Divergence(LOSSES.get(name), **around),
        agreement=True,
        **options,
    )
    leaves = [student.hidden, student.weight, student.bias]
    return [*terms, *torch.autograd.grad(terms.loss, leaves)]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skewed_kl"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 3.0, "shared": 61, "scale": 0.4},
        {"temperature": 2.0, "softcap": 4.0, "teacher_scale": 0.5, "temperature_squared": False},
        {"temperature": torch.linspace(0.5, 3, 6).to(DEVICE), "classes": 61},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_chunked_head_gives_by_the_kernel_what_it_gives_by_torch(name, options):
    sizes = {key: options[key] for key in ("classes", "shared", "scale", "softcap") if key in options}
    given, rest = heads(**sizes), {key: value for key, value in options.items() if key not in sizes}
    expected = results(given, name, **rest)
    with kernel_of_heads():
        found = results(given, name, **rest)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_of_1e4_are_compared_as_exactly_as_small_ones(name, shift):
    draw = torch.Generator().manual_seed(0)
    # On a grid of 1/64 they stay exact beside 1e4.
    logits, teacher = (torch.randn(4, 150, generator=draw).mul(192).round().div(64).to(DEVICE) for _ in range(2))
    targets, weights = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.ones(4, 3, device=DEVICE)
    kernel = head_kernel.HeadKernel(case_of(name))
    expected_gradient, gradient = torch.empty_like(logits), torch.empty_like(logits)
    expected = kernel(KernelRows(logits, teacher, targets, weights, expected_gradient))
    found = kernel(KernelRows(logits + shift, teacher, targets, weights, gradient))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)


def test_a_label_that_there_is_no_class_for_makes_the_loss_nan():
    given = heads()
    given[2][3] = 70
    with kernel_of_heads():
        terms = results(given, "forward_kl")
    assert terms[0].isnan()
    assert terms[1].isnan().tolist() == [False, False, False, True, False, False]


def special_rows(classes, shared):
    """Logits of either side in which a row each is impossible, without bound, no number, or far from the others."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(12, size, generator=draw) * 3 for size in (classes, shared))
    inf = torch.inf
    student[0, 3], student[1, 100], student[2] = inf, inf, -inf  # in the first block, in a later one, everywhere
    student[3, :64] = teacher[4, :64] = teacher[5] = -inf  # whole blocks
    teacher[6, 2], teacher[7, 120] = inf, torch.nan
    student[8, 5] = teacher[9, 5] = -inf  # impossible to one side, which weighs nothing beside a certain class
    teacher[8, 100] = student[9, 100] = 500.0
    student[10], teacher[10] = student[10] * 100, teacher[10] * 100
    student[11] = 1.5
    return student, teacher


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("forward_kl", {"shared": 133}),
        ("forward_kl", {"softcap": 5.0}),
        ("reverse_kl", {}),
        ("reverse_kl", {"softcap": 5.0}),
        ("jsd", {"shared": 133}),
        ("skewed_kl", {}),
    ],
)
def test_rows_that_hold_what_is_no_number_are_as_by_torch(name, options):
    factors = LogitFactors(torch.zeros(1, 1), torch.zeros(1, 1), softcap=options.get("softcap"))

    def walked(device):
        student, teacher = (logits.to(device) for logits in special_rows(150, options.get("shared", 150)))
        ones = torch.ones(len(student), 1, device=device)
        targets = torch.arange(len(student), device=device).unsqueeze(-1)
        items = HeadItems(targets, ones / 2, ones, 2 * ones, 0 * ones, 0 * ones, torch.zeros_like(ones).bool())
        rows = RowLosses(Divergence(LOSSES.get(name)), factors, factors, temperature=items.temperature)
        with torch.no_grad():
            share = rows.walk(student, teacher, items, student, has_labels=True)
            if share is not None:
                student *= share
        return [tensor.cpu() for tensor in (items.cross_entropy, items.divergence, student)]

    *expected, gradient = walked("cpu")
    with kernel_of_heads() as device:
        *found, found_gradient = walked(device)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    is_finite = gradient.isfinite().all(-1)
    assert torch.equal(found_gradient.isfinite().all(-1), is_finite)
    assert 2 < is_finite.sum() < len(gradient)
    torch.testing.assert_close(found_gradient[is_finite], gradient[is_finite], rtol=1e-4, atol=1e-5)


def test_labels_may_be_a_view():
    given = heads()
    student, teacher, targets, *weights = given
    apart = torch.zeros(len(targets), 2, dtype=torch.int64, device=DEVICE)
    apart[:, 0] = targets
    weights = [weight + 0.1 for weight in weights]  # all items kept, so that nothing copies the labels
    expected = results((student, teacher, targets, *weights), "forward_kl")
    with kernel_of_heads():
        found = results((student, teacher, apart[:, 0], *weights), "forward_kl")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_hidden_states_in_float64_are_left_to_torch(monkeypatch):
    student, *rest = heads()
    student = replace(student, hidden=student.hidden.detach().double().requires_grad_())
    expected = results((student, *rest), "forward_kl")
    monkeypatch.setattr(head_device, "KERNEL_DEVICES", (DEVICE,))
    torch.testing.assert_close(results((student, *rest), "forward_kl"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_trial_does_not_hang_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert error(case_of("jsd"), classes=150) <= 5e-6
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def warnings(monkeypatch):
    """Of a process in which no kernel has been tried."""
    found = []
    monkeypatch.setattr(head_device.logger, "warning_once", found.append)
    monkeypatch.setattr(head_device, "KERNEL_DEVICES", (DEVICE,))
    proven_kernel.cache_clear()
    yield found
    proven_kernel.cache_clear()


def test_without_triton_torch_forms_the_rows_and_a_warning_says_so_once(monkeypatch, warnings):
    given = heads()
    monkeypatch.setattr(head_device, "KERNEL_DEVICES", ())
    expected = results(given, "forward_kl")
    monkeypatch.setattr(head_device, "KERNEL_DEVICES", (DEVICE,))
    monkeypatch.setitem(sys.modules, "hf_distill.losses.head_kernel", None)
    for _ in range(2):
        torch.testing.assert_close(results(given, "forward_kl"), expected, rtol=1e-6, atol=1e-6)
    assert len(warnings) == 1
    assert "ModuleNotFoundError" in warnings[0]


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, warnings):
    given = heads()
    right = head_kernel.HeadKernel.__call__

    def wrong(self, rows, **options):
        cross_entropy, divergence, agreement = right(self, rows, **options)
        return cross_entropy, divergence * 1.001, agreement

    monkeypatch.setattr(head_kernel.HeadKernel, "__call__", wrong)
    found = results(given, "forward_kl")
    monkeypatch.setattr(head_device, "KERNEL_DEVICES", ())
    torch.testing.assert_close(found, results(given, "forward_kl"), rtol=1e-6, atol=1e-6)
    (warning,) = warnings
    assert "off by 1.0e-03" in warning


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
def test_triton_compiles_it_for_gpus(target, tmp_path):
    command = [sys.executable, "-m", "tests.losses.compile_head_kernel", *target.split()]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["forward_kl", "reverse_kl", "jsd"]
