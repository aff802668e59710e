"""How numbers are written, and what is derived from a report."""

import math
from dataclasses import replace

import pytest

from hf_distill.report.derived import most_confused, speed_up, term_losses, typical_cell
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, ModelResult
from hf_distill.report.wording import byte_size, byte_unit, change, count, number, percent, shortened, table, times
from tests.report.report_cases import UNMEASURED, classifiers, cost, report


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.98714, "0.9871"),
        (0.99999, "1.000"),
        (12.345678, "12.35"),
        (9999.6, "10,000"),
        (1234567.0, "1,234,567"),
        (0.0, "0.000"),
        (-0.25, "-0.2500"),
        (0.00012345, "0.0001234"),
        (0.000012345, "1.234e-05"),
        (1.5e-9, "1.500e-09"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (None, "–"),
    ],
)
def test_numbers_have_their_significant_digits(value, written):
    assert number(value) == written


@pytest.mark.parametrize(
    ("write", "value", "written"),
    [
        (percent, 0.98714, "98.7 %"),
        (percent, 1.0, "100.0 %"),
        (percent, 0.001234, "0.12 %"),
        (percent, 0.0, "0.0 %"),
        (percent, math.nan, "–"),
        (count, 999, "999"),
        (count, 999.6, "1.00 k"),
        (count, 4_385_920, "4.39 M"),
        (count, 109_482_240, "109 M"),
        (count, 2.5e12, "2.50 T"),
        (count, None, "–"),
        (byte_size, 0, "0 B"),
        (byte_size, 17_559_240, "17.6 MB"),
        (byte_size, 999_499, "999 kB"),
        (byte_size, 999_500, "1.00 MB"),
        (times, 2.14, "2.1x"),
        (times, 0.456, "0.46x"),
        (times, 123.4, "123x"),
        (change, -0.0034, "−0.003"),
        (change, 0.0125, "+0.013"),
        (change, -0.0001, "0.000"),
        (change, math.nan, "–"),
    ],
)
def test_quantities_are_written_with_their_unit(write, value, written):
    assert write(value) == written


@pytest.mark.parametrize("value", [1, 999, 1000, 999_499, 999_500, 5_000_000_000])
def test_the_unit_of_an_axis_is_that_of_the_number(value):
    unit, scale = byte_unit(value)
    assert byte_size(value).split() == [number(value / scale, 3) if scale > 1 else str(value), unit]


def test_long_names_lose_their_middle():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"
    assert shortened("two\nlines", 10) == "two lines"


def test_a_table_keeps_its_first_column_whatever_it_holds():
    assert table(["a", "b", "c"], [["–", "–", "1"], ["", "", "2"]]).splitlines() == [
        "| a | c |",
        "| --- | ---: |",
        "| – | 1 |",
        "|  | 2 |",
    ]


@pytest.mark.parametrize(
    ("teacher", "student", "cell"),
    [
        (((1, 8), (1, 32), (4, 8)), ((1, 8), (1, 32), (4, 8)), (1, 8)),
        (((1, 8), (1, 16), (1, 32)), ((1, 8), (1, 16), (1, 32)), (1, 16)),
        (((2, 8), (1, 512)), ((2, 8),), (2, 8)),
        (((1, None), (8, None)), ((8, None), (1, None)), (1, None)),
        (((1, 8),), ((1, 16),), (1, 16)),
        ((), ((1, 16),), (1, 16)),
        ((), (), None),
    ],
)
def test_the_cell_for_the_grid_is_of_the_smallest_batch_and_the_middle_length_that_models_share(
    teacher, student, cell
):
    case = report(
        ModelResult("teacher", TEACHER, cost=cost(grid=teacher)),
        ModelResult("student", STUDENT, cost=cost(grid=student)),
    )
    assert typical_cell(case) == cell


def test_a_speed_up_is_of_the_medians_and_unknown_where_one_is_missing():
    slow = ModelResult("slow", BASELINE, cost=cost(ms=16.0))
    case = classifiers(more=(slow,))
    assert speed_up(case, slow, (1, 16)) == 0.25
    assert speed_up(case, slow, (1, 999)) is None
    assert speed_up(case, slow, None) is None
    assert speed_up(replace(case, models=(slow,)), slow, (1, 16)) is None
    assert typical_cell(UNMEASURED) is None


def test_the_most_confused_pairs_are_those_of_most_items_then_of_the_largest_share():
    pairs = most_confused([[5, 3, 0], [3, 0, 1], [0, 0, 9]], "abc", 2)
    assert [(pair.teacher, pair.student, pair.items, pair.share) for pair in pairs] == [
        ("b", "a", 3, 0.75),
        ("a", "b", 3, 0.375),
    ]


def test_numbers_that_were_not_finite_are_known_as_such_however_json_holds_them():
    history = [{"step": step, "loss_kd": value} for step, value in enumerate((1.0, math.inf, math.nan, None, "nan"))]
    (series,) = term_losses(classifiers(log_history=history))
    assert series.steps == (0, 1, 2, 3, 4)
    assert series.finite == (1.0,)


def test_task_and_kd_come_first_among_the_terms():
    entry = {"step": 1, "loss_hidden": 1.0, "loss_kd": 1.0, "loss": 1.0, "loss_attention": 1.0, "loss_task": 1.0}
    found = [series.name for series in term_losses(classifiers(log_history=[entry]))]
    assert found == ["loss_task", "loss_kd", "loss_hidden", "loss_attention"]
