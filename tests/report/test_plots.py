"""What the plots of a report show, and that it can be read."""

import sys
from itertools import combinations

import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from hf_distill.report import curves, figures
from hf_distill.report.drawing import COLORS, WIDTH, drawn
from hf_distill.report.plots import write_plots
from hf_distill.report.results import BASELINE, STUDENT, TEACHER, ModelResult
from tests.report.report_cases import (
    CASES,
    EVALUATED_LOG,
    LANGUAGE_MODELS,
    LONG_LOG,
    REGRESSION,
    baselines,
    classifiers,
    cost,
    log,
    names,
    quality,
    report,
)

DRAWINGS = {
    "tradeoff": figures.tradeoff,
    "confusion": figures.confusion,
    "losses": curves.losses,
    "dynamics": curves.dynamics,
}
DRAWN = {
    "classifiers": ["tradeoff", "confusion", "losses", "dynamics"],
    "one class more than fits": ["tradeoff", "confusion", "losses"],
    "fifteen classes": ["tradeoff", "confusion"],
    "77 classes": ["tradeoff", "confusion"],
    "500 classes": ["tradeoff", "confusion"],
    "many models": ["tradeoff", "confusion"],
    "language models": ["tradeoff", "losses"],
    "regression": ["tradeoff"],
    "unlabelled": ["tradeoff"],
    "unmeasured": [],
    "long names": ["tradeoff"],
}
SMALLEST = 6.4  # points: 9 pixels where the plot is 600 wide


@pytest.fixture(autouse=True)
def style():
    """Ticks are found anew whenever they are asked for, by the sizes that are set then."""
    with drawn():
        yield


def draw(name, case):
    figure = DRAWINGS[name](case)
    if figure is not None:
        figure.draw_without_rendering()
    return figure


