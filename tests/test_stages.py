"""Runs of several stages: what each trains with, what is written, and going on in the middle with the same bits."""

import copy
import json
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import (
    DistillationTrainer,
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
)
from hf_distill.stages import Stage, run_stages
from tests import tiny
from tests.invariants.steps import with_dropout
from tests.training import arguments, logged, values

STEPS = 4  # of 8 rows, 2 a step: one epoch
PLAN = {
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
}
KD = {"kd_weight": 1.0, "task_weight": 0.0}
TASK = {"kd_weight": 0.0, "task_weight": 1.0}
STAGES = (Stage("kd", training=KD), Stage("task", training={**TASK, "learning_rate": 1e-3, "num_train_epochs": 2}))


def bert(layers, seed=0):
    torch.manual_seed(seed)
    return with_dropout(tiny.bert(layers=layers))


def run(folder, stages=STAGES, *, model=None, args=None, plan=None, **options):
    """A run of a BERT with dropout, the same at every call."""
    if model is None:
        model = bert(2)
    options.setdefault("teacher_model", tiny.pair("bert")[1])
    options.setdefault("train_dataset", tiny.rows("sequence"))
    args = args or arguments(folder, **{**PLAN, **(plan or {})})
    return run_stages(stages, model=model, args=args, **options)


def lineage(folder):
    return json.loads(Path(folder, "lineage.json").read_text())


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(model, expected):
    assert [*model.state_dict()] == [*expected]
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key], value), key


class Stop(Exception):  # noqa: N818 - no error, a power cut
    pass


class Interrupt(TrainerCallback):
    """Stops the process at a step of a stage, and counts the steps of each."""

    def __init__(self, stage=None, step=None):
        self.at, self.steps = (stage, step), {}

    def on_step_end(self, args, state, control, **kwargs):
        stage = Path(args.output_dir).name
        self.steps[stage] = self.steps.get(stage, 0) + 1

    def on_step_begin(self, args, state, control, **kwargs):
        if (Path(args.output_dir).name, state.global_step) == self.at:
            raise Stop


def interrupted(folder, stage, step, **options):
    with pytest.raises(Stop):
        run(folder, callbacks=[Interrupt(stage, step)], **options)


def resumed(folder, **options):
    """The run gone on with, and the steps it took in each stage."""
    counter = Interrupt()
    return run(folder, resume=True, callbacks=[counter], **options), counter.steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run's weights and the losses of its last stage."""
    trainer = run(tmp_path_factory.mktemp("whole")).trainer
    return weights(trainer.model), logged(trainer, "loss")


