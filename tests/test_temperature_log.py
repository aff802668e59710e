import math
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback, integration_utils

from hf_distill.histograms import write_histogram
from hf_distill.temperature_log import Histogram, TemperatureMeter

HISTOGRAM = Histogram(counts=(1, 0, 2), edges=(1.0, 2.0, 3.0, 4.0), least=1.5, most=3.5, total=8.0, squares=24.5)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class Ranks:
    """An accelerator's collective, of which the other ranks' contributions are known beforehand."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others, self.own = others, None

    def gather(self, tensor):
        self.own = tensor
        return torch.cat([tensor, *self.others])


def totals_of_ranks(meters):
    others = []
    for meter in meters[1:]:
        rank = Ranks()
        meter.totals(rank)
        others.append(rank.own)
    return meters[0].totals(Ranks(*others))


@given(st.lists(st.floats(2, 10, width=32), min_size=1, max_size=40), st.integers(1, 4), st.data())
@settings(max_examples=40, deadline=None)
def test_totals_are_those_of_all_valid_items_whatever_the_batches(accelerator, numbers, parts, data):
    mask = [data.draw(st.booleans()) for _ in numbers]
    kept = np.array(numbers)[mask]
    meter = TemperatureMeter(2.0, 10.0)
    for values, valid in zip(torch.tensor(numbers).chunk(parts), torch.tensor(mask).chunk(parts), strict=True):
        meter.add(values.where(valid, math.nan), valid)
    logs, histogram = meter.totals(accelerator)
    if not len(kept):
        assert (logs, histogram) == ({}, None)
        return
    assert logs == pytest.approx(
        {"temperature": kept.mean(), "temperature_min": kept.min(), "temperature_max": kept.max()}, rel=1e-12
    )
    counts, edges = np.histogram(kept, bins=32, range=(2, 10))
    assert histogram.counts == tuple(counts)
    assert histogram.edges == tuple(edges)
    assert (histogram.least, histogram.most) == (kept.min(), kept.max())
    assert (histogram.total, histogram.squares) == pytest.approx((kept.sum(), (kept**2).sum()), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 7.3, torch.tensor(0.1), torch.tensor(7.3)])
def test_one_temperature_for_all_has_itself_for_a_mean(accelerator, temperature):
    meter = TemperatureMeter(2.0, 10.0)
    for items in (1, 3, 1000):
        meter.add(temperature, torch.ones(items, dtype=torch.bool))
    logs, histogram = meter.totals(accelerator)
    assert {*logs.values()} == {float(temperature)}
    assert sum(histogram.counts) == 1004


def test_a_meter_of_one_temperature_has_one_bin(accelerator):
    meter = TemperatureMeter(4.0, 4.0)
    meter.add(4.0, torch.ones(3, dtype=torch.bool))
    assert meter.totals(accelerator)[1].counts == (3, *[0] * 31)


def test_start_and_end_of_an_answer_are_two_temperatures_of_an_item(accelerator):
    meter = TemperatureMeter(2.0, 10.0)
    meter.add_all([torch.tensor([2.0, 4.0]), torch.tensor([6.0, 9.0])], torch.tensor([True, False]))
    assert meter.totals(accelerator)[0] == {"temperature": 4, "temperature_min": 2, "temperature_max": 6}


def test_ranks_are_added_up_and_one_of_them_may_have_had_nothing():
    values = torch.linspace(2, 10, 12)
    whole, meters = TemperatureMeter(2.0, 10.0), [TemperatureMeter(2.0, 10.0) for _ in range(3)]
    whole.add(values, torch.ones(12, dtype=torch.bool))
    for meter, part in zip(meters[:2], values.split([5, 7]), strict=True):
        meter.add(part, torch.ones(len(part), dtype=torch.bool))
    expected, got = whole.totals(Ranks()), totals_of_ranks(meters)
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert got[1].counts == expected[1].counts
    assert totals_of_ranks([*meters[2:], *meters[:2]])[1].counts == expected[1].counts


def test_nothing_is_left_after_a_reset_and_nothing_added_is_nothing(accelerator):
    meter = TemperatureMeter(2.0, 10.0)
    meter.add(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert meter.totals(accelerator) == ({}, None)
    meter.add(3.0, torch.ones(2, dtype=torch.bool))
    meter.reset()
    assert meter.totals(accelerator) == ({}, None)


def test_a_learned_temperature_is_taken_down_without_its_graph(accelerator):
    meter = TemperatureMeter(1.0, 21.0)
    meter.add(torch.tensor(3.0, requires_grad=True), torch.ones(2, dtype=torch.bool))
    assert meter.totals(accelerator)[0]["temperature"] == 3


class TensorBoardWriter:
    """As torch's SummaryWriter: the same names and order of arguments."""

    def __init__(self, *args, **kwargs):
        self.written = []

    def add_histogram_raw(
        self,
        tag,
        min,
        max,
        num,
        sum,
        sum_squares,
        bucket_limits,
        bucket_counts,
        global_step=None,
        walltime=None,
    ):
        assert len(bucket_limits) == len(bucket_counts)
        self.written.append((tag, min, max, num, sum, sum_squares, bucket_limits, bucket_counts, global_step))


class Handler:
    def __init__(self, *callbacks):
        self.callbacks = [*callbacks]


def state_at(step, main=True):
    return TrainerState(global_step=step, is_world_process_zero=main)


@pytest.fixture
def tensorboard(monkeypatch):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = TensorBoardWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return TensorBoardCallback(TensorBoardWriter())


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.logged = []
    module.log = module.logged.append
    module.Histogram = lambda sequence=None, np_histogram=None, num_bins=64: np_histogram
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", module)
    callback = WandbCallback()
    callback._initialized = True
    return callback


def test_a_histogram_goes_to_tensorboard_as_its_bins(tensorboard):
    write_histogram(Handler(tensorboard), state_at(7), "train/temperature", HISTOGRAM)
    assert tensorboard.tb_writer.written == [
        ("train/temperature", 1.5, 3.5, 3, 8.0, 24.5, [2.0, 3.0, 4.0], [1, 0, 2], 7)
    ]


def test_a_histogram_goes_to_wandb_at_the_step_of_the_logs(wandb):
    write_histogram(Handler(wandb), state_at(7), "train/temperature", HISTOGRAM)
    (logged,) = wandb._wandb.logged
    counts, edges = logged["train/temperature"]
    assert (counts.tolist(), edges.tolist(), logged["train/global_step"]) == ([1, 0, 2], [1, 2, 3, 4], 7)


def test_other_processes_and_loggers_that_have_not_begun_get_nothing(tensorboard, wandb):
    handler = Handler(tensorboard, wandb, object())
    write_histogram(handler, state_at(7, main=False), "train/temperature", HISTOGRAM)
    writer, tensorboard.tb_writer, wandb._initialized = tensorboard.tb_writer, None, False
    write_histogram(handler, state_at(7), "train/temperature", HISTOGRAM)
    assert writer.written == wandb._wandb.logged == []
