"""A report as a whole: from names, folders and live trainers, into files."""

import copy
import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from hf_distill.report import make_report
from hf_distill.report.baselines import BASELINES
from hf_distill.report.live import report_of
from hf_distill.report.results import Report
from hf_distill.run_record import RunRecord
from hf_distill.teachers import LocalTeacher, TopKTeacher
from tests.report.quick import quick
from tests.tiny import ZOO, bert, pair, rows, tokenizer
from tests.training import make_trainer, values

QUICK = {"baselines": (), "batch_sizes": (1,), "repeats": 1, "warm_up": 0}
# A family for each head.
HEADS = {kind: name for name, (_, kind) in reversed(ZOO.items())}.values()


def of_quality(report):
    return [(model.name, model.quality) for model in report.models]


@pytest.mark.parametrize("name", HEADS)
def test_a_report_of_the_saved_student_has_the_live_trainers_numbers(name, tmp_path):
    trainer = make_trainer(tmp_path / "out", name, learning_rate=0.01)
    trainer.train()
    trainer.save_model(tmp_path / "student")
    trainer.teacher.model.save_pretrained(tmp_path / "teacher")
    live = report_of(trainer, **QUICK)
    saved = quick(tmp_path / "teacher", tmp_path / "student", trainer.eval_dataset)
    assert of_quality(live) == of_quality(saved)
    assert live.model("student").quality.items > 0
    assert (live.task, live.metric) == (saved.task, saved.metric)


def test_random_masks_are_those_of_the_saved_students_report_too(tmp_path):
    data = Dataset.from_list(values([{"input_ids": row["input_ids"]} for row in rows("masked", count=10)]))
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": collator}
    trainer = make_trainer(tmp_path / "out", "bert-masked", processing_class=tokenizer(), **options)
    trainer.train()
    live = report_of(trainer, **QUICK)
    trainer.save_model(tmp_path / "student")
    saved = quick(trainer.teacher.model, tmp_path / "student", data)  # masks those rows by default
    assert live.model("student").quality.items > 0
    assert live.model("student").quality.kl_to_teacher > 0
    again = quick(trainer.teacher.model, tmp_path / "student", data, data_collator=collator)
    assert of_quality(live) == of_quality(again)
    assert saved.model("student").quality.items > 0


def test_raw_text_is_measured_as_an_evaluation_measures_it(tmp_path):
    text = Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 90}" for j in range(4 + i)) for i in range(6)]})
    options = {"train_dataset": text, "eval_dataset": text, "processing_class": tokenizer(), "max_length": 16}
    trainer = make_trainer(tmp_path, "llama", temperature=1.0, packing=True, **options)
    found = report_of(trainer, **QUICK).model("student").quality
    metrics = trainer.evaluate()
    assert found.kl_to_teacher == pytest.approx(metrics["eval_kd"], rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)