def test_each_stage_trains_with_its_own_terms_rate_and_length(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            seen[Path(args.output_dir).name] = (state, optimizer.param_groups[0]["lr"], args.seed)

    done = run(tmp_path, callbacks=[Watch()])
    kd, task = seen["1-kd"], seen["2-task"]
    assert (kd[0].global_step, task[0].global_step) == (STEPS, 8)
    assert (kd[1], task[1]) == (3e-3, 1e-3)
    assert (kd[2], task[2]) == (42, 43)
    for state, term, other in ((kd[0], "loss_kd", "loss_task"), (task[0], "loss_task", "loss_kd")):
        logs = [log for log in state.log_history if "loss" in log]
        assert all(log["loss"] == pytest.approx(log[term], rel=1e-5) for log in logs)
        assert not any(other in log for log in logs)
    assert done.trainer.state.global_step == 8
    assert {*done.metrics} == {"kd", "task"}


def test_a_run_of_one_stage_is_a_training_bit_for_bit(tmp_path):
    done = run(tmp_path / "stages", stages=[Stage("only")])
    args = arguments(tmp_path / "plain", **PLAN)
    trainer = DistillationTrainer(
        bert(2), args, teacher_model=tiny.pair("bert")[1], train_dataset=tiny.rows("sequence")
    )
    trainer.train()
    assert_same_bits(done.trainer.model, weights(trainer.model))
    assert logged(done.trainer, "loss") == logged(trainer, "loss")


@pytest.mark.parametrize(("stage", "step"), [("1-kd", 0), ("1-kd", 2), ("2-task", 0), ("2-task", 3), ("2-task", 6)])
def test_a_run_that_was_interrupted_goes_on_and_ends_with_the_same_bits(stage, step, uninterrupted, tmp_path):
    interrupted(tmp_path / "cut", stage, step)
    done, steps = resumed(tmp_path / "cut")
    expected, losses = uninterrupted
    first, second = (STEPS - step, 8) if stage == "1-kd" else (0, 8 - step)
    assert steps == {key: value for key, value in {"1-kd": first, "2-task": second}.items() if value}
    assert_same_bits(done.trainer.model, expected)
    assert logged(done.trainer, "loss")[-2:] == losses[-2:]
    saved = hf.BertForSequenceClassification.from_pretrained(tmp_path / "cut")
    assert_same_bits(saved, expected)


def test_a_run_cut_off_between_the_last_step_and_the_saved_student_takes_no_further_step(tmp_path):
    class Cut(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            if Path(args.output_dir).name == "1-kd":
                raise Stop

    plan = {"max_steps": 3}  # in the middle of an epoch
    whole = run(tmp_path / "whole", plan=plan)
    with pytest.raises(Stop):
        run(tmp_path / "cut", plan=plan, callbacks=[Cut()])
    done, steps = resumed(tmp_path / "cut", plan=plan)
    assert steps == {"2-task": 8}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_a_finished_run_is_not_trained_again_and_still_gives_its_trainer(tmp_path):
    whole = run(tmp_path)
    done, steps = resumed(tmp_path)
    assert steps == {}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))
    assert done.metrics == whole.metrics
    metrics, expected = (trainer.evaluate(tiny.rows("sequence")) for trainer in (done.trainer, whole.trainer))
    assert [metrics[name] for name in ("eval_loss", "eval_kd")] == [expected["eval_loss"], expected["eval_kd"]]
    assert done.trainer.args.output_dir == str(tmp_path)


def test_a_stage_can_be_added_to_a_finished_run(tmp_path):
    longer = (*STAGES, Stage("domain", training={"max_steps": 2}))
    whole = run(tmp_path / "whole", stages=longer)
    run(tmp_path / "two")
    done, steps = resumed(tmp_path / "two", stages=longer)
    assert steps == {"3-domain": 2}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_the_students_object_is_trained_and_handed_on_in_memory(tmp_path):
    model = bert(2)
    assert run(tmp_path, model=model).trainer.model is model


def test_a_stage_under_autocast_leaves_nothing_on_the_student(tmp_path):
    stages = (Stage("half", training={"bf16": True}), Stage("full"))
    model = bert(2)
    own = model.forward
    whole = run(tmp_path / "whole", stages=stages, model=model)
    assert model.forward == own
    interrupted(tmp_path / "cut", "2-full", 0, stages=stages)
    done, steps = resumed(tmp_path / "cut", stages=stages)
    assert steps == {"2-full": STEPS}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_precision_and_metric_are_those_of_the_stage_whatever_another_asks(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            precision = AcceleratorState().mixed_precision
            seen[Path(args.output_dir).name] = precision, args.greater_is_better

    plan = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    stages = (
        Stage("half", training={"bf16": True}),
        Stage("full", training={"metric_for_best_model": "eval_agreement"}),
    )
    run(tmp_path, stages=stages, callbacks=[Watch()], eval_dataset=tiny.rows("sequence"), plan=plan)
    assert seen == {"1-half": ("bf16", False), "2-full": ("no", True)}


def test_the_best_student_of_a_stage_is_the_one_that_goes_on(tmp_path):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_kd",
        "greater_is_better": True,  # so that the best is an early one
    }
    data = tiny.rows("sequence")
    run(tmp_path, stages=(Stage("kd", training={**KD, **best}), Stage("task", training=TASK)), eval_dataset=data)
    first, second = lineage(tmp_path)["stages"]
    assert first["best_step"] < STEPS
    best_saved = hf.BertForSequenceClassification.from_pretrained(
        tmp_path / "_stages" / "1-kd" / f"checkpoint-{first['best_step']}"
    )
    saved = hf.BertForSequenceClassification.from_pretrained(tmp_path / "_stages" / "1-kd")
    assert_same_bits(saved, weights(best_saved))
    assert second["student"]["before"]["weights"] == first["student"]["after"]["weights"]


