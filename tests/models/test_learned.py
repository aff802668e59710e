import math

import pytest
import torch

from hf_distill.losses import forward_kl, row_gradient
from hf_distill.losses.temperature_gradient import with_temperature_gradient
from hf_distill.models.learned import TemperatureModule, scale_gradient
from tests.losses.cases import random_case
from tests.losses.observing import LargeAllocations

START = 1 + 20 / (1 + math.exp(-1))


def module(*, per_item=False, **options):
    return TemperatureModule(minimum=1.0, spread=20.0, per_item=per_item, **options)


def loss(temperature, case):
    values = forward_kl(case.student, case.teacher, temperature=temperature.detach())
    return with_temperature_gradient(values, case.student, case.teacher, temperature).sum()


def trained(temperature_module, case, reversal, steps=20):
    optimizer = torch.optim.SGD(temperature_module.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(temperature_module(case.student, case.teacher, reversal=reversal), case).backward()
        optimizer.step()
    return temperature_module


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_all_items_begin_at_the_authors_temperature(shape):
    case = random_case(shape, 7, 0)
    assert module()(case.student, case.teacher).shape == ()
    torch.testing.assert_close(module()(case.student, case.teacher).detach(), torch.tensor(START))
    values = module(per_item=True)(case.student, case.teacher)
    torch.testing.assert_close(values.detach(), torch.full(shape, START))


@pytest.mark.parametrize("per_item", [False, True])
def test_against_the_student_the_loss_rises_and_with_it_it_falls(per_item):
    case = random_case((6,), 7, 0, scale=5.0)
    before = loss(module(per_item=per_item)(case.student, case.teacher), case)
    against = trained(module(per_item=per_item), case, reversal=-1.0)
    with_it = trained(module(per_item=per_item), case, reversal=1.0)
    assert loss(with_it(case.student, case.teacher), case) < before < loss(against(case.student, case.teacher), case)


@pytest.mark.parametrize("per_item", [False, True])
def test_at_the_start_of_the_curriculum_nothing_moves(per_item):
    case = random_case((6,), 7, 0)
    still = trained(module(per_item=per_item), case, reversal=0.0)
    for value, initial in zip(still.parameters(), module(per_item=per_item).parameters(), strict=True):
        assert torch.equal(value, initial)


def test_items_come_to_temperatures_of_their_own_within_bounds():
    case = random_case((6,), 7, 0, scale=2.0)
    values = trained(module(per_item=True), case, reversal=1.0)(case.student, case.teacher)
    assert len({*values.tolist()}) == 6
    assert ((values > 1) & (values < 21)).all()


@pytest.mark.parametrize("per_item", [False, True])
def test_the_weights_may_be_other_tensors_by_their_names(per_item):
    case, own = random_case((6,), 7, 0, scale=5.0), module(per_item=per_item)
    given = {name: (value + 0.01).detach().requires_grad_() for name, value in own.named_parameters()}
    temperature = own.of(case.student, case.teacher, reversal=-1.0, parameters=given)
    loss(temperature, case).backward()
    assert all(value.grad is None for value in own.parameters())
    assert given["theta"].grad.abs() > 0
    changed = module(per_item=per_item)
    changed.load_state_dict({name: value.detach() for name, value in given.items()})
    torch.testing.assert_close(changed.of(case.student, case.teacher, reversal=1.0), temperature)


def test_masked_rows_with_nan_poison_no_weight():
    case, own = random_case((3,), 7, 0), module(per_item=True)
    torch.nn.init.normal_(own.outer)
    case.student[1] = math.nan
    temperature = own(case.student, case.teacher, reversal=-1.0)
    assert temperature.isfinite().all()
    values = forward_kl(case.student, case.teacher, temperature=temperature.detach())
    values = with_temperature_gradient(values, case.student, case.teacher, temperature)
    values.where(torch.tensor([True, False, True]), 0.0).sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.any() for value in own.parameters())


def test_the_logits_get_no_gradient_from_the_temperature():
    case, own = random_case((3,), 7, 0), module(per_item=True)
    torch.nn.init.normal_(own.outer)
    student = case.student.requires_grad_()
    (gradient,) = torch.autograd.grad(own(student, case.teacher).sum(), student, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("classes", [1, 2, 40, 5000])
def test_its_size_does_not_depend_on_the_classes(classes):
    own = module(per_item=True)
    case = random_case((3,), classes, 0, padding=classes // 2)
    assert own(case.student, case.teacher).shape == (3,)
    assert sum(value.numel() for value in own.parameters()) == 1 + 64 * 65 + 64


def test_nothing_of_the_logits_size_is_allocated(monkeypatch):
    student, teacher = torch.randn(2, 2, 40, 2000, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 3 * 6 * 4 * 2000)
    with LargeAllocations(student.numel(), [student, teacher]) as allocations:
        module(per_item=True)(student, teacher).sum().backward()
    assert allocations.count == 0


def test_it_is_the_same_for_the_same_seed_and_leaves_torchs_randomness_alone():
    state = torch.get_rng_state()
    first, second, other = (module(per_item=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.inner, second.inner)
    assert not torch.equal(first.inner, other.inner)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_low_precision_give_a_float32_temperature():
    case, own = random_case((3,), 7, 0), module(per_item=True, dtype=torch.bfloat16)
    assert {value.dtype for value in own.parameters()} == {torch.bfloat16}
    assert own(case.student.bfloat16(), case.teacher.bfloat16()).dtype == torch.float32


def test_no_name_is_one_that_peft_takes_for_a_bias_and_no_weight_is_a_scalar():
    for name, value in module(per_item=True).named_parameters():
        assert "bias" not in name
        assert value.dim() >= 1, "FSDP2 shards no scalars"


def test_a_scaled_gradient_leaves_the_values():
    values = torch.randn(3, requires_grad=True)
    scaled = scale_gradient(values, -0.5)
    assert torch.equal(scaled, values)
    assert torch.autograd.grad(scaled.sum(), values)[0].tolist() == [-0.5] * 3
