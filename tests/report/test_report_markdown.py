"""The report as Markdown: what it says, and that Markdown readers see what was meant."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from hf_distill.report.markdown import headline, plot_image, results_table, to_markdown
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, UNDISTILLED, ModelResult, Quality
from tests.report.report_cases import (
    CASES,
    LANGUAGE_MODELS,
    REGRESSION,
    UNLABELLED,
    UNMEASURED,
    classifiers,
    cost,
    names,
    quality,
    report,
)

PLOTS = ("tradeoff.png", "confusion.png", "losses.png", "dynamics.png")
READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tables(markdown):
    """Every table as a list of its rows, the header first, of the text that a reader sees."""
    found, row = [], None
    for token in READER.parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append(row := [])
        elif token.type in ("tr_close", "table_close"):
            row = None
        elif token.type == "inline" and row is not None:
            row.append("".join(child.content for child in token.children if child.type in ("text", "code_inline")))
    return found


def sections(markdown):
    parts = re.split(r"^## (.*)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def images(markdown):
    inlines = [child for token in READER.parse(markdown) for child in token.children or () if child.type == "image"]
    return {image.attrs["src"]: "".join(part.content for part in image.children) for image in inlines}


@pytest.mark.parametrize("name", list(CASES))
def test_every_report_is_whole_markdown_without_a_trace_of_what_was_not_measured(name):
    text = to_markdown(CASES[name], plots=PLOTS)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|\n\n\n", text)
    assert text.startswith("# Distillation report\n")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    drawn = tables(text)
    assert drawn
    assert text.count("\n| ---") == len(drawn)
    for table in drawn:
        assert {len(row) for row in table} == {len(table[0])}
    assert images(text).keys() == {*PLOTS}


def test_the_headline_names_what_was_kept_and_what_was_gained():
    assert headline(CASES["classifiers"]) == (
        "**The student keeps 97.8 % of the teacher's accuracy (0.9000 of 0.9200), with 25.0 % of its parameters, "
        "2.0x faster at batch 1.** Trained without the teacher, the same student has accuracy 0.8100."
    )


def test_the_headline_of_a_score_that_is_better_lower_compares_instead():
    assert headline(LANGUAGE_MODELS).startswith(
        "**The student has perplexity 12.10 (the teacher 9.400; lower is better),"
    )


def test_without_labels_the_headline_tells_the_agreement():
    assert headline(UNLABELLED) == (
        "**The student chooses as the teacher does in 87.5 % of 50 items, with 50.0 % of its parameters, "
        "as fast at batch 1.**"
    )


@pytest.mark.parametrize(
    ("score", "student", "words"),
    [
        (0.95, None, "**The student reaches 105.6 % of the teacher's accuracy (0.9500 of 0.9000).**"),
        (0.9, cost(4000, 4.0), "accuracy (0.9000 of 0.9000), with as many parameters, as fast at batch 1.**"),
        (0.9, None, "**The student keeps 100.0 % of the teacher's accuracy"),
        (0.9, cost(8000, 6.0), "(0.9000 of 0.9000), with 200.0 % of its parameters, 1.5x slower at batch 1.**"),
        (0.45, None, "**The student keeps 50.0 % of the teacher's accuracy (0.4500 of 0.9000).**"),
        (-0.2, None, "**The student has accuracy -0.2000 (the teacher 0.9000).**"),
        (None, cost(1000, 1.0), "**The student: 25.0 % of the teacher's parameters, 4.0x faster at batch 1.**"),
    ],
)
def test_the_headline_fits_every_outcome(score, student, words):
    own = None if score is None else quality(score)
    case = report(
        ModelResult("teacher", TEACHER, None, quality(0.9), cost(4000, 4.0)),
        ModelResult("student", STUDENT, None, own, student),
    )
    assert words in headline(case)


@pytest.mark.parametrize(("spread", "words"), [(1.9, ", 2.0x faster"), (2.1, ", about 2.0x faster")])
def test_a_speed_up_within_the_spread_is_about_that(spread, words):
    teacher = ModelResult("teacher", TEACHER, None, quality(0.9), cost(4000, 4.0))
    student = ModelResult("student", STUDENT, None, quality(0.9), cost(1000, 2.0, spread=spread))
    assert words in headline(report(teacher, student))


def test_there_is_no_headline_where_nothing_was_measured():
    assert headline(UNMEASURED) == ""


def test_the_table_of_models_has_the_numbers_of_the_report():
    (table,) = tables(results_table(CASES["classifiers"]))
    quality_columns = ["accuracy", "retained", "agreement", "KL to teacher", "ECE"]
    assert table == [
        ["model", *quality_columns, "parameters", "weights", "latency p50 / p95", "speed-up"],
        ["teacher", "0.9200", "–", "–", "–", "–", "4.00 k", "16.0 kB", "4.00 / 5.00 ms", "–"],
        ["student", "0.9000", "97.8 %", "95.0 %", "0.0123", "0.030", "1.00 k", "4.00 kB", "2.00 / 2.50 ms", "2.0x"],
        ["student, undistilled", "0.8100", "88.0 %", "–", "–", "–", "1.00 k", "4.00 kB", "2.10 / 2.62 ms", "1.9x"],
    ]


def test_the_table_of_models_stands_alone():
    text = results_table(CASES["classifiers"])
    assert "Measured on 200 items of snips (test)." in text
    assert "Latency: batch 1, length 16, on Some CPU (1 thread)" in text
    models = [
        replace(model, quality=model.quality and replace(model.quality, labelled=20))
        for model in CASES["classifiers"].models
    ]
    text = results_table(replace(CASES["classifiers"], models=models))
    assert "Measured on 200 items of snips (test), 20 of them with a label." in text
    accelerated = replace(CASES["classifiers"], environment={"device": "Some GPU", "processor": "Some CPU"})
    assert "on Some GPU;" in results_table(accelerated)


def test_columns_that_hold_nothing_are_left_out():
    (table,) = tables(results_table(REGRESSION))
    assert table[0] == ["model", "pearson", "retained", "parameters", "weights", "latency p50 / p95", "speed-up"]
    (table,) = tables(results_table(UNMEASURED))
    assert table == [["model"], ["teacher"], ["student"]]


def test_models_that_could_not_be_measured_are_named_with_the_reason_and_have_no_rows():
    missing = ModelResult("teacher, int8", BASELINE, note="torchao is not installed")
    case = classifiers(more=(missing,))
    (table,) = tables(results_table(case))
    assert "teacher, int8" not in [row[0] for row in table]
    assert "Not measured: teacher, int8 (torchao is not installed)." in results_table(case)
    assert "- teacher, int8: torchao is not installed" in to_markdown(case)


def test_names_keep_their_signs():
    odd = "a|b *c* _d_ `e` <f> [g](h) ~~i~~ j\\|k &amp; l_m"
    teacher = ModelResult(odd, TEACHER, odd, quality(0.9, metric="x|y"), note=odd)
    case = report(teacher, REGRESSION.models[1], metric="x|y", data={"name": odd, "rows": 3})
    seen = tables(to_markdown(case))
    assert seen[0][1][0] == odd
    assert seen[0][0][1] == "x|y"
    assert ["data name", odd] in seen[-1]
    of_classes = tables(to_markdown(classifiers((odd, "plain"))))
    assert any(odd in row for table in of_classes for row in table)
    alt = images(plot_image(classifiers((odd, "plain"), wrong=2), "confusion.png"))["confusion.png"]
    assert f"{odd} as plain, 2" in alt


def test_all_metrics_are_shown_where_there_are_several():
    assert "Metrics" not in sections(to_markdown(CASES["classifiers"]))
    teacher, student = REGRESSION.models
    more = {"pearson": 0.8, "mse": 0.25}
    case = replace(REGRESSION, models=(teacher, replace(student, quality=Quality(metrics=more))))
    (table,) = tables(sections(to_markdown(case))["Metrics"])
    assert table == [["metric", "teacher", "student"], ["pearson", "0.9000", "0.8000"], ["mse", "–", "0.2500"]]


def test_classes_come_with_the_largest_drop_first_and_at_most_twenty_of_them():
    classes = names(30, 8)
    before = {name: 0.9 for name in classes}
    after = {name: 0.9 - ((7 * index) % 30) / 100 for index, name in enumerate(classes)}
    after[classes[0]] = math.nan
    case = report(
        ModelResult("teacher", TEACHER, None, Quality(f1_by_class=before)),
        ModelResult("student", STUDENT, None, Quality(f1_by_class=after)),
        ModelResult("student, undistilled", UNDISTILLED, None, Quality(f1_by_class={classes[17]: 0.5})),
    )
    section = sections(to_markdown(case))["Classes"]
    assert "The 20 of 30 classes with the largest drop" in section
    header, *rows = tables(section)[0]
    assert header == ["class", "F1 of teacher", "F1 of student", "F1 of student, undistilled", "student − teacher"]
    expected = sorted(classes[1:], key=lambda name: after[name])[:20]
    assert [row[0] for row in rows] == expected
    assert [row[4] for row in rows] == [f"−{0.9 - after[name]:.3f}" for name in expected]
    assert (rows[0][0], rows[0][3], rows[1][3]) == (classes[17], "0.500", "–")


def test_the_latency_grid_has_every_cell_with_its_spread():
    times, rates = tables(sections(to_markdown(CASES["classifiers"]))["Latency"])
    assert times[0] == ["batch", "length", "teacher", "student", "student, undistilled"]
    assert [row[:4] for row in times[1:]] == [
        ["1", "16", "4.00 / 5.00", "2.00 / 2.50"],
        ["1", "64", "4.00 / 5.00", "2.00 / 2.50"],
        ["8", "16", "32.0 / 40.0", "16.0 / 20.0"],
        ["8", "64", "32.0 / 40.0", "16.0 / 20.0"],
    ]
    assert {row[2] for row in rates[1:]} == {"250"}
    assert tables(sections(to_markdown(REGRESSION))["Latency"])[0][0] == ["batch", "teacher", "student"]


def test_calibration_and_costs_are_there_in_full():
    parts = sections(to_markdown(CASES["classifiers"]))
    assert ["student", "0.030", "0.040"] in tables(parts["Calibration"])[0]
    assert tables(parts["Size and work"])[0][1] == ["teacher", "4,000", "16.0 kB", "8.00 k"]
    assert "Calibration" not in sections(to_markdown(REGRESSION))


def test_the_environment_is_listed():
    (table,) = tables(sections(to_markdown(CASES["classifiers"]))["How this was measured"])
    assert ["processor", "Some CPU"] in table
    assert ["versions torch", "2.13.0"] in table
    assert ["data rows", "200"] in table
    assert ["teacher", "org/big"] in table


def test_plots_stand_in_their_sections_with_a_text_that_tells_what_they_show():
    parts = sections(to_markdown(CASES["classifiers"], plots=[f"/some/folder/{name}" for name in PLOTS]))
    assert images(parts["Classes"]).keys() == {"confusion.png"}
    assert images(parts["Training"]).keys() == {"losses.png", "dynamics.png"}
    assert "no as yes, 1" in images(parts["Classes"])["confusion.png"]
    assert "loss_task from 2.00 to 0.000671" in images(parts["Training"])["losses.png"]
    assert "temperature goes from 8.00 to 2.00" in images(parts["Training"])["dynamics.png"]
    alt = images(plot_image(CASES["classifiers"], "distillation/my plots/tradeoff.png"))
    assert "student: 0.9000 at 4.00 kB, 2.00 / 2.50 ms" in alt["distillation/my%20plots/tradeoff.png"]


def test_to_write_a_report_loads_neither_torch_nor_matplotlib():
    code = "import sys, hf_distill.report.markdown, hf_distill.report.plots; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "matplotlib", "numpy"} & {*loaded}