def test_early_stopping_counts_anew_in_every_stage(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    stages = (Stage("one", training=best), Stage("two", training=best))
    run(tmp_path, stages=stages, callbacks=[stopping], eval_dataset=tiny.rows("sequence"))
    assert [stage["steps"] for stage in lineage(tmp_path)["stages"]] == [3, 3]


def chain(assistant, student):
    return (Stage("assistant", student=assistant), Stage("student", student=student, teacher="previous"))


@pytest.mark.parametrize("kind", ["models", "functions", "names"])
def test_in_a_chain_the_assistant_learns_from_the_teacher_and_teaches_the_student(kind, tmp_path):
    def stages():
        if kind == "functions":
            return chain(lambda _: with_dropout(tiny.bert(layers=2)), lambda _: with_dropout(tiny.bert(layers=1)))
        models = bert(2, seed=5), bert(1, seed=6)
        if kind == "models":
            return chain(*models)
        for layers, model in zip((2, 1), models, strict=True):
            model.save_pretrained(tmp_path / f"bert-{layers}")
        return chain(str(tmp_path / "bert-2"), tmp_path / "bert-1")

    teacher = tiny.pair("bert")[1]
    before = weights(teacher)
    whole = run_stages(
        stages(),
        args=arguments(tmp_path / "whole", **PLAN),
        teacher_model=teacher,
        train_dataset=tiny.rows("sequence"),
    )
    assert_same_bits(teacher, before)
    assistant, student = lineage(tmp_path / "whole")["stages"]
    depths = [s["class"] for s in (assistant["teacher"], student["teacher"])], whole.trainer.model.config
    assert depths[1].num_hidden_layers == 1
    assert whole.trainer.teacher.model.config.num_hidden_layers == 2
    assert assistant["teacher"]["origin"] == "run"
    assert student["teacher"]["origin"] == "previous"
    assert student["teacher"]["weights"] == assistant["student"]["after"]["weights"]
    assert student["student"]["origin"] == "own"
    options = {"teacher_model": teacher, "train_dataset": tiny.rows("sequence")}
    with pytest.raises(Stop):
        run_stages(
            stages(), args=arguments(tmp_path / "cut", **PLAN), callbacks=[Interrupt("2-student", 2)], **options
        )
    done = run_stages(stages(), args=arguments(tmp_path / "cut", **PLAN), resume=True, **options)
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_a_function_makes_the_next_student_of_the_one_before(tmp_path):
    stages = (Stage("one", training=KD), Stage("again", student=copy.deepcopy, teacher="previous"))
    model = bert(2)
    done = run(tmp_path, stages=stages, model=model)
    first, second = lineage(tmp_path)["stages"]
    assert done.trainer.model is not model
    assert second["student"]["before"]["weights"] == first["student"]["after"]["weights"]
    assert second["teacher"]["weights"] == first["student"]["after"]["weights"]


def test_stages_name_their_data_and_bring_their_trainers_arguments(tmp_path):
    general = datasets.Dataset.from_list(values(tiny.rows("sequence", seed=1)))
    task = datasets.Dataset.from_list(values(tiny.rows("sequence", count=6, seed=2)))
    stages = (
        Stage("general", train_dataset="general", trainer_kwargs={"eval_dataset": task}),
        Stage("task", train_dataset="task"),
        Stage("domain", train_dataset=tiny.rows("sequence", count=4), training={"eval_strategy": "no"}),
    )
    done = run(tmp_path, stages=stages, train_dataset=datasets.DatasetDict(general=general, task=task))
    found = [stage["data"] for stage in lineage(tmp_path)["stages"]]
    assert found == [
        {"rows": 8, "fingerprint": general._fingerprint},
        {"rows": 6, "fingerprint": task._fingerprint},
        {"rows": 4, "fingerprint": None},
    ]
    assert done.trainer.eval_dataset is None


def test_a_teacher_by_name_is_loaded_once(tmp_path, monkeypatch):
    tiny.pair("bert")[1].save_pretrained(tmp_path / "teacher")
    loaded = []
    load = hf.BertForSequenceClassification.from_pretrained.__func__

    def counting(cls, name, *args, **kwargs):
        loaded.append(Path(name).name)
        return load(cls, name, *args, **kwargs)

    monkeypatch.setattr(hf.BertForSequenceClassification, "from_pretrained", classmethod(counting))
    by_name = run(tmp_path / "name", teacher_model=str(tmp_path / "teacher"))
    assert loaded.count("teacher") == 1
    assert_same_bits(by_name.trainer.model, weights(run(tmp_path / "module").trainer.model))
    assert lineage(tmp_path / "name")["stages"][1]["teacher"]["name"] == "teacher"


def test_a_stage_without_a_teachers_term_needs_no_teacher(tmp_path):
    done = run(tmp_path, stages=[Stage("task", training=TASK)], teacher_model=None)
    assert done.trainer.teacher is None
    assert lineage(tmp_path)["stages"][0]["teacher"] is None


def adapted_llama():
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(with_dropout(tiny.llama()), config)


def test_an_adapter_goes_through_the_stages_and_its_base_teaches(tmp_path):
    options = {"teacher_model": None, "train_dataset": tiny.rows("causal")}
    whole = run(tmp_path / "whole", model=adapted_llama(), **options)
    interrupted(tmp_path / "cut", "2-task", 3, model=adapted_llama(), **options)
    done, steps = resumed(tmp_path / "cut", model=adapted_llama(), **options)
    assert steps == {"2-task": 5}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))
    assert {p.name for p in (tmp_path / "whole").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert any(p.requires_grad for p in done.trainer.model.parameters())
    assert lineage(tmp_path / "cut")["stages"][0]["teacher"] == {"origin": "the student with its adapters off"}


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_students_with_experts_and_with_tied_weights_come_back(name, tmp_path):
    make, kind = (tiny.mixtral, "causal") if name == "mixtral" else (tiny.t5, "translation")

    def once(folder, **options):
        torch.manual_seed(0)
        return run(folder, model=make(), teacher_model=make(layers=3), train_dataset=tiny.rows(kind), **options)

    whole = once(tmp_path / "whole")
    with pytest.raises(Stop):
        once(tmp_path / "cut", callbacks=[Interrupt("2-task", 0)])
    done = once(tmp_path / "cut", resume=True)
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_a_model_that_is_none_of_transformers_comes_back(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert(2)
            self.config, self.loss_type = self.inner.config, "ForSequenceClassification"

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    stages = (Stage("one", training=TASK), Stage("two", training=TASK))
    whole = run(tmp_path / "whole", stages=stages, model=Wrapped(), teacher_model=None)
    interrupted(tmp_path / "cut", "2-two", 0, stages=stages, model=Wrapped(), teacher_model=None)
    done, _ = resumed(tmp_path / "cut", stages=stages, model=Wrapped(), teacher_model=None)
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_the_sequence_to_sequence_trainer_runs_stages(tmp_path):
    args = arguments(tmp_path, Seq2SeqDistillationTrainingArguments, predict_with_generate=True)
    student, teacher = tiny.pair("t5")
    done = run(
        tmp_path,
        args=args,
        model=student,
        teacher_model=teacher,
        train_dataset=tiny.rows("translation"),
        trainer_cls=Seq2SeqDistillationTrainer,
    )
    assert isinstance(done.trainer, Seq2SeqDistillationTrainer)
    assert done.trainer.args.predict_with_generate
