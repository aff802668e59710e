import itertools
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill.schedules import SCHEDULES, Schedule

SMOOTH = ("linear", "cosine", "exponential", "warmup")
NUMBERS = st.floats(1e-3, 1e3, allow_subnormal=False)
PROGRESS = st.floats(0, 1)


@st.composite
def windows(draw):
    start = draw(st.floats(0, 0.9))
    return start, draw(st.floats(min(start + 1e-3, 1.0), 1.0))


@st.composite
def smooth_schedules(draw):
    start, end = draw(windows())
    return Schedule(draw(st.sampled_from(SMOOTH)), draw(NUMBERS), draw(NUMBERS), start, end)


@st.composite
def point_schedules(draw):
    moments = sorted(draw(st.sets(st.integers(0, 1000), min_size=1, max_size=6)))
    points = tuple((moment / 1000, draw(NUMBERS)) for moment in moments)
    return Schedule(draw(st.sampled_from(("step", "piecewise"))), points=points)


schedules = st.one_of(smooth_schedules(), point_schedules(), NUMBERS.map(lambda value: Schedule("constant", value)))


@given(schedules, st.floats(-1, 2))
def test_a_schedule_stays_within_its_bounds(schedule, progress):
    assert schedule.lowest <= schedule.at(progress) <= schedule.highest


@given(smooth_schedules(), PROGRESS, PROGRESS)
def test_what_goes_from_one_value_to_another_never_turns_back(schedule, first, second):
    first, second = sorted((first, second))
    rise = schedule.at(second) - schedule.at(first)
    room = 1e-12 * schedule.highest  # rounding
    assert rise >= -room if schedule.final >= schedule.initial else rise <= room


@given(smooth_schedules() | point_schedules().filter(lambda schedule: schedule.kind == "piecewise"), PROGRESS)
def test_all_but_steps_have_no_cliffs(schedule, progress):
    knots = [point[0] for point in schedule.points] or [schedule.start, schedule.end]
    narrowest = min((b - a for a, b in itertools.pairwise(knots)), default=1.0)
    ratio = schedule.highest / schedule.lowest
    # Half a cosine wave is pi / 2 times as steep as a line at its steepest, a constant ratio log(ratio) times.
    steepest = max(2.0, math.log(ratio)) * schedule.highest / narrowest
    assert abs(schedule.at(progress + 1e-6) - schedule.at(progress)) <= 1e-6 * steepest * (1 + 1e-3) + 1e-9


@given(schedules)
def test_it_begins_and_ends_with_exactly_what_was_written(schedule):
    assert schedule.at(0.0) == schedule.initial or schedule.start == 0
    assert (schedule.at(schedule.start), schedule.at(schedule.end)) == (schedule.initial, schedule.final)
    assert schedule.at(-0.5) == schedule.initial
    assert schedule.at(1.5) == schedule.final


@given(schedules)
@settings(max_examples=50)
def test_what_is_written_is_read_as_the_same_schedule_even_through_yaml(schedule):
    assert Schedule.of(yaml.safe_load(yaml.safe_dump(schedule.to_plain()))) == schedule
    assert hash(Schedule.of(schedule.to_plain())) == hash(schedule)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"kind": "constant", "value": 3}, [3, 3, 3, 3, 3]),
        ({"kind": "linear", "from": 8, "to": 2}, [8, 6.5, 5, 3.5, 2]),
        ({"kind": "linear", "from": 8, "to": 2, "start": 0.25, "end": 0.75}, [8, 8, 5, 2, 2]),
        ({"kind": "cosine", "from": 1, "to": 0}, [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]),
        ({"kind": "exponential", "from": 16, "to": 1}, [16, 8, 4, 2, 1]),
        ("warmup", [0, 1, 1, 1, 1]),
        ({"kind": "warmup", "end": 0.5}, [0, 0.5, 1, 1, 1]),
        ({"kind": "step", "points": [[0, 8], [0.5, 4], [1, 2]]}, [8, 8, 4, 4, 2]),
        ({"kind": "piecewise", "points": [[0, 8], [0.5, 4], [1, 2]]}, [8, 6, 4, 3, 2]),
        ({"kind": "piecewise", "points": [[0.5, 4]]}, [4, 4, 4, 4, 4]),
    ],
)
def test_each_kind_at_the_quarters_of_the_training(written, expected):
    assert [Schedule.of(written).at(quarter / 4) for quarter in range(5)] == pytest.approx(expected, abs=1e-12)


