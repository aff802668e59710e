"""What a report must not do: measure another model than it says, tell of the machine, keep models, leave old files."""

import copy
import gc
import itertools
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from hf_distill.models.heads import context_length
from hf_distill.report.baselines import BASELINES
from hf_distill.report.derived import grid, speed_up
from hf_distill.report.live import report_of
from hf_distill.report.results import Report
from tests.processes import run_twice
from tests.report import text_two_processes
from tests.report.quick import quick
from tests.report.report_cases import classifiers
from tests.tiny import pair, rows, t5
from tests.training import make_trainer

QUICK = {"baselines": (), "batch_sizes": (1,), "repeats": 1, "warm_up": 0}


@pytest.fixture
def registered():
    """Registers baselines for one test."""
    before = dict(BASELINES._entries)
    yield BASELINES.register
    BASELINES._entries.clear()
    BASELINES._entries.update(before)


def test_a_student_of_a_training_in_bfloat16_is_measured_as_it_is_saved(tmp_path):
    trainer = make_trainer(tmp_path / "out", "bert", bf16=True, learning_rate=0.01)
    trainer.train()
    wrapped = trainer.model.forward
    live = report_of(trainer, **QUICK)
    assert trainer.model.forward is wrapped
    trainer.save_model(tmp_path / "student")
    saved = quick(trainer.teacher.model, tmp_path / "student", trainer.eval_dataset)
    assert [model.quality for model in live.models] == [model.quality for model in saved.models]
    assert live.model("teacher").note is None


def test_the_base_of_a_student_with_a_head_of_its_own_has_the_head_it_began_with(tmp_path):
    base, _ = pair("bert")
    plain = copy.deepcopy(base)
    adapters = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    trainer = make_trainer(tmp_path, "bert", model=base, teacher_model=None, peft_config=adapters, learning_rate=0.1)
    trainer.train()
    live = report_of(trainer, **QUICK)
    alone = quick(plain, plain, trainer.eval_dataset)
    assert live.model("teacher").quality == alone.model("teacher").quality
    assert live.model("student").quality.kl_to_teacher > 0.001


def test_texts_to_write_keep_their_length_where_it_is_that_of_the_texts_to_read():
    student, teacher = t5(hidden=16), t5()
    data = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [4, 5, 6, 1]}]
    seen = []
    handle = student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    quick(teacher, student, data, lengths=(20,))
    handle.remove()
    timed = [inputs for inputs in seen if inputs["input_ids"].shape[1] == 20]
    assert timed
    assert all(inputs["decoder_input_ids"].shape[1] == 4 for inputs in timed)


def test_a_baseline_is_gone_before_the_next_is_made(registered):
    alive, at_once = [], []

    def own(model):
        gc.collect()
        at_once.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(model))
        return model, "as it was"

    for name in ("one", "two", "three"):
        registered(name, own)
    student, teacher = pair("bert")
    report = quick(teacher, student, rows("sequence"), baselines=("one", "two", "three"))
    assert [model.note for model in report.models[2:]] == ["as it was"] * 3
    assert at_once == [0, 0, 0]


def test_a_baseline_whose_times_cannot_be_taken_is_gone_before_the_next_is_made(registered):
    made, at_once = [], []

    def own(model):
        at_once.append(sum(each() is not None for each in made))
        made.append(weakref.ref(model))
        passes = iter(range(3))  # of an example, and of the rows

        def tire(*_):
            if next(passes, None) is None:
                raise RuntimeError("no more")

        model.register_forward_pre_hook(tire)
        return model, "tired"

    for name in ("one", "two", "three"):
        registered(name, own)
    student, teacher = pair("bert")
    gc.collect()
    gc.disable()  # what is dropped is gone at once, not when a collector comes by
    try:
        report = quick(teacher, student, rows("sequence"), baselines=("one", "two", "three"))
    finally:
        gc.enable()
    assert [model.note for model in report.models[2:]] == ["tired What it costs could not be measured: no more."] * 3
    assert at_once == [0, 0, 0]


def test_equal_models_are_equally_fast_on_a_machine_that_slows_down(monkeypatch):
    _, teacher = pair("bert")
    now, passes = [0.0], itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(*_):  # only this takes time, and each pass a little more: nobody else's look at the clock matters
        now[0] += 1.004 ** next(passes)

    teacher.register_forward_hook(work)
    equals = [copy.deepcopy(teacher) for _ in range(2)]
    report = quick(
        teacher, equals[0], rows("sequence"), undistilled=equals[1], baselines=("pruned", "low_rank"),
        batch_sizes=(1, 3), lengths=(6,), repeats=20, warm_up=2,
    )  # fmt: skip
    times = grid(report.model("teacher"))
    assert times[3, 6].p50_ms > 1.2 * times[1, 6].p50_ms
    for model in report.models:
        for cell, timing in grid(model).items():
            assert speed_up(report, model, cell) == pytest.approx(1, rel=0.02), (model.name, cell)
            assert timing.p95_ms == pytest.approx(times[cell].p95_ms, rel=0.1)
            assert timing.rows_per_second == pytest.approx(1000 * cell[0] / timing.p50_ms)
    assert len(report.models) == 5


