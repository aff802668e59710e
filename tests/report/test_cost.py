"""Parameters, bytes on disk and the grid of times, each against what is counted by other means."""

import functools
import itertools
import statistics
import time

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import nn

from hf_distill.models.heads import context_length
from hf_distill.models.modules import DistillationModules, StudentHook, attach
from hf_distill.report.cost import Runner, measure_cost, measure_latencies, parameter_count, saved_bytes


def tokens(batch_size, length):
    return {"input_ids": torch.full((batch_size, length or 7), 5)}


def measure(model, **changes):
    options = {"batch_sizes": (1, 2), "lengths": (4, 6), "repeats": 2, "warm_up": 1, **changes}
    return measure_cost(model, make_batch=options.pop("make_batch", tokens), **options)


class Clocked(nn.Module):
    """Takes what a schedule says, on a clock of its own."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seconds, self.now, self.shapes, self.modes = list(seconds), 0.0, [], []

    def forward(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append(self.training or torch.is_grad_enabled())
        self.now += self.seconds.pop(0) if self.seconds else 0.0
        return input_ids


@pytest.fixture(name="clocked")
def _clocked(monkeypatch):
    def make(seconds):
        model = Clocked(seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: model.now)
        return model

    return make


def test_times_are_those_of_the_passes_after_the_warm_up(clocked):
    seconds = [0.004, 0.001, 0.010, 0.002, 0.003]
    model = clocked([9.0, 8.0, *seconds])
    (timing,) = measure(model, batch_sizes=(6,), lengths=(4,), repeats=5, warm_up=2, size_bytes=0).timings
    assert (timing.batch_size, timing.length, timing.repeats) == (6, 4, 5)
    assert timing.p50_ms == pytest.approx(1000 * statistics.median(seconds))
    # The 95th percentile lies at 3.8 of the places 0 to 4 in ascending order.
    assert timing.p95_ms == pytest.approx(1000 * (0.2 * 0.004 + 0.8 * 0.010))
    assert timing.rows_per_second == pytest.approx(6 / statistics.median(seconds))


def test_the_grid_is_run_cell_by_cell_then_its_largest_cell_then_one_long_row(clocked):
    model = clocked([1.0] * 99)
    cost = measure(model, batch_sizes=(2, 3), lengths=(6, 4), repeats=2, warm_up=1, size_bytes=0)
    cells = [(2, 6), (2, 4), (3, 6), (3, 4)]
    assert [(timing.batch_size, timing.length) for timing in cost.timings] == cells
    assert model.shapes == [cell for cell in cells for _ in range(3)] + [(3, 6), (1, 6)]
    assert not any(model.modes)


def test_a_machine_that_slows_down_makes_no_model_of_several_look_slower(monkeypatch):
    looks = itertools.accumulate(1.002**number for number in itertools.count())  # each a little longer than the last
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks))
    options = {"batch_sizes": (1, 2), "repeats": 30, "warm_up": 5}
    equals = [Runner(Clocked([]), tokens, (4, 6)) for _ in range(3)]
    for cell in zip(*measure_latencies(equals, **options), strict=True):
        assert [timing.repeats for timing in cell] == [30] * 3
        assert [timing.p50_ms for timing in cell] == pytest.approx([cell[0].p50_ms] * 3, rel=0.01)
        assert [timing.p95_ms for timing in cell] == pytest.approx([cell[0].p95_ms] * 3, rel=0.05)
    first, second = (measure_latencies([one], **options)[0][0] for one in equals[:2])
    assert second.p50_ms > 1.5 * first.p50_ms


def test_what_the_model_before_left_in_the_caches_is_not_timed(monkeypatch):
    ran, clock = [], [0.0]

    class Cached(Clocked):
        def forward(self, input_ids):
            clock[0] += 2.0 if ran[-1:] == [self] else 50.0
            ran.append(self)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    models = [Cached([]), Cached([])]
    runners = [Runner(model, tokens, (4,)) for model in models]
    for (timing,) in measure_latencies(runners, batch_sizes=(3,), repeats=12, warm_up=2):
        assert (timing.p50_ms, timing.p95_ms, timing.repeats, timing.rows_per_second) == (2000, 2000, 12, 1.5)
    changes = sum(one is not other for one, other in itertools.pairwise(ran))
    assert changes >= 4
    assert [ran.count(model) for model in models] == [2 + 12 + 3] * 2  # one a turn is not timed


def test_a_cell_that_takes_long_ends_early_after_two_turns_of_each(clocked):
    model = clocked([1.0] * 5 + [1e-3] * 99 + [0.4] * 99)
    options = {"batch_sizes": (1, 2), "repeats": 30, "warm_up": 5, "seconds": 3.0}
    cells = []
    (timings,) = measure_latencies(
        [Runner(model, tokens, (4, 6))], progress=lambda *cell: cells.append(cell), **options
    )
    assert cells == [(1, 4), (1, 6), (2, 4), (2, 6)]
    assert [timing.repeats for timing in timings] == [30, 30, 30, 10]


def test_a_model_that_fails_in_a_cell_leaves_the_others_their_times():
    class Small(Clocked):
        def forward(self, input_ids):
            if input_ids.numel() > 12:
                raise RuntimeError("out of memory")
            return super().forward(input_ids)

    small, large = Small([]), Clocked([])
    failed, timings = measure_latencies(
        [Runner(small, tokens, (4, 6)), Runner(large, tokens, (4, 6))], batch_sizes=(2, 3, 4), repeats=2, warm_up=0
    )
    assert str(failed) == "out of memory"
    assert small.shapes == [*[(2, 4)] * 3, *[(2, 6)] * 3, *[(3, 4)] * 3]
    assert [(timing.batch_size, timing.length) for timing in timings] == [
        (rows, length) for rows in (2, 3, 4) for length in (4, 6)
    ]


def test_a_length_that_one_model_cannot_read_is_timed_for_the_other():
    runners = [Runner(make().eval(), tokens, (8, 65)) for make in (tiny.bert, functools.partial(Clocked, []))]
    short, both = measure_latencies(runners, batch_sizes=(1,), repeats=1, warm_up=0)
    assert [[timing.length for timing in own] for own in (short, both)] == [[8], [8, 65]]


def test_inputs_of_one_size_have_no_length():
    model = tiny.vit()

    def images(batch_size, length):
        assert length is None
        return {"pixel_values": torch.zeros(batch_size, 3, 16, 16)}

    cost = measure(model, make_batch=images, lengths=(None,))
    assert [(timing.batch_size, timing.length) for timing in cost.timings] == [(1, None), (2, None)]
    assert cost.peak_memory_bytes > 0
    assert cost.flops > 0


@pytest.mark.parametrize("changes", [{"batch_sizes": ()}, {"lengths": ()}, {"repeats": 0}])
def test_an_empty_grid_is_refused(changes):
    with pytest.raises(ValueError, match="at least one of each"):
        measure(nn.Linear(2, 2), **changes)


@pytest.mark.parametrize(
    ("make", "longest"), [(tiny.bert, 64), (tiny.roberta, 64), (tiny.gpt2, 64), (tiny.llama, 64), (tiny.t5, None)]
)
def test_lengths_that_a_model_cannot_read_are_left_out(make, longest):
    model = make().eval()
    assert context_length(model) == longest
    lengths = (4, 64, 65, 66, 100)
    kept = [length for length in lengths if longest is None or length <= longest]

    def batch(batch_size, length):
        decoder = {"decoder_input_ids": torch.full((batch_size, 2), 5)} if longest is None else {}
        return {**tokens(batch_size, length), **decoder}

    cost = measure(model, make_batch=batch, batch_sizes=(1,), lengths=lengths, repeats=1, warm_up=0)
    assert [timing.length for timing in cost.timings] == kept


def test_the_longest_length_can_be_read_and_one_more_cannot():
    model = tiny.roberta().eval()
    model(**tokens(1, context_length(model)))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(**tokens(1, context_length(model) + 1))


def test_without_a_length_that_fits_the_rest_is_still_told():
    cost = measure(tiny.bert(), lengths=(100, 200))
    assert (cost.timings, cost.peak_memory_bytes, cost.flops) == ((), None, None)
    assert cost.parameters > 0
    assert cost.size_bytes > 0


def test_a_model_is_left_as_it_was():
    model = tiny.bert(dropout=0.1, problem_type=None).train()
    model.bert.encoder.layer[0].eval()
    model.config.architectures = ["Another"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config, random = model.config.to_dict(), torch.get_rng_state()
    measure(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("make", [tiny.bert, tiny.gpt2, tiny.t5, tiny.whisper, tiny.mixtral])
def test_parameters_and_bytes_are_those_that_are_loaded_again(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    loaded = type(model).from_pretrained(tmp_path)
    assert parameter_count(model) == sum({value.data_ptr(): value.numel() for value in loaded.parameters()}.values())
    assert saved_bytes(model) == sum(len(file.read_bytes()) for file in files)


def test_tied_weights_count_once():
    tied, untied = tiny.llama(tie_word_embeddings=True), tiny.llama()
    head = tiny.VOCABULARY * 32
    assert parameter_count(untied) - parameter_count(tied) == head
    assert saved_bytes(untied) - saved_bytes(tied) == pytest.approx(4 * head, abs=200)


def test_bytes_are_those_of_all_shards(tmp_path):
    model = tiny.bert()
    whole = saved_bytes(model)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="30KB")
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert whole <= saved_bytes(model) == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_half_precision_takes_half_the_bytes():
    full, half = tiny.bert(), tiny.bert().bfloat16()
    assert saved_bytes(full) - saved_bytes(half) == pytest.approx(2 * parameter_count(full), abs=100)


def test_a_generation_config_that_cannot_be_saved_does_not_matter():
    model = tiny.llama()
    expected = saved_bytes(model)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3
    kept = model.generation_config
    assert saved_bytes(model) == expected
    assert model.generation_config is kept


def test_what_trained_beside_a_student_is_not_of_the_student():
    student = tiny.bert()
    expected = parameter_count(student), saved_bytes(student)
    attach(student, DistillationModules({"projection": nn.Linear(9, 9)}), StudentHook())
    assert (parameter_count(student), saved_bytes(student)) == expected


def test_an_adapter_counts_with_its_base():
    base = tiny.bert()
    expected = parameter_count(base), saved_bytes(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
    adapter = 2 * 2 * (32 + 32)
    assert parameter_count(model) == expected[0] + adapter
    assert saved_bytes(model) == pytest.approx(expected[1] + 4 * adapter, abs=1500)  # the rest is names


def test_a_prompt_is_part_of_the_parameters():
    base = tiny.llama()
    expected = parameter_count(base)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert parameter_count(model) == expected + 3 * 32


def test_a_compiled_model_counts_as_the_model():
    model = tiny.bert()
    compiled = torch.compile(model, backend="eager")
    assert (parameter_count(compiled), saved_bytes(compiled)) == (parameter_count(model), saved_bytes(model))


def test_a_module_of_ones_own_can_be_measured():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids))

    cost = measure(Own())
    assert cost.parameters == 9 * 4 + 4 * 3 + 3
    assert cost.flops == 2 * 6 * 4 * 3
    assert 4 * cost.parameters < cost.size_bytes < 4 * cost.parameters + 4000


def test_four_bit_weights_count_as_the_weights_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False).to("cpu")
    assert layer.weight.numel() < 64 * 32
    assert parameter_count(nn.Sequential(layer)) == 64 * 32


def test_nothing_is_written_to_the_terminal(capfd):
    measure(tiny.bert(), repeats=1, warm_up=0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_bars_are_shown_again_afterwards():
    hf.utils.logging.enable_progress_bar()
    saved_bytes(tiny.bert())
    assert hf.utils.logging.is_progress_bar_enabled()
    hf.utils.logging.disable_progress_bar()
    try:
        saved_bytes(tiny.bert())
        assert not hf.utils.logging.is_progress_bar_enabled()
    finally:
        hf.utils.logging.enable_progress_bar()


def test_figures_are_plain_numbers(tmp_path):
    cost = measure(tiny.bert())
    for timing in cost.timings:
        assert [type(value) for value in (timing.p50_ms, timing.p95_ms, timing.rows_per_second)] == [float] * 3
    assert [type(value) for value in (cost.parameters, cost.size_bytes, cost.peak_memory_bytes, cost.flops)] == [
        int
    ] * 4
    assert np.all([timing.p50_ms <= timing.p95_ms for timing in cost.timings])


def test_weights_on_disk_are_the_parameters_and_a_header(tmp_path):
    model = tiny.bert()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        elements = sum(file.get_tensor(name).numel() for name in file.keys())
    assert elements == parameter_count(model)
    assert 0 < saved_bytes(model) - 4 * elements < 5000
