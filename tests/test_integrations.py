"""What reaches the loggers that Trainer writes to: TensorBoard for real, the others through their callbacks."""

import sys
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    integration_utils,
)

from hf_distill.histograms import write_histogram
from hf_distill.temperature_log import Histogram
from tests.training import logged, make_trainer

HISTOGRAM = Histogram(counts=(1, 0, 2), edges=(1.0, 2.0, 3.0, 4.0), least=1.5, most=3.5, total=8.0, squares=24.5)
OPTIONS = {
    "temperature": {"policy": "adaptive", "signal": "teacher_entropy", "min": 2, "max": 10},
    "hidden_weight": 1.0,
    "weight_schedules": {"hidden": "warmup"},
    "eval_strategy": "steps",
    "eval_steps": 2,
    "max_steps": 4,
    "evaluate_teacher": True,
    "compute_metrics": lambda prediction: {"accuracy": 0.5},
}
TRAINING = ("loss_task", "loss_kd", "loss_hidden", "temperature", "weight_hidden", "labelled_fraction")
EVALUATION = ("eval_loss", "eval_kd", "eval_agreement", "eval_teacher_accuracy", "eval_retention_accuracy")


def names_at_loggers():
    return [f"train/{name}" for name in TRAINING] + [name.replace("eval_", "eval/", 1) for name in EVALUATION]


def test_tensorboard_has_the_terms_and_the_histogram_of_temperatures(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, report_to="tensorboard", **OPTIONS)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"histograms": 0}).Reload()
    for name in (*TRAINING, *EVALUATION):
        tag = name.replace("eval_", "eval/", 1) if name in EVALUATION else f"train/{name}"
        written = events.Scalars(tag)
        assert [event.value for event in written] == pytest.approx(logged(trainer, name), rel=1e-6)
        assert [event.step for event in written] == ([2, 4] if name in EVALUATION else [1, 2, 3, 4])
    histograms = events.Histograms("train/temperature")
    assert [event.step for event in histograms] == [1, 2, 3, 4]
    for event, mean, least, most in zip(
        histograms, *(logged(trainer, f"temperature{which}") for which in ("", "_min", "_max")), strict=True
    ):
        value = event.histogram_value
        assert value.num == sum(value.bucket) == 4
        assert (value.sum / value.num, value.min, value.max) == pytest.approx((mean, least, most))


class Library(types.ModuleType):
    """As wandb and trackio: what was logged, and histograms as their bins."""

    def __init__(self, name):
        super().__init__(name)
        self.logged, self.run = [], types.SimpleNamespace(summary={})
        self.log = self.logged.append
        self.Histogram = lambda sequence=None, np_histogram=None, num_bins=64: np_histogram

    def finish(self):
        """Ends a run."""


@pytest.fixture(params=[("wandb", WandbCallback), ("trackio", TrackioCallback)], ids=lambda param: param[0])
def logger(request, monkeypatch):
    name, callback = request.param
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setitem(sys.modules, name, library := Library(name))
    made = callback()
    made._initialized = True
    return made, library


def test_wandb_and_trackio_get_the_terms_and_the_histogram_at_its_step(logger, tmp_path):
    callback, library = logger
    trainer = make_trainer(tmp_path, callbacks=[callback], **OPTIONS)
    trainer.train()
    found = {name for entry in library.logged for name in entry}
    assert {*names_at_loggers()} <= found
    histograms = [entry for entry in library.logged if isinstance(entry.get("train/temperature"), tuple)]
    assert [entry["train/global_step"] for entry in histograms] == [1, 2, 3, 4]
    assert {*histograms[0]} == {"train/temperature", "train/global_step"}
    counts, edges = histograms[0]["train/temperature"]
    assert counts.sum() == 4
    np.testing.assert_allclose(edges, np.linspace(2, 10, 33))


def test_a_library_that_has_not_begun_gets_no_histogram(logger):
    callback, library = logger
    callback._initialized = False
    handler = types.SimpleNamespace(callbacks=[callback])
    write_histogram(handler, TrainerState(global_step=7), "train/temperature", HISTOGRAM)
    assert library.logged == []


def test_mlflow_gets_the_terms_and_no_histogram(monkeypatch, tmp_path):
    metrics = []
    library = types.ModuleType("mlflow")
    library.utils = types.SimpleNamespace(
        validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    library.log_metrics = lambda metrics=None, step=None, synchronous=True, seen=metrics: seen.append((step, metrics))
    library.active_run = lambda: None
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: True)
    monkeypatch.setitem(sys.modules, "mlflow", library)
    callback = MLflowCallback()
    callback._initialized, callback._async_log = True, True
    trainer = make_trainer(tmp_path, callbacks=[callback], **OPTIONS)
    trainer.train()
    assert {*TRAINING, *EVALUATION} <= {name for _, entry in metrics for name in entry}
    assert all(isinstance(value, int | float) for _, entry in metrics for value in entry.values())
    before = len(metrics)
    handler = types.SimpleNamespace(callbacks=[callback])
    write_histogram(handler, TrainerState(global_step=7), "train/temperature", HISTOGRAM)
    assert len(metrics) == before


def test_a_histogram_is_read_back_from_the_file_bin_by_bin(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    callback = TensorBoardCallback()
    trainer = make_trainer(tmp_path)
    state = TrainerState(global_step=7)
    callback.on_train_begin(trainer.args, state, TrainerControl())
    write_histogram(types.SimpleNamespace(callbacks=[callback]), state, "train/temperature", HISTOGRAM)
    callback.tb_writer.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("train/temperature")
    value = event.histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (1.5, 3.5, 3, 8, 24.5)
    assert ([*value.bucket], [*value.bucket_limit]) == ([1, 0, 2], [2, 3, 4])
