"""Rows without a label teach nothing about labels, all they can about the teacher, and cost no exactness."""

import pytest

from tests import tiny
from tests.invariants.steps import LABELS, assert_same_steps, distil, relative_difference, without_labels

# In batches of two rows the first has no label and the second two; the third has one, in its second row.
LABELLED = (2, 3, 5)
LANGUAGE_ROWS = ("masked", "causal", "translation", "features")
LANGUAGE_MODELS = [name for name, (_, kind) in tiny.ZOO.items() if kind in LANGUAGE_ROWS]
OTHER_HEADS = [name for name in tiny.ZOO if name not in LANGUAGE_MODELS]


def partly_labelled(rows):
    return [row if i in LABELLED else without_labels(row) for i, row in enumerate(rows)]


def as_python_values(rows):
    """The rows with plain numbers and lists as labels, and with each way to say that there is none."""
    plain = []
    for i, row in enumerate(rows):
        inputs = {name: value for name, value in row.items() if name not in LABELS}
        labels = {name: row[name].tolist() for name in LABELS if name in row}
        if i not in LABELLED:
            labels = {} if i % 4 == 1 else dict.fromkeys(labels)
        plain.append(inputs | labels)
    return plain


@pytest.mark.parametrize("name", tiny.ZOO)
def test_a_micro_batch_without_any_label_takes_its_share_of_the_step(name, output_dir):
    rows = partly_labelled(tiny.rows(tiny.ZOO[name][1]))
    whole = distil(tiny.pair(name), rows, output_dir)
    assert whole.logs[0]["labelled_fraction"] == len(LABELLED) / len(rows)
    for batch, accumulation in ((2, 4), (3, 3)):
        run = distil(tiny.pair(name), rows, output_dir, batch, accumulation)
        assert run.logs[0]["labelled_fraction"] == whole.logs[0]["labelled_fraction"]
        assert_same_steps(run, whole)


@pytest.mark.parametrize("name", tiny.ZOO)
def test_the_task_loss_is_that_of_the_labelled_rows_alone(name, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    alone = distil(tiny.pair(name), [rows[i] for i in LABELLED], output_dir, kd_weight=0.0)
    assert_same_steps(distil(tiny.pair(name), partly_labelled(rows), output_dir, kd_weight=0.0), alone)


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_the_teacher_teaches_on_every_row(name, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    full = distil(tiny.pair(name), rows, output_dir, task_weight=0.0)
    assert_same_steps(distil(tiny.pair(name), partly_labelled(rows), output_dir, task_weight=0.0), full)
    bare = [{key: value for key, value in row.items() if key not in LABELS} for row in rows]
    assert_same_steps(distil(tiny.pair(name), bare, output_dir, task_weight=0.0), full)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_learns_from_the_teacher_at_its_targets_alone(name, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    alone = distil(tiny.pair(name), [rows[i] for i in LABELLED], output_dir)
    assert_same_steps(distil(tiny.pair(name), partly_labelled(rows), output_dir), alone)


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_label_of_none_is_no_label(name, output_dir):
    rows = tiny.rows(tiny.ZOO[name][1])
    masked = distil(tiny.pair(name), partly_labelled(rows), output_dir)
    for batch, accumulation in ((8, 1), (2, 4)):
        assert_same_steps(distil(tiny.pair(name), as_python_values(rows), output_dir, batch, accumulation), masked)


def test_a_window_without_any_label_learns_from_the_teacher(output_dir):
    rows = tiny.rows("sequence")
    bare = [without_labels(row) for row in rows]
    taught = distil(tiny.pair("bert"), rows, output_dir, task_weight=0.0)
    run = distil(tiny.pair("bert"), bare, output_dir, 2, 4, task_weight=1.0)
    assert run.logs[0]["loss_task"] == 0.0
    assert relative_difference(run.gradients[0], taught.gradients[0]) <= 1e-5