def test_every_registered_kind_is_among_the_tests():
    assert {*SMOOTH, "step", "piecewise", "constant"} == {*SCHEDULES}


def test_a_warmup_is_within_the_first_tenth_unless_told_otherwise():
    assert Schedule("warmup") == Schedule("warmup", 0.0, 1.0, 0.0, 0.1)
    assert Schedule("warmup").at(0.05) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("schedule", "plain"),
    [
        (Schedule("constant", 4), 4),
        (Schedule("warmup"), "warmup"),
        (Schedule("warmup", end=0.2), {"kind": "warmup", "end": 0.2}),
        (Schedule("linear", 8, 2), {"kind": "linear", "from": 8, "to": 2}),
        (Schedule("cosine", 0, 1, start=0.5), {"kind": "cosine", "from": 0, "to": 1, "start": 0.5}),
        (Schedule("step", points=((0, 1), (0.5, 2))), {"kind": "step", "points": [[0, 1], [0.5, 2]]}),
    ],
)
def test_the_plain_form_is_the_shortest(schedule, plain):
    assert schedule.to_plain() == plain


def test_only_one_number_throughout_is_constant():
    assert Schedule.of(3).is_constant
    assert Schedule.of({"kind": "piecewise", "points": [[0, 3], [1, 3]]}).is_constant
    assert not Schedule("linear", 3, 4).is_constant
    assert not Schedule.of({"kind": "step", "points": [[0, 3], [0.5, 4], [1, 3]]}).is_constant


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("linear", r"^w: A linear schedule needs from and to\. Write \{kind: linear, from: 1, to: 0\.1\}"),
        ({"kind": "cosine", "from": 1}, "A cosine schedule needs to"),
        ("warmpu", "Unknown kind of schedule 'warmpu'. Did you mean 'warmup'"),
        ({"kind": "linear", "form": 8, "to": 2}, "'form'. Did you mean 'from'"),
        ({"kind": "linear", "from": 8, "to": "1e-3"}, "to='1e-3' of a linear schedule must be a finite number. YAML"),
        ({"kind": "linear", "from": True, "to": 2}, "from=True"),
        ({"kind": "linear", "from": math.inf, "to": 2}, "from=inf"),
        ({"kind": "linear", "value": 8}, "value: a constant has a `value`"),
        ({"kind": "constant", "from": 8}, "from: a constant has a `value`"),
        ({"kind": "constant", "value": 8, "to": 2}, "to=2 of a constant schedule, which takes it from its value"),
        ({"kind": "constant"}, "A constant schedule needs its value"),
        ({"kind": "linear", "from": 8, "to": 2, "start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"kind": "linear", "from": 8, "to": 2, "end": 1.5}, "0 <= start < end <= 1"),
        ({"kind": "exponential", "from": 8, "to": 0}, "no constant ratio"),
        ({"kind": "linear", "from": 8, "to": 2, "points": [[0, 1]]}, "which has none. Use piecewise"),
        ({"kind": "step"}, "must be pairs of progress and value"),
        ({"kind": "step", "points": [[0, 1], [0, 2]]}, "rising progress"),
        ({"kind": "step", "points": [[0, 1], [1.5, 2]]}, "rising progress"),
        ({"kind": "step", "points": [[0, 1, 2]]}, "rising progress"),
        ({"kind": "step", "points": [[0, 1]], "to": 3}, "to=3 of a step schedule, which takes it from its points"),
        ({"kind": ["linear"]}, "is no schedule"),
        ({"from": 1, "to": 0}, "is no schedule"),
        (None, "None is no schedule. Write a number"),
        (True, "True is no schedule"),
        (math.nan, "nan is no schedule"),
    ],
)
def test_nonsense_is_refused_with_the_remedy(written, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of(written, "w")