def test_a_metric_that_there_is_not_is_refused_before_anything_is_timed():
    student, teacher = pair("bert")
    asked = []
    handle = student.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ValueError, match="metric='acuracy' is none of the scores"):
        quick(teacher, student, rows("sequence"), metric="acuracy")
    handle.remove()
    assert asked == []


def test_no_note_tells_where_anything_lies_on_the_machine(registered):
    def broken(model):
        raise ImportError("cannot import name 'X' from 'torchao' (/home/joe/venv/lib/torchao/__init__.py)")

    def worse(model):
        raise RuntimeError(r"No space left: 'C:\Users\joe\Temp\model.safetensors'. See https://pytorch.org/docs/x")

    registered("broken", broken)
    registered("worse", worse)
    student, teacher = pair("bert")
    report = quick(teacher, student, rows("sequence"), baselines=("broken", "worse"))
    assert report.models[-2].note == "cannot import name 'X' from 'torchao' (__init__.py)"
    assert report.models[-1].note == (
        "It fails with RuntimeError: No space left: 'model.safetensors'. See https://pytorch.org/docs/x"
    )


def test_an_unknown_baseline_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="Did you mean 'pruned'"):
        quick("nowhere/teacher", "nowhere/student", rows("sequence"), baselines=("prunned",))


def test_lengths_beyond_what_a_model_reads_are_said():
    student, teacher = pair("bert")
    report = quick(teacher, student, rows("sequence"), lengths=(8, 65))
    assert [timing.length for timing in report.model("student").cost.timings] == [8]
    assert report.model("student").note == "It reads 64 tokens at most, so longer rows are not timed."


def test_a_model_that_counts_no_positions_has_no_longest_length():
    config = hf.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=97)
    assert context_length(hf.XLNetForSequenceClassification(config)) is None


def test_a_report_leaves_no_plots_of_an_earlier_one(tmp_path):
    student, teacher = pair("bert-regression")
    (tmp_path / "confusion.png").write_bytes(b"of another report")
    quick(teacher, student, rows("number"), output_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "tradeoff.png"}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    classifiers().write_json(path)
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: (self.write_bytes(text[:9].encode()), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        classifiers(("a", "b", "c")).write_json(path)
    assert path.read_text(encoding="utf-8") == before
    assert [*tmp_path.iterdir()] == [path]
    assert Report.read_json(path).to_dict() == classifiers().to_dict()


@pytest.mark.slow
def test_text_is_measured_by_one_of_two_processes(tmp_path):
    run_twice(text_two_processes.run, tmp_path)
    first, second = ((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8") for rank in (0, 1))
    assert first == second


def test_adapters_on_a_base_that_names_its_classes_in_another_order_keep_that_order(tmp_path):
    order, names = [2, 0, 1], ["no", "yes", "maybe"]
    teacher, _ = pair("bert")
    teacher.config.id2label = dict(enumerate(names))
    base = copy.deepcopy(teacher)
    base.config.id2label = {number: names[old] for number, old in enumerate(order)}
    with torch.no_grad():
        base.classifier.weight.copy_(teacher.classifier.weight[order])
        base.classifier.bias.copy_(teacher.classifier.bias[order])
    base.save_pretrained(tmp_path / "base")
    adapters = get_peft_model(hf.BertForSequenceClassification.from_pretrained(tmp_path / "base"), LoraConfig(r=2))
    adapters.save_pretrained(tmp_path / "adapters")  # they change nothing as yet
    found = quick(teacher, tmp_path / "adapters", rows("sequence"))
    assert found.model("student").quality.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert found.model("student").quality.agreement == 1


def test_adapters_on_a_base_without_a_head_are_measured_only_with_a_head_of_their_own(tmp_path):
    teacher, student = pair("bert")
    student.bert.save_pretrained(tmp_path / "base")
    for name, options in (("bare", {}), ("whole", {"task_type": "SEQ_CLS"})):
        model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        adapters = LoraConfig(r=2, target_modules=["query"], **options)
        get_peft_model(model, adapters).save_pretrained(tmp_path / name)
    assert quick(teacher, tmp_path / "whole", rows("sequence")).model("student").quality.metrics
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias, classifier\.weight"):
        quick(teacher, tmp_path / "bare", rows("sequence"))
