"""One step is one step, however its rows are cut into micro-batches and padded."""

import pytest
import torch

from tests import tiny
from tests.invariants.steps import assert_same_steps, distil, longer, train_plainly, with_dropout
from tests.training import batch_of

SPLITS = [(1, 8), (3, 3)]
# Images have one size. In question answering every position is a class of the head's own loss, padding included, so
# that loss depends on the padding by definition, in Transformers as here; its KD term has a test of its own below.
WITHOUT_PADDING = ("vit", "bert-spans")


def kind_of(name):
    return tiny.ZOO[name][1]


@pytest.mark.parametrize("name", tiny.ZOO)
def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(name, output_dir):
    rows = tiny.rows(kind_of(name))
    whole = distil(tiny.pair(name), rows, output_dir)
    for batch, accumulation in SPLITS:
        assert_same_steps(distil(tiny.pair(name), rows, output_dir, batch, accumulation), whole)


@pytest.mark.parametrize("name", [name for name in tiny.ZOO if name not in WITHOUT_PADDING])
def test_more_padding_takes_the_same_step(name, output_dir):
    rows = tiny.rows(kind_of(name))
    padded = longer(rows, kind_of(name))
    assert_same_steps(distil(tiny.pair(name), padded, output_dir, 4, 2), distil(tiny.pair(name), rows, output_dir))


def test_more_padding_changes_nothing_in_the_kd_term_of_spans(output_dir):
    rows = tiny.rows("spans")
    padded = longer(rows, "spans")
    steps = [distil(tiny.pair("bert-spans"), some, output_dir, task_weight=0.0) for some in (rows, padded)]
    assert_same_steps(*steps)


def test_rows_padded_apart_take_the_step_of_rows_padded_together(output_dir):
    rows = tiny.rows("causal")
    mixed = [*rows[:4], *longer(rows[4:], "causal", extra=20)]
    whole = distil(tiny.pair("llama"), longer(rows, "causal"), output_dir)
    assert_same_steps(distil(tiny.pair("llama"), mixed, output_dir, 4, 2), whole)


@pytest.mark.parametrize("name", tiny.ZOO)
def test_an_incomplete_last_window_is_a_mean_over_its_own_rows(name, output_dir):
    rows = tiny.rows(kind_of(name), count=11)
    whole = distil(tiny.pair(name), rows, output_dir)
    accumulated = distil(tiny.pair(name), rows, output_dir, 2, 4)
    assert len(whole.gradients) == 2  # of 8 rows, then of the 3 left
    assert_same_steps(accumulated, whole)
    for log in whole.logs:
        assert log["loss"] == pytest.approx(0.5 * log["loss_task"] + 0.5 * log["loss_kd"], rel=1e-6)


def test_terms_logged_every_other_step_are_means_over_two_steps(output_dir):
    rows = tiny.rows("causal", count=16)
    each = distil(tiny.pair("llama"), rows, output_dir, 2, 2).logs
    every_other = distil(tiny.pair("llama"), rows, output_dir, 2, 2, logging_steps=2).logs
    assert (len(each), len(every_other)) == (4, 2)
    for log, pair in zip(every_other, (each[:2], each[2:]), strict=True):
        for term in ("loss", "loss_task", "loss_kd"):
            assert log[term] == pytest.approx((pair[0][term] + pair[1][term]) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["bert", "bert-tokens", "bert-choices", "bert-masked", "llama", "gpt2", "t5", "whisper"]
)
def test_label_smoothing_takes_the_same_step(name, output_dir):
    rows = tiny.rows(kind_of(name))
    whole = distil(tiny.pair(name), rows, output_dir, label_smoothing_factor=0.2)
    for batch, accumulation in SPLITS:
        run = distil(tiny.pair(name), rows, output_dir, batch, accumulation, label_smoothing_factor=0.2)
        assert_same_steps(run, whole)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert-spans", "spans"), ("bert", "multi_label"), ("bert-regression", "number"), ("wav2vec2-ctc", "speech")],
)
def test_label_smoothing_without_one_class_per_item_is_refused(name, kind, output_dir):
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        distil(tiny.pair(name), tiny.rows(kind), output_dir, label_smoothing_factor=0.2)


@pytest.mark.parametrize("kd_loss", ["forward_kl", "logit_mse"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_every_loss_takes_the_same_step(kd_loss, temperature, output_dir):
    rows, settings = tiny.rows("causal"), {"kd_loss": kd_loss, "temperature": temperature, "task_weight": 0.0}
    whole = distil(tiny.pair("llama"), rows, output_dir, **settings)
    assert_same_steps(distil(tiny.pair("llama"), rows, output_dir, 3, 3, **settings), whole)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_teacher_with_dropout_teaches_without_it(name, output_dir):
    rows = tiny.rows(kind_of(name))
    student, teacher = tiny.pair(name)
    run = distil((student, with_dropout(teacher).train()), rows, output_dir)
    assert_same_steps(run, distil(tiny.pair(name), rows, output_dir))


def mixtrals():
    torch.manual_seed(1)
    teacher = tiny.mixtral(hidden=48, layers=3)
    torch.manual_seed(0)
    return tiny.mixtral(), teacher


def test_the_load_balancing_loss_of_a_mixture_counts_once(output_dir):
    """It is no mean over items, so micro-batches change it a little; `Trainer` adds it once per micro-batch."""
    rows = tiny.rows("causal")
    student, _ = mixtrals()
    with torch.no_grad():
        outputs = student(**batch_of(rows))
    balancing = float(outputs.aux_loss * student.router_aux_loss_coef)
    tasks, plains = [], []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        run = distil(mixtrals(), rows, output_dir, batch, accumulation)
        tasks.append(run.logs[0]["loss_task"])
        run = train_plainly(mixtrals()[0], rows, output_dir, batch, accumulation)
        plains.append(run.logs[0]["loss"])
    assert tasks[0] == pytest.approx(float(outputs.loss), rel=1e-6)
    assert tasks[0] == pytest.approx(plains[0], rel=1e-6)
    assert tasks[1:] == pytest.approx([tasks[0]] * 2, abs=0.1 * balancing)
    assert plains[1:] == pytest.approx([tasks[0] + balancing, tasks[0] + 3 * balancing], abs=0.3 * balancing)


def test_the_kd_term_of_a_mixture_takes_the_same_step(output_dir):
    rows = tiny.rows("causal")
    whole = distil(mixtrals(), rows, output_dir, task_weight=0.0)
    assert_same_steps(distil(mixtrals(), rows, output_dir, 2, 4, task_weight=0.0), whole)
