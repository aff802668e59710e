import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.losses.difficulty import DIFFICULTIES, difficulty
from hf_distill.schedules import SCHEDULES, Schedule
from hf_distill.temperature import (
    POLICIES,
    AdaptiveTemperature,
    CwsmTemperature,
    FlswTemperature,
    LearnedTemperature,
    ScheduledTemperature,
    TemperaturePolicy,
    read_temperature,
    write_temperature,
)
from tests.losses.cases import cases, random_case

POINTS = {"points": [[0, 8], [0.5, 4], [1, 2]]}
WRITTEN = [
    4,
    {"policy": "linear", "from": 8, "to": 2},
    {"policy": "cosine", "from": 8, "to": 2, "start": 0.25},
    {"policy": "exponential", "from": 8, "to": 2, "end": 0.5},
    {"policy": "warmup", "from": 1, "to": 4},
    {"policy": "step", **POINTS},
    {"policy": "piecewise", **POINTS},
    {"policy": "adaptive"},
    {"policy": "adaptive", "signal": "loss", "direction": "harder_cooler", "min": 1, "max": 3, "sharpness": 0.5},
    {"policy": "flsw", "base": 6, "strength": 2, "power": 1},
    {"policy": "cwsm", "min": 1},
    {"policy": "learned"},
    {"policy": "learned", "scope": "instance", "min": 2, "range": 5, "curriculum": 1, "learning_rate_factor": 10},
]
PER_ITEM = [
    *(
        AdaptiveTemperature(signal, direction)
        for signal in DIFFICULTIES
        for direction in ("harder_hotter", "harder_cooler")
    ),
    FlswTemperature(),
    CwsmTemperature(strength=3.0),
]


def name_of(policy):
    return "-".join(str(part) for part in (policy.name, *vars(policy).values()))


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_what_is_written_is_read_back_even_through_yaml(written):
    temperature = read_temperature(written)
    assert write_temperature(temperature) == written
    again = read_temperature(yaml.safe_load(yaml.safe_dump(write_temperature(temperature))))
    assert again == temperature
    assert hash(again) == hash(temperature)


def test_every_policy_is_written_in_the_tests():
    assert {written["policy"] for written in WRITTEN if isinstance(written, dict)} | {"constant"} == {*POLICIES}


def test_a_constant_is_a_number_and_a_number_is_not_touched():
    assert read_temperature({"policy": "constant", "value": 4}) == read_temperature({"value": 4}) == 4
    assert read_temperature(4) == 4
    assert read_temperature(AdaptiveTemperature()) == AdaptiveTemperature()


def test_a_name_alone_is_the_policy_as_by_default():
    for policy in (AdaptiveTemperature, FlswTemperature, CwsmTemperature, LearnedTemperature):
        assert read_temperature(policy.name) == policy()


def test_a_scheduled_temperature_is_a_number_now_and_others_stay_as_they_are():
    policy = read_temperature({"policy": "linear", "from": 8, "to": 2})
    logits = torch.zeros(2, 3)
    assert policy.at(0.25) == policy(0.25, logits, logits) == 6.5
    assert not policy.is_per_item
    assert (policy.lowest, policy.highest) == (2, 8)
    for other in (*PER_ITEM, LearnedTemperature()):
        assert other.at(0.25) is other


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "constant"])
def test_every_kind_of_schedule_is_a_policy(kind):
    options = POINTS if kind in ("step", "piecewise") else {"from": 8, "to": 2}
    policy = read_temperature({"policy": kind, **options})
    assert policy == ScheduledTemperature(Schedule.of({"kind": kind, **options}))