def texts(figure):
    """Those that are drawn; ticks beyond the ends of an axis are not."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
            hidden = not axes.axison
            unseen |= {id(label) for place, label in ticks if hidden or not low <= place <= high}
            unseen |= {id(text) for text in axis.findobj(Text)} if hidden else set()
            unseen |= {id(label) for label in axis.get_minorticklabels()}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in unseen
    ]


@pytest.mark.parametrize("name", ["classifiers", "language models", "unmeasured"])
def test_what_there_is_data_for_is_written_and_nothing_else(name, tmp_path):
    paths = write_plots(CASES[name], tmp_path / "plots")
    assert [path.stem for path in paths] == DRAWN[name]
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())


@pytest.mark.parametrize(
    ("name", "plot"), [(name, plot) for name in CASES for plot in DRAWINGS if plot not in DRAWN[name]]
)
def test_a_plot_without_data_is_not_drawn(name, plot):
    assert draw(plot, CASES[name]) is None


@pytest.mark.parametrize(("name", "plot"), [(name, plot) for name, plots in DRAWN.items() for plot in plots])
def test_no_text_covers_another_or_leaves_the_plot_or_is_too_small(name, plot):
    figure = draw(plot, CASES[name])
    found = texts(figure)
    boxes = {text: text.get_window_extent() for text in found}
    assert min(text.get_fontsize() for text in found) >= SMALLEST
    outside = [
        text.get_text()
        for text, box in boxes.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]
    assert outside == []
    level = [text for text in found if text.get_rotation() in (0, 90)]
    # A box has a margin around its letters, of about a pixel at 600 pixels.
    pairs = [(a.get_text(), b.get_text()) for a, b in combinations(level, 2) if boxes[a].padded(-2).overlaps(boxes[b])]
    assert pairs == []


def test_files_are_made_for_600_pixels_and_tell_neither_date_nor_program(tmp_path):
    for path in write_plots(CASES["classifiers"], tmp_path):
        with Image.open(path) as image:
            assert image.size[0] == 1200
            assert set(image.info) == {"dpi"}


def test_the_users_settings_neither_change_nor_matter(tmp_path):
    plain = [path.read_bytes() for path in write_plots(REGRESSION, tmp_path)]
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        before = dict(mpl.rcParams)
        changed = [path.read_bytes() for path in write_plots(REGRESSION, tmp_path)]
        assert dict(mpl.rcParams) == before
    assert changed == plain


def test_pyplot_is_left_alone():
    modules = [figures, curves, sys.modules["hf_distill.report.drawing"]]
    assert not any("pyplot" in str(value) for module in modules for value in vars(module).values())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in ("drawing", "figures", "curves"):
        monkeypatch.delitem(sys.modules, f"hf_distill.report.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "hf-distill\[report\]"'):
        write_plots(REGRESSION, tmp_path)


def test_models_stand_at_their_score_over_their_size_and_their_median_time():
    size, latency = draw("tradeoff", CASES["classifiers"]).axes
    scores = [0.92, 0.9, 0.81]
    assert points(size) == [(16.0, 0.92), (4.0, 0.9), (4.0, 0.81)]  # kilobytes
    assert points(latency) == [(4.0, 0.92), (2.0, 0.9), (2.1, 0.81)]
    ends = [bar.get_segments()[0][:, 0].tolist() for bar in latency.collections]
    assert ends == [pytest.approx([ms, 1.25 * ms]) for ms in (4.0, 2.0, 2.1)]
    assert "(kB)" in size.get_xlabel()
    assert "batch 1, length 16" in latency.get_title(loc="left")
    for axes in (size, latency):
        (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert {*line.get_ydata()} == {scores[0]}
        assert [text.get_text() for text in axes.texts] == ["teacher", "student", "student, undistilled"]


def points(axes):
    return [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_linestyle() == "None" and len(line.get_xdata()) == 1 and line.get_label()[0] != "_"
    ]


def test_names_that_have_no_room_beside_their_points_go_to_a_legend():
    figure = draw("tradeoff", classifiers(more=baselines(8)))
    assert all(not axes.texts for axes in figure.axes)
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [model.name for model in CASES["many models"].models]


def test_every_model_has_a_marker_of_its_own_and_the_palette_is_okabe_and_itos():
    figure = draw("tradeoff", classifiers(more=baselines(8)))
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "None" and line.get_label()[0] != "_"]
    markers = [line.get_marker() for line in lines]
    assert len(markers) == len({*markers}) == 11
    assert {to_hex(line.get_color()) for line in lines} <= {*COLORS}


def test_scores_that_are_better_lower_say_so_and_wide_ones_get_a_logarithmic_axis():
    for axes in draw("tradeoff", LANGUAGE_MODELS).axes:
        assert axes.get_ylabel() == "perplexity (lower is better)"
        assert axes.get_yscale() == "log"
        assert axes.get_xscale() == "linear"


def test_models_without_a_finite_score_or_without_a_cost_are_left_out():
    teacher, student = REGRESSION.models
    lost = ModelResult("lost", BASELINE, None, quality(float("nan"), metric="pearson"), cost())
    free = ModelResult("free", BASELINE, None, quality(0.5, metric="pearson"))
    figure = draw("tradeoff", report(teacher, student, lost, free, metric="pearson"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["teacher", "student"]
    assert draw("tradeoff", report(teacher, free, metric="pearson")) is None


def test_every_cell_of_the_confusion_holds_its_number_and_empty_ones_none():
    classes = ("no", "perhaps", "yes")
    (axes,) = draw("confusion", classifiers(classes, wrong=3)).axes
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {
        *((place, place, "20") for place in range(3)),
        *(((place + 1) % 3, place, "3") for place in range(3)),
    }
    assert tuple(label.get_text() for label in axes.get_yticklabels()) == classes
    assert "87.0 % of 69" in axes.get_figure().get_suptitle()


def test_beyond_fifteen_classes_the_worst_pairs_are_named_most_items_first():
    confusion = [[20 if row == column else 0 for column in range(20)] for row in range(20)]
    confusion[3][7], confusion[9][1], confusion[2][4] = 2, 11, 5
    own = quality(0.9, classes=names(20, 8), wrong=0)
    own = type(own)(**{**vars(own), "confusion_with_teacher": confusion})
    case = report(ModelResult("teacher", TEACHER), ModelResult("student", STUDENT, None, own))
    shades, axes = draw("confusion", case).axes
    assert (shades.images[0].get_array() ** 2).sum(axis=1).tolist() == pytest.approx([1.0] * 20)  # of shares of a row
    called = names(20, 8)
    written = [text.get_text().strip() for text in axes.texts]
    pairs = [(9, 1, 11), (2, 4, 5), (3, 7, 2)]
    assert written == [
        text for row, column, items in pairs for text in (f"{called[row]} → {called[column]}", str(items))
    ]
    assert [bar.get_width() for bar in axes.patches] == [11, 5, 2]


def test_each_term_has_a_panel_with_its_values_and_the_evaluations_beside():
    task, kd = draw("losses", classifiers(log_history=EVALUATED_LOG)).axes
    assert [axes.get_title(loc="left") for axes in (task, kd)] == ["loss_task", "loss_kd"]
    assert task.lines[0].get_ydata().tolist() == [2, 1.75, 1.5, 1.25, 1]
    assert task.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50]
    assert [list(line) for line in task.lines[1].get_data()] == [[50], [1.1]]
    assert list(kd.lines[1].get_ydata()) == [0.1]
    assert {line.get_linestyle() for line in task.lines} == {"-", "--"}


def test_evaluations_of_a_changing_temperature_say_which_they_have():
    changing = [*EVALUATED_LOG, {"step": 1, "temperature": 4.0}, {"step": 2, "temperature": 1.0}]
    found = [axes.lines[1].get_label() for axes in draw("losses", classifiers(log_history=changing)).axes]
    assert found == ["evaluation", "evaluation, last temperature"]


def test_losses_over_decades_have_a_logarithmic_axis_and_others_a_linear_one():
    axes = draw("losses", CASES["classifiers"]).axes
    assert [panel.get_yscale() for panel in axes] == ["log", "linear", "log"]
    below = log(9, loss_kd=lambda progress: 100 * progress - 0.1)
    assert draw("losses", classifiers(log_history=below)).axes[0].get_yscale() == "linear"


def test_steps_whose_loss_was_not_finite_are_marked():
    axes = draw("losses", CASES["classifiers"]).axes[1]
    (marks,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(marks.get_xdata()) == [entry["step"] for entry in LONG_LOG if entry["loss_kd"] != entry["loss_kd"]]
    mean = axes.lines[1].get_ydata()
    assert 2 <= min(mean[mean == mean]) <= max(mean[mean == mean]) <= 3  # as those that were finite
    nothing = draw("losses", classifiers(log_history=log(3, loss_kd=lambda progress: float("nan")))).axes[0]
    assert list(nothing.lines[-1].get_xdata()) == [10, 20, 30]
    assert list(nothing.get_yticks()) == []


def test_a_noisy_log_is_drawn_pale_under_its_moving_mean():
    noisy = log(600, loss_kd=lambda progress: 5 + (-1) ** round(599 * progress))
    raw, mean = draw("losses", classifiers(log_history=noisy)).axes[0].lines
    assert raw.get_alpha() < 1
    assert {*raw.get_ydata()} == {4, 6}
    assert max(abs(mean.get_ydata()[30:-30] - 5)) < 0.1


def test_a_training_without_terms_shows_its_whole_loss_and_one_without_a_log_nothing():
    (axes,) = draw("losses", classifiers(log_history=log(4))).axes
    assert axes.get_title(loc="left") == "loss"
    for history in ([], None, [{"train_runtime": 3.0, "step": 4}]):
        assert draw("losses", classifiers(log_history=history)) is None
        assert draw("dynamics", classifiers(log_history=history)) is None


def test_more_terms_than_panels_are_counted():
    many = log(3, **{f"loss_{index}": lambda progress: 1 - progress for index in range(20)})
    figure = draw("losses", classifiers(log_history=many))
    assert len(figure.axes) == 12
    assert "(12 of 20)" in figure.get_suptitle()


def test_what_changed_is_drawn_and_what_did_not_is_not():
    lost = log(9, temperature=lambda p: float("nan"), temperature_min=lambda p: float("nan"))
    assert draw("dynamics", classifiers(log_history=lost)) is None
    still = {
        "temperature": lambda progress: 2.0,
        "weight_task": lambda progress: 0.5,
        "item_weight": lambda progress: 0.0,
    }
    assert draw("dynamics", classifiers(log_history=log(9, **still))) is None
    moving = log(9, **{**still, "weight_kd": lambda progress: 1 - progress})
    (axes,) = draw("dynamics", classifiers(log_history=moving)).axes
    assert [line.get_label() for line in axes.lines] == ["task", "kd"]
    assert list(axes.lines[1].get_ydata()) == [1 - index / 8 for index in range(9)]


def test_temperatures_have_a_band_where_items_differ():
    spread = {"temperature": lambda p: 2.0, "temperature_min": lambda p: 1.0, "temperature_max": lambda p: 3.0}
    (axes,) = draw("dynamics", classifiers(log_history=log(9, **spread))).axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 3.0)
    linear = {name: lambda p: 8 - 6 * p for name in spread}
    assert not draw("dynamics", classifiers(log_history=log(9, **linear))).axes[0].collections


def test_weights_of_groups_differ_in_colour_and_in_dashes_and_only_those_that_change_most_are_drawn():
    weights = {f"group_weight_g{index}": lambda p, index=index: 1 + index * p for index in range(9)}
    (axes,) = draw("dynamics", classifiers(log_history=log(40, **weights))).axes
    assert [line.get_label() for line in axes.lines] == [f"g{index}" for index in (8, 7, 6, 5, 4, 3, 2)]
    assert "7 of 9" in axes.get_title(loc="left")
    assert len({line.get_color() for line in axes.lines}) == len({str(line._dash_pattern) for line in axes.lines}) == 7


def test_names_are_no_formulas():
    figure = draw("confusion", classifiers(("$a_1$", "$^{$")))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$a_1$", "$^{$"]
    assert figure.get_figwidth() == WIDTH