def test_a_report_survives_its_file(tmp_path):
    student, teacher = pair("bert-tokens")
    report = quick(teacher, student, rows("tokens"), undistilled=copy.deepcopy(student), output_dir=tmp_path)
    read = Report.read_json(tmp_path / "report.json")
    assert read.to_dict() == report.to_dict()
    assert read == report
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert {path.name for path in tmp_path.iterdir()} >= {"report.json", "report.md", "tradeoff.png", "confusion.png"}
    assert "student, undistilled" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "hf_distill.report.drawing"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("figures", "curves", "drawing"):
        monkeypatch.delitem(sys.modules, f"hf_distill.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    student, teacher = pair("bert")
    with pytest.warns(UserWarning, match=r"without plots.*hf-distill\[report\]"):
        quick(teacher, student, rows("sequence"), output_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_the_models_come_in_order_with_what_they_are(tmp_path):
    student, teacher = pair("bert")
    student.save_pretrained(tmp_path / "private" / "my-student")
    teacher.name_or_path = "org/teacher"
    report = quick(
        teacher,
        tmp_path / "private" / "my-student",
        rows("sequence"),
        undistilled=str(tmp_path / "private" / "my-student"),
        baselines=("pruned", "low_rank"),
        data_name="org/data",
        repeats=3,
    )
    names = ["teacher", "student", "student, undistilled", "teacher, pruned", "teacher, low_rank"]
    assert [model.name for model in report.models] == names
    assert [model.source for model in report.models] == ["org/teacher", "my-student", "my-student", None, None]
    assert all(model.quality.items == 8 and model.cost.timings for model in report.models)
    assert report.model("undistilled").quality == report.model("student").quality
    assert (report.data["name"], report.data["rows"]) == ("org/data", 8)
    assert {"processor", "threads", "device", "dtype", "versions", "date", "latency"} <= {*report.environment}
    assert (report.environment["device"], report.environment["dtype"]) == ("cpu", "float32")
    assert "3 timed" in report.environment["latency"]
    assert str(tmp_path) not in json.dumps(report.to_dict())


def test_the_grid_is_of_real_rows_without_padding():
    student, teacher = pair("bert")
    seen = []
    handle = student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    report = quick(teacher, student, rows("sequence"), batch_sizes=(1, 3), lengths=(20, 5))
    handle.remove()
    timings = report.model("student").cost.timings
    assert [(each.batch_size, each.length) for each in timings] == [(1, 5), (1, 20), (3, 5), (3, 20)]
    assert report.model("teacher").cost.flops > report.model("student").cost.flops > 0
    long = [inputs for inputs in seen if inputs["input_ids"].shape == (3, 20)]
    assert long
    assert all(inputs["attention_mask"].all() and (inputs["input_ids"] != 0).all() for inputs in long)
    first = rows("sequence")[0]
    real = first["input_ids"][first["attention_mask"].bool()]
    assert long[0]["input_ids"][0].tolist() == [int(real[i % len(real)]) for i in range(20)]
    usual = quick(teacher, student, rows("sequence")).model("student").cost.timings
    lengths = sorted(int(row["attention_mask"].sum()) for row in rows("sequence"))
    assert [each.length for each in usual] == [lengths[3], lengths[-1]]


def test_inputs_of_one_size_have_no_lengths():
    student, teacher = pair("vit")
    report = quick(teacher, student, rows("image"), batch_sizes=(1, 2))
    assert [(each.batch_size, each.length) for each in report.model("student").cost.timings] == [(1, None), (2, None)]
    with pytest.raises(ValueError, match=r"lengths=\[8\].*one size"):
        quick(teacher, student, rows("image"), lengths=(8,))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_its_cost_and_its_baselines(name):
    student, teacher = pair(name)
    report = quick(teacher, student, rows(ZOO[name][1], count=3), baselines=("pruned",))
    assert [model.note for model in report.models[:2]] == [None, None]
    assert [model.cost is None or model.quality is None for model in report.models] == [False] * 3
    assert report.models[0].quality != report.models[2].quality


def test_a_baseline_that_fails_is_an_entry_with_the_reason():
    class Broken(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    student, teacher = pair("bert")
    BASELINES.register("broken", lambda model: (Broken(model), "made for a test"))
    BASELINES.register("none", lambda model: 1 / 0)
    try:
        report = quick(teacher, student, rows("sequence"), baselines=("broken", "none", "pruned"))
    finally:
        for name in ("broken", "none"):
            del BASELINES._entries[name]
    broken, none, pruned = report.models[2:]
    assert (broken.quality, broken.cost) == (none.quality, none.cost) == (None, None)
    assert "could not be measured" in broken.note
    assert "ZeroDivisionError" in none.note
    assert pruned.quality is not None


def test_adapters_are_measured_on_their_base(tmp_path):
    student, teacher = pair("bert")
    student.save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "peft_config": LoraConfig(r=4, init_lora_weights=False)}
    trainer = make_trainer(tmp_path / "out", "bert", **options)
    trainer.save_model(tmp_path / "adapters")
    live = report_of(trainer, **QUICK)
    saved = quick(teacher, tmp_path / "adapters", trainer.eval_dataset)
    assert live.model("student").quality == saved.model("student").quality
    assert live.model("student").quality.kl_to_teacher > 0


def test_the_base_of_a_student_with_adapters_is_measured_as_its_teacher(tmp_path):
    base, _ = pair("bert")
    plain = copy.deepcopy(base)
    trainer = make_trainer(
        tmp_path, "bert", model=base, teacher_model=None, peft_config=LoraConfig(r=4, init_lora_weights=False)
    )
    live = report_of(trainer, **QUICK)
    alone = quick(plain, copy.deepcopy(plain), trainer.eval_dataset)
    assert live.model("teacher").quality == alone.model("teacher").quality
    assert live.model("teacher").cost.parameters == alone.model("teacher").cost.parameters
    assert live.model("student").quality.kl_to_teacher > 0


def test_a_teacher_that_names_few_classes_is_asked_for_all():
    student, teacher = pair("bert")
    few = quick(TopKTeacher(LocalTeacher(teacher), 1), student, rows("sequence"))
    assert of_quality(few) == of_quality(quick(teacher, student, rows("sequence")))


def test_another_source_than_a_model_is_asked_itself():
    class Loud(LocalTeacher):
        def __call__(self, inputs, **options):
            output = super().__call__(inputs, **options)
            return type(output)(logits=tuple(3 * each for each in output.logits))

    student, teacher = pair("bert")
    report = quick(Loud(teacher), student, rows("sequence"))
    louder = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in louder.classifier.parameters():
            parameter.mul_(3)
    assert report.model("teacher").quality.agreement == 1
    expected = quick(louder, student, rows("sequence")).model("student").quality.kl_to_teacher
    assert report.model("student").quality.kl_to_teacher == pytest.approx(expected, rel=1e-5)
    assert "BertForSequenceClassification alone" in report.model("teacher").note


def test_a_folders_record_and_tokenizer_are_found_there(tmp_path):
    data = [{k: v[: 5 + i] if v.dim() else v for k, v in row.items()} for i, row in enumerate(rows("sequence"))]
    dataset = Dataset.from_list(values(data))
    options = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": tokenizer()}
    trainer = make_trainer(tmp_path, "bert", **options)
    trainer.train()
    trainer.save_model()
    RunRecord.of(trainer).write(tmp_path)
    live = report_of(trainer, **QUICK)
    saved = make_report(trainer.teacher.model, tmp_path, dataset, **QUICK)
    assert of_quality(live) == of_quality(saved)
    assert saved.training["task"] == live.training["task"] == "sequence_classification"
    assert len(saved.training["log_history"]) == 3
    assert isinstance(trainer.data_collator.collator, DataCollatorWithPadding)


def test_the_trainers_metric_and_metrics_are_taken(tmp_path):
    def metrics(prediction):
        return {"hits": float((prediction.predictions.argmax(-1) == prediction.label_ids).sum()), "other": 1.0}

    options = {"metric_for_best_model": "eval_other", "greater_is_better": False}
    report = report_of(make_trainer(tmp_path, compute_metrics=metrics, **options), **QUICK)
    assert (report.metric, report.higher_is_better) == ("other", False)
    assert {*report.model("teacher").quality.metrics} == {"hits", "other"}
    best = {"metric_for_best_model": "retention_hits", "evaluate_teacher": True}
    assert report_of(make_trainer(tmp_path, compute_metrics=metrics, **best), **QUICK).metric == "hits"
    best = {"metric_for_best_model": "agreement"}
    assert report_of(make_trainer(tmp_path, compute_metrics=metrics, **best), **QUICK).metric == "hits"
    trainer = make_trainer(tmp_path, compute_metrics=metrics, include_for_metrics=["inputs"])
    assert report_of(trainer, **QUICK).metric == "accuracy"


def test_what_is_asked_for_goes_before_what_the_trainer_has(tmp_path):
    trainer = make_trainer(tmp_path)
    report = report_of(trainer, trainer.eval_dataset[:3], **QUICK, data_name="three", training={"task": "told"})
    assert report.data["rows"] == report.model("student").quality.items == 3
    assert report.training == {"task": "told"}
    with pytest.raises(ValueError, match="dict of a, b"):
        report_of(trainer, {"a": [], "b": []})
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no rows"):
        report_of(trainer)
    trainer.teacher = None
    with pytest.raises(ValueError, match="no teacher"):
        report_of(trainer)


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("cuda:99", r"device='cuda:99' is not on this machine\. There are: cpu"),
        (torch.device("meta"), r"device='meta' is not on this machine\. There are: cpu"),
        ("nonsense", r"device='nonsense' is no device of torch's\. There are: cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_a_model_is_loaded(device, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_report("nowhere/teacher", "nowhere/student", rows("sequence"), device=device)


def test_mistakes_are_told_before_anything_is_measured(tmp_path):
    student, teacher = pair("bert")
    data = rows("sequence")
    with pytest.raises(TypeError, match=r"no option 'batchsizes'\. Did you mean 'batch_sizes'"):
        make_report(teacher, student, data, batchsizes=(1,))
    for option in ({"repeats": 0}, {"threads": 0}, {"batch_sizes": (0,)}, {"lengths": (4, 0)}):
        with pytest.raises(ValueError, match="at least 1"):
            make_report(teacher, student, data, **option)
    with pytest.raises(TypeError, match="student is a int"):
        make_report(teacher, 3, data)
    with pytest.raises(ValueError, match="token_classification"):
        make_report(bert("TokenClassification"), student, data)
    student.bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ValueError, match="no weights for classifier"):
        make_report(teacher, tmp_path, data)


@pytest.mark.parametrize(("asked", "timed"), [({}, 10), ({"repeats": 12}, 12)])
def test_passes_that_take_long_are_fewer_unless_their_number_is_asked_for(asked, timed, monkeypatch):
    monkeypatch.setattr("hf_distill.report.session._SECONDS", 0.0)
    student, teacher = pair("bert")
    found = make_report(teacher, student, rows("sequence"), baselines=(), batch_sizes=(1,), warm_up=0, **asked)
    assert [{each.repeats for each in model.cost.timings} for model in found.models] == [{timed}] * 2
    assert f"{asked.get('repeats', 'up to 30 (10 where they take long)')} timed" in found.environment["latency"]
