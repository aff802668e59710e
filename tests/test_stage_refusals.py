"""What a run of stages refuses before its first step, and what it writes down."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from hf_distill import DistillationConfig, publishing
from hf_distill.lineage import Lineage
from hf_distill.models.fingerprint import weights_fingerprint
from hf_distill.stages import Stage, preset_stages, run_stages
from tests import tiny
from tests.processes import run_twice
from tests.test_stages import (
    KD,
    PLAN,
    STAGES,
    TASK,
    Interrupt,
    assert_same_bits,
    bert,
    interrupted,
    lineage,
    resumed,
    run,
    weights,
)
from tests.training import arguments

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {"matches": [{"name": "hidden", "student": "hidden[*]", "map": "uniform", "loss": "hidden_mse"}]}


def refused(folder, stages, match, error=ValueError, **options):
    counter = Interrupt()
    with pytest.raises(error, match=match):
        run(folder, stages=stages, callbacks=[counter], **options)
    assert counter.steps == {}
    assert not Path(folder, "lineage.json").exists()


FIRST = Stage("first")
TWO = {"general": tiny.rows("sequence"), "task": tiny.rows("sequence")}
REFUSED = {
    "no stages": ((), "no stages to run", {}),
    "one name twice": ((FIRST, FIRST), "Several stages are called first", {}),
    "an unknown argument": (
        (FIRST, Stage("b", training={"learning_rte": 1})),
        "'learning_rte'.*mean learning_rate",
        {},
    ),
    "an argument of the run": (
        (FIRST, Stage("b", training={"output_dir": "x"})),
        "sets output_dir, which the whole",
        {},
    ),
    "a token": ((FIRST, Stage("b", training={"hub_token": "x"})), "sets hub_token, which the whole run shares", {}),
    "a wrong value": ((FIRST, Stage("b", training={"temperature": -1})), "Stage 'b': temperature=-1", {}),
    "a wrong recipe": ((FIRST, Stage("b", distillation={"taks": {}})), "Stage 'b': .*taks", {}),
    "a layer that is not there": (
        (FIRST, Stage("b", distillation={"matches": [{**HIDDEN["matches"][0], "student": "hidden[7]"}]})),
        "Stage 'b': .*7",
        {},
    ),
    "an argument nobody reads": (
        (Stage("a", HIDDEN),),
        "args sets temperature, but every stage",
        {"temperature": 4.0},
    ),
    "an unknown data set": (
        (Stage("a", train_dataset="domain"),),
        "'domain', but train_dataset has general, task",
        TWO,
    ),
    "no choice of several data sets": ((FIRST,), "trains on None, but train_dataset has general, task", TWO),
    "a key where there is one": ((Stage("a", train_dataset="task"),), "but train_dataset is one data set", {}),
    "no first student of a stage before": (
        (Stage("a", student=bert(1), teacher="previous"),),
        "'a' is the first: no student",
        {},
    ),
    "a function that makes no model": ((Stage("a", student=lambda _: None),), "'a'.*NoneType, expected a model", {}),
    "an optimizer for all": ((Stage("a", trainer_kwargs={"optimizers": (None, None)}),), "gets optimizers as", {}),
    "an unknown argument of the trainer": ((Stage("a", trainer_kwargs={"tokenizer": 1}),), "processing_class", {}),
}


@pytest.mark.parametrize("case", [*REFUSED])
def test_what_cannot_work_in_any_stage_is_refused_before_the_first_step(case, tmp_path):
    stages, match, options = REFUSED[case]
    error = (
        TypeError if case in ("an unknown argument of the trainer", "a function that makes no model") else ValueError
    )
    options = {"train_dataset": options} if options is TWO else {"plan": options}
    refused(tmp_path, stages, match, error, **options)
    run(tmp_path)  # and what is refused leaves the folder free


def test_a_name_that_is_no_folders_is_refused():
    with pytest.raises(ValueError, match="'a/b', but a folder"):
        Stage("a/b")


def test_a_student_cannot_teach_itself():
    with pytest.raises(ValueError, match="as teacher and as student"):
        Stage("again", teacher="previous")


def test_a_run_needs_a_student_and_a_teacher_where_a_term_asks_one(tmp_path):
    stages = (Stage("task", training=TASK), Stage("kd", training=KD))
    refused(tmp_path, stages, "Stage 'kd': kd_weight=1.0, but there is no teacher", teacher_model=None)
    with pytest.raises(ValueError, match="'task' has no student"):
        run_stages(stages, args=arguments(tmp_path, **PLAN), train_dataset=tiny.rows("sequence"))


def test_something_that_is_no_stage_is_refused(tmp_path):
    refused(tmp_path, ({"name": "a"},), "a dict, expected a Stage", TypeError)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="Pass resume=True to go on"):
        run(tmp_path)
    (tmp_path / "lineage.json").unlink()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"lineage.json is gone: take another output_dir, or delete"):
            run(tmp_path, resume=resume)


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        (
            (Stage("kd", training={**KD, "learning_rate": 1.0}), STAGES[1]),
            r"stage 1 \(kd\) has learning_rate=0.003 th",
        ),
        ((Stage("kd", training={**KD, "temperature": 9}), STAGES[1]), r"stage 1 \(kd\) has distillation=.*9"),
        ((Stage("other", training=KD), STAGES[1]), r"has name='kd' there, here 'other'"),
        ((Stage("kd", training=KD, teacher=bert(1)), STAGES[1]), "has teacher='run' there, here 'own'"),
        (STAGES[:1], r"stage 2 \(task\) is missing here"),
    ],
)
def test_a_run_of_other_stages_is_not_gone_on_with(stages, match, tmp_path):
    interrupted(tmp_path, "2-task", 2)
    before = (tmp_path / "lineage.json").read_bytes()
    with pytest.raises(ValueError, match=match):
        run(tmp_path, stages=stages, resume=True)
    assert (tmp_path / "lineage.json").read_bytes() == before


def test_a_stage_that_did_not_begin_may_change(tmp_path):
    interrupted(tmp_path, "1-kd", 2)
    _, steps = resumed(tmp_path, stages=(STAGES[0], Stage("other", training={"max_steps": 1})))
    assert steps == {"1-kd": 2, "2-other": 1}


def test_another_teacher_is_refused_in_the_middle_of_a_stage(tmp_path):
    interrupted(tmp_path, "1-kd", 2)
    with pytest.raises(ValueError, match=r"Stage 1 \(kd\) began with a teacher of weights"):
        run(tmp_path, resume=True, teacher_model=bert(3, seed=9))


def test_other_data_in_the_middle_of_a_stage_is_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_distill.stage_runner.logger.warning", said.append)
    interrupted(tmp_path, "1-kd", 2)
    resumed(tmp_path, train_dataset=tiny.rows("sequence", count=10))
    assert len(said) == 1
    assert "'rows': 8" in said[0]
    assert "'rows': 10" in said[0]


def test_a_saved_student_that_was_changed_is_refused(tmp_path):
    interrupted(tmp_path, "2-task", 2)
    bert(2, seed=3).save_pretrained(tmp_path / "_stages" / "1-kd")
    with pytest.raises(ValueError, match="the lineage says that the stage ended with"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99, "stages": []}'])
def test_a_lineage_that_cannot_be_read_is_refused(content, tmp_path):
    (tmp_path / "lineage.json").write_text(content)
    with pytest.raises(ValueError, match=r"no lineage of a run of stages|has format 99, this version reads 1"):
        Lineage(tmp_path, writes=True).read()


@pytest.mark.parametrize(
    ("name", "missing"), [("trainer_state.json", "no trainer_state.json"), ("model.safetensors", "no weights")]
)
def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(name, missing, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_distill.checkpoints.logger.warning", said.append)
    whole = run(tmp_path / "whole")
    interrupted(tmp_path / "cut", "1-kd", 3)
    cut = tmp_path / "cut" / "_stages" / "1-kd" / "checkpoint-3"
    (cut / name).unlink()
    (cut.parent / "checkpoint-2-copied").mkdir()
    done, steps = resumed(tmp_path / "cut")
    assert said == [f"Passed over, as cut off while it was saved or removed: {cut} ({missing})."]
    assert steps["1-kd"] == 2
    assert lineage(tmp_path / "cut")["stages"][0]["resumed_at_steps"] == [2]
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_of_a_stage_is_named_with_its_remedy(name, tmp_path):
    interrupted(tmp_path, "2-task", 3)
    damaged = tmp_path / "_stages" / "2-task" / "checkpoint-3" / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is damaged \(") as error:
        run(tmp_path, resume=True)
    assert str(error.value).startswith(f"{damaged} is damaged (")
    assert str(error.value).endswith(f"Delete {damaged.parent} to go on from the checkpoint before it.")


def test_a_damaged_student_of_a_finished_stage_is_named(tmp_path):
    interrupted(tmp_path, "2-task", 3)
    damaged = tmp_path / "_stages" / "1-kd" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match="Begin in another output_dir") as error:
        run(tmp_path, resume=True)
    assert str(error.value).startswith(f"{damaged} is damaged (")


def test_without_an_optimizer_in_its_checkpoints_a_stage_begins_again(tmp_path):
    plan = {"save_only_model": True}
    whole = run(tmp_path / "whole", plan=plan)
    interrupted(tmp_path / "cut", "1-kd", 3, plan=plan)
    done, steps = resumed(tmp_path / "cut", plan=plan)
    assert steps["1-kd"] == 4
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_the_lineage_says_what_each_stage_was_and_nothing_that_is_secret_or_of_this_machine(tmp_path):
    bert(3, seed=4).save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "run"
    interrupted(folder, "2-task", 3, teacher_model=str(tmp_path / "teacher"), plan={"hub_token": "hf_secret"})
    done, _ = resumed(folder, teacher_model=str(tmp_path / "teacher"), plan={"hub_token": "hf_secret"})
    text = (folder / "lineage.json").read_text()
    assert "hf_secret" not in text
    assert str(tmp_path) not in text
    assert json.loads(text) == done.lineage
    kd, task = done.lineage["stages"]
    assert (kd["number"], kd["name"], kd["status"], kd["folder"]) == (1, "kd", "finished", "_stages/1-kd")
    assert (kd["asked"]["learning_rate"], task["asked"]["learning_rate"]) == (3e-3, 1e-3)
    assert DistillationConfig.from_dict(kd["asked"]["distillation"]).logits.weight == 1.0
    assert kd["teacher"]["name"] == "teacher"
    assert kd["teacher"]["weights"] == weights_fingerprint(
        hf.BertForSequenceClassification.from_pretrained(tmp_path / "teacher")
    )
    assert kd["student"]["before"]["weights"] == weights_fingerprint(bert(2))
    assert kd["student"]["after"] == task["student"]["before"]
    assert task["student"]["after"]["weights"] == weights_fingerprint(done.trainer.model)
    assert (kd["steps"], task["steps"]) == (4, 8)
    assert (kd["resumed_at_steps"], task["resumed_at_steps"]) == ([], [3])
    assert task["metrics"]["train_loss"] == done.metrics["task"]["train_loss"] > 0
    assert {"hf-distill", "transformers", "torch"} <= {*task["versions"]}
    assert kd["began"] <= kd["ended"] <= task["began"] <= task["ended"]
    assert not (folder / "_lineage.json").exists()


def test_a_fingerprint_tells_weights_apart_by_values_names_and_types():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 50) for _ in range(3)]
    layers[1].load_state_dict(layers[0].state_dict())
    first, equal, other = map(weights_fingerprint, layers)
    assert first == equal != other
    assert weights_fingerprint(layers[1].half()) != first
    assert weights_fingerprint(torch.nn.Sequential(layers[0])) != first
    with torch.no_grad():
        layers[0].weight += 1e-6
    assert weights_fingerprint(layers[0]) != first


def test_a_preset_runs_with_its_stages_epochs_and_rates(tmp_path):
    intermediate, prediction = preset_stages("tinybert")
    args = arguments(tmp_path, per_device_train_batch_size=8)
    done = run("", stages="tinybert", args=args)
    first, second = done.lineage["stages"]
    for entry, stage in ((first, intermediate), (second, prediction)):
        assert entry["name"] == stage.name
        assert entry["epochs"] == stage.training["num_train_epochs"]
        assert entry["asked"]["learning_rate"] == stage.training["learning_rate"]
        assert DistillationConfig.from_dict(entry["asked"]["distillation"]) == stage.distillation
    saved = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert_same_bits(saved, weights(done.trainer.model))


def test_a_stages_recipe_takes_the_place_of_what_the_run_asks(tmp_path):
    stages = (Stage("layers", distillation=HIDDEN), Stage("logits"))
    layers, logits = run(tmp_path, stages=stages, plan={"temperature": 4.0}).lineage["stages"]
    assert layers["asked"]["distillation"]["task"]["weight"] == 0
    assert logits["asked"]["distillation"]["logits"]["temperature"] == 4
    assert "matches" not in logits["asked"]["distillation"]


def test_a_stage_with_layer_terms_goes_on_in_the_middle_with_the_same_bits(tmp_path):
    stages = (Stage("layers", distillation=HIDDEN), Stage("logits"))
    whole = run(tmp_path / "whole", stages=stages)
    interrupted(tmp_path / "cut", "1-layers", 2, stages=stages)
    done, steps = resumed(tmp_path / "cut", stages=stages)
    assert steps == {"1-layers": 2, "2-logits": 4}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))


def test_only_the_last_student_is_pushed_to_the_hub(tmp_path, monkeypatch):
    made, pushed = [], []
    monkeypatch.setattr(hf.Trainer, "init_hf_repo", lambda trainer, *_, **__: made.append(trainer.args.output_dir))
    monkeypatch.setattr(publishing.HfApi, "auth_check", lambda *_, **__: None)
    monkeypatch.setattr(hf.Trainer, "push_to_hub", lambda trainer, **_: pushed.append(trainer.args.output_dir))
    run(tmp_path, plan={"push_to_hub": True})
    assert made == pushed == [str(tmp_path)]


def of_two_processes(folder):
    """What each of two processes does: a run, one that is cut off in its second stage, and going on with it."""
    plan = {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    whole = run(Path(folder, "whole"), plan=plan)
    interrupted(Path(folder, "cut"), "2-task", 3, plan=plan)
    done, steps = resumed(Path(folder, "cut"), plan=plan)
    assert steps == {"2-task": 5}
    assert_same_bits(done.trainer.model, weights(whole.trainer.model))
    Path(folder, f"rank-{torch.distributed.get_rank()}").touch()


@pytest.mark.slow
def test_two_processes_run_stages_and_go_on_with_them(tmp_path):
    run_twice(of_two_processes, tmp_path)
    assert (tmp_path / "rank-0").exists()
    assert (tmp_path / "rank-1").exists()
    assert [stage["processes"] for stage in lineage(tmp_path / "cut")["stages"]] == [2, 2]
