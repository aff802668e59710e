"""The table of a notebook, driven with a stand-in for its display."""

import html
import re

import pytest
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import notebook
from transformers.utils.notebook import NotebookProgressCallback

from hf_distill.callbacks import DistillationNotebookCallback
from tests.tiny import pair, rows
from tests.training import logged, make_trainer

PROGRESS = (ProgressCallback, NotebookProgressCallback)


class Display:
    """As IPython.display: what is shown under a handle can be shown anew."""

    def __init__(self):
        self.shown = []

    def HTML(self, text):  # noqa: N802 - IPython's name
        return text

    def display(self, text, display_id=False):
        self.shown.append(text)
        return Handle(self, len(self.shown) - 1)

    @property
    def tables(self):
        """Header and lines of the tables as they are shown in the end."""
        found = []
        for text in self.shown:
            lines = [
                re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in re.findall(r"<tr.*?>(.*?)</tr>", text, re.S)
            ]
            if lines:
                header, *cells = ([html.unescape(cell) for cell in line] for line in lines)
                found.append([dict(zip(header, line, strict=True)) for line in cells])
        return found


class Handle:
    def __init__(self, display, place):
        self.display, self.place = display, place

    def update(self, text):
        self.display.shown[self.place] = text


@pytest.fixture
def display(monkeypatch):
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    monkeypatch.setattr("hf_distill.trainer.is_in_notebook", lambda: True)
    monkeypatch.setattr(notebook, "disp", shown := Display())
    return shown


def cells(trainer, *names):
    """The numbers of a log, as the table writes them."""
    return [[f"{value:.6f}" for value in logged(trainer, name)] for name in names]


def test_without_evaluation_each_log_is_a_line_with_the_terms(display, tmp_path):
    trainer = make_trainer(tmp_path, disable_tqdm=False, hidden_weight=1.0, max_steps=3)
    trainer.train()
    (table,) = display.tables
    assert [*table[0]] == ["Step", "Training Loss", "Loss Hidden", "Loss Kd", "Loss Task"]
    assert [line["Step"] for line in table] == ["1", "2", "3"]
    names = {"Training Loss": "loss", "Loss Kd": "loss_kd", "Loss Task": "loss_task", "Loss Hidden": "loss_hidden"}
    for column, name in names.items():
        assert [[line[column] for line in table]] == cells(trainer, name)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_with_evaluations_the_terms_stand_beside_what_they_find(strategy, display, tmp_path):
    trainer = make_trainer(
        tmp_path,
        disable_tqdm=False,
        eval_strategy=strategy,
        eval_steps=2,
        max_steps=4,
        evaluate_teacher=True,
        compute_metrics=lambda prediction: {"accuracy": 0.5},
    )
    trainer.train()
    (table,) = display.tables
    terms, found = ["Loss Kd", "Loss Task"], ["Kd", "Agreement", "Accuracy", "Teacher Accuracy", "Retention Accuracy"]
    first = "Epoch" if strategy == "epoch" else "Step"
    assert {*table[0]} == {first, "Training Loss", "Validation Loss", *terms, *found}
    assert [line[first] for line in table] == (["1", "2"] if strategy == "epoch" else ["2", "4"])
    kd, task, losses = cells(trainer, "loss_kd", "loss_task", "eval_loss")
    assert [line["Loss Kd"] for line in table] == kd[1::2]
    assert [line["Loss Task"] for line in table] == task[1::2]
    assert [line["Validation Loss"] for line in table] == losses
    assert [[line["Kd"] for line in table]] == cells(trainer, "eval_kd")
    assert [[line["Agreement"] for line in table]] == cells(trainer, "eval_agreement")


def test_sets_by_name_share_a_line(display, tmp_path):
    sets = {"a": rows("sequence"), "b": rows("sequence", seed=5)}
    trainer = make_trainer(
        tmp_path, disable_tqdm=False, eval_dataset=sets, eval_strategy="steps", eval_steps=1, max_steps=2
    )
    trainer.train()
    (table,) = display.tables
    assert [line["Step"] for line in table] == ["1", "2"]
    assert [[line["A Kd"] for line in table], [line["B Agreement"] for line in table]] == cells(
        trainer, "eval_a_kd", "eval_b_agreement"
    )
    assert not any("Runtime" in column for column in table[0])


def test_an_evaluation_alone_shows_a_line_and_leaves_the_metrics_whole(display, tmp_path):
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    metrics = trainer.evaluate()
    ((line,),) = display.tables
    assert line["Agreement"] == f"{metrics['eval_agreement']:.6f}"
    assert "Loss Kd" not in line
    assert "eval_runtime" in metrics


def test_a_term_that_comes_late_or_goes_leaves_the_other_lines_as_they_are(display, tmp_path):
    trainer = make_trainer(
        tmp_path, disable_tqdm=False, max_steps=4,
        weight_schedules={"task": {"kind": "step", "points": [[0, 1], [0.5, 0]]}},
    )  # fmt: skip
    trainer.train()
    (table,) = display.tables
    assert [line["Loss Kd"] for line in table] == cells(trainer, "loss_kd")[0]
    assert len(logged(trainer, "loss_task")) == 2
    assert [line["Loss Task"] for line in table][2:] == ["No Log"] * 2


def progress(trainer):
    return [kind for kind in map(type, trainer.callback_handler.callbacks) if issubclass(kind, PROGRESS)]


def test_only_what_trainer_has_added_is_replaced(display, tmp_path):
    class Own(NotebookProgressCallback):
        pass

    class Other(TrainerCallback):
        pass

    default = make_trainer(tmp_path, disable_tqdm=False, callbacks=[Other()])
    assert progress(default) == [DistillationNotebookCallback]
    assert any(type(callback) is Other for callback in default.callback_handler.callbacks)
    given = make_trainer(tmp_path, callbacks=[one := NotebookProgressCallback()])
    assert one in given.callback_handler.callbacks
    assert progress(given) == [NotebookProgressCallback]
    both = make_trainer(tmp_path, disable_tqdm=False, callbacks=[own := Own()])
    assert own in both.callback_handler.callbacks
    assert progress(make_trainer(tmp_path, disable_tqdm=True)) == []


def test_outside_notebooks_the_progress_bar_stays(tmp_path):
    trainer = make_trainer(tmp_path, disable_tqdm=False, models=pair("bert"))
    assert progress(trainer) == [ProgressCallback]