@given(cases(), st.sampled_from(PER_ITEM), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_items_temperature_is_finite_and_within_its_bounds(case, policy, binary):
    case.student.masked_fill_(torch.rand(case.student.shape[:-1])[..., None] < 0.2, math.nan)
    values = policy(0.5, case.student, case.teacher, binary=binary)
    assert values.shape == case.student.shape[:-1]
    assert values.dtype == torch.float32
    assert ((values >= policy.lowest) & (values <= policy.highest)).all()


@pytest.mark.parametrize("policy", PER_ITEM, ids=name_of)
def test_a_policy_is_pure(policy):
    case = random_case((4, 3), 7, 0, scale=2.0)
    case.student.requires_grad_()
    before = case.student.detach().clone(), case.teacher.clone(), torch.get_rng_state()
    first, second = (policy(progress, case.student, case.teacher) for progress in (0.0, 0.9))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(map(torch.equal, (case.student, case.teacher, torch.get_rng_state()), before))


@pytest.mark.parametrize("policy", PER_ITEM, ids=name_of)
def test_equal_bounds_are_one_temperature_for_all(policy):
    narrow = type(policy)(
        **{**vars(policy), "min": 5.0, "max": 5.0, **({"base": 5.0} if hasattr(policy, "base") else {})}
    )
    case = random_case((6,), 7, 0, scale=2.0)
    assert narrow(0.0, case.student, case.teacher).tolist() == [5.0] * 6


@pytest.mark.parametrize("policy", [policy for policy in PER_ITEM if policy.name == "adaptive"], ids=name_of)
def test_an_adaptive_temperature_of_an_item_is_the_same_in_any_batch(policy):
    case = random_case((5,), 7, 0, scale=2.0)
    whole = policy(0.0, case.student, case.teacher)
    alone = [policy(0.0, case.student[row : row + 1], case.teacher[row : row + 1]) for row in range(5)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("signal", [*DIFFICULTIES])
def test_an_adaptive_temperature_goes_with_or_against_the_difficulty(signal, sharpness):
    case = random_case((6,), 7, 0, scale=2.0)
    hard = difficulty(signal, case.student, case.teacher) ** sharpness
    options = {"signal": signal, "min": 2.0, "max": 10.0, "sharpness": sharpness}
    hotter = AdaptiveTemperature(direction="harder_hotter", **options)(0.0, case.student, case.teacher)
    cooler = AdaptiveTemperature(direction="harder_cooler", **options)(0.0, case.student, case.teacher)
    torch.testing.assert_close(hotter, 2 + 8 * hard)
    torch.testing.assert_close(cooler, 10 - 8 * hard)


def test_a_certain_teacher_has_the_least_and_an_undecided_one_the_greatest_temperature():
    teacher = torch.tensor([[60.0, 0.0, 0.0, -math.inf], [1.0, 1.0, 1.0, -math.inf]])
    student = torch.zeros(2, 4)
    assert AdaptiveTemperature()(0.0, student, teacher).tolist() == [2.0, 10.0]
    assert AdaptiveTemperature(direction="harder_cooler")(0.0, student, teacher).tolist() == [10.0, 2.0]


def flsw(student, teacher, base, strength, power):
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    w = (1 - cosine) ** power
    return base + strength * (w.mean() - w)


def cwsm(student, teacher, base, strength):
    w = 1 / (student.softmax(-1).max(-1).values + 1e-3)
    return base + strength * (w.mean() - w)


def test_flsw_and_cwsm_are_textbrewers_within_bounds():
    case = random_case((6,), 7, 0, scale=2.0)
    wide = {"min": 1e-3, "max": 1e3}
    values = FlswTemperature(base=6.0, strength=2.0, power=2.0, **wide)(0.0, case.student, case.teacher)
    torch.testing.assert_close(values, flsw(case.student, case.teacher, 6.0, 2.0, 2.0))
    values = CwsmTemperature(base=6.0, strength=2.0, **wide)(0.0, case.student, case.teacher)
    torch.testing.assert_close(values, cwsm(case.student, case.teacher, 6.0, 2.0))
    values = CwsmTemperature(base=6.0, strength=2.0, min=5.5, max=6.5)(0.0, case.student, case.teacher)
    torch.testing.assert_close(values, cwsm(case.student, case.teacher, 6.0, 2.0).clamp(5.5, 6.5))
    assert {*values.tolist()} > {5.5, 6.5}, "both bounds are met"


@pytest.mark.parametrize("policy", [FlswTemperature(), CwsmTemperature()], ids=name_of)
def test_items_that_do_not_count_move_no_mean(policy):
    case = random_case((6,), 7, 0, scale=2.0)
    expected = policy(0.0, case.student[:4], case.teacher[:4])
    valid = torch.tensor([True] * 4 + [False] * 2)
    case.student[4] = math.nan
    values = policy(0.0, case.student, case.teacher, valid=valid)
    torch.testing.assert_close(values[:4], expected)
    assert values[4] == policy.base
    nothing = policy(0.0, case.student, case.teacher, valid=torch.zeros(6, dtype=torch.bool))
    assert nothing.isfinite().all()


@pytest.mark.parametrize("policy", [FlswTemperature(), CwsmTemperature()], ids=name_of)
def test_ranks_that_reduce_share_one_mean(policy):
    case = random_case((6,), 7, 0, scale=2.0)
    halves = [(case.student[part], case.teacher[part]) for part in (slice(0, 2), slice(2, 6))]
    seen = []
    for half in halves:
        policy(0.0, *half, reduce=lambda sums: seen.append(sums.clone()) or sums)
    total = sum(seen)
    assert total[1] == 6
    values = [policy(0.0, *half, reduce=lambda sums: total) for half in halves]
    torch.testing.assert_close(torch.cat(values), policy(0.0, case.student, case.teacher))


def test_without_strength_all_items_have_the_base():
    case = random_case((6,), 7, 0)
    for policy in (FlswTemperature(strength=0.0), CwsmTemperature(strength=0.0)):
        assert policy(0.0, case.student, case.teacher).tolist() == [8.0] * 6


def test_a_learned_temperature_is_turned_against_the_student_over_its_curriculum():
    policy = LearnedTemperature(curriculum=0.5)
    assert [policy.reversal(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, -0.5, -1, -1])
    assert (policy.lowest, policy.highest) == (1, 21)
    assert not policy.is_per_item
    assert LearnedTemperature("instance").is_per_item
    with pytest.raises(TypeError, match="TemperatureModule"):
        policy(0.0, torch.zeros(2, 3), torch.zeros(2, 3))


def test_every_policy_is_frozen_and_a_temperature_policy():
    for written in WRITTEN[1:]:
        policy = read_temperature(written)
        assert isinstance(policy, TemperaturePolicy)
        with pytest.raises(AttributeError):
            policy.min = 3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("adaptve", "^t: Unknown temperature policy 'adaptve'. Did you mean 'adaptive'"),
        ({"policy": "adaptive", "signl": "loss"}, "'signl'. Did you mean 'signal'"),
        ({"policy": "adaptive", "signal": "entropy"}, "Unknown signal of difficulty 'entropy'"),
        ({"policy": "adaptive", "direction": "hotter"}, "Unknown direction 'hotter'"),
        ({"policy": "adaptive", "min": 3, "max": 2}, "min=3 and max=2"),
        ({"policy": "adaptive", "min": 0}, "must be 0 < min <= max"),
        ({"policy": "adaptive", "min": "1e-3"}, "must be a number. YAML takes 1e-3 for text"),
        ({"policy": "adaptive", "max": True}, "max=True"),
        ({"policy": "adaptive", "sharpness": 0}, "sharpness=0"),
        ({"policy": "cwsm", "power": 2}, "Unknown key of the temperature policy 'cwsm': 'power'"),
        ({"policy": "flsw", "base": 20}, "base=20 is not between min=2.0 and max=10.0"),
        ({"policy": "flsw", "strength": -1}, "strength=-1, but flsw makes harder items cooler"),
        ({"policy": "flsw", "power": 0}, "power=0"),
        ({"policy": "learned", "scope": "item"}, "Unknown scope of a learned temperature 'item'"),
        ({"policy": "learned", "range": 0}, "needs both above 0"),
        ({"policy": "learned", "curriculum": 0}, "curriculum=0"),
        ({"policy": "learned", "learning_rate_factor": 0}, "learning_rate_factor=0"),
        ({"policy": "linear", "from": 8, "to": 0}, "goes down to 0, but it divides the logits"),
        ({"policy": "linear", "form": 8}, "'form'. Did you mean 'from'"),
        ({"policy": "linear", "kind": "cosine", "from": 1, "to": 2}, "the kind of a temperature's schedule is its"),
        ("warmup", "goes down to 0.0"),
        ({"policy": "constant"}, "needs its value"),
        ({"policy": "constant", "value": "x"}, "value='x'"),
        ({"from": 1, "to": 2}, "has no policy. Write a number"),
    ],
)
def test_nonsense_is_refused_with_the_remedy(written, message):
    with pytest.raises(ValueError, match=message):
        read_temperature(written, "t")
