"""Students made anew: `model_init`, hyperparameter searches, and batches halved until they fit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tests.tiny import bert, llama, pair, rows
from tests.training import logged, losses, make_trainer


@pytest.fixture
def optuna():
    """The library, saying nothing."""
    library = pytest.importorskip("optuna", reason="a search needs the extra hpo")
    library.logging.set_verbosity(library.logging.CRITICAL)
    return library


def made_by_init(folder, init=None, **options):
    """A trainer whose student comes from `model_init`."""
    init = init or (lambda: pair("bert")[0])
    return make_trainer(folder, models=(None, pair("bert")[1]), model_init=init, **options)


def test_model_init_makes_a_fresh_student_for_every_training(tmp_path):
    trainer = made_by_init(tmp_path, learning_rate=0.01)
    first = trainer.model
    before = losses(trainer)
    assert losses(trainer) == pytest.approx(before, rel=1e-7)
    assert trainer.model is not first
    assert before == pytest.approx(losses(make_trainer(tmp_path, learning_rate=0.01)), rel=1e-7)


def test_every_fresh_student_is_paired_with_the_teacher_anew(tmp_path):
    order = [{0: "a", 1: "b", 2: "c"}, {0: "c", 1: "a", 2: "b"}]
    made = []

    def init():
        student = pair("bert")[0]
        labels = order[min(len(made), 1)]
        student.config.id2label, student.config.label2id = labels, {name: i for i, name in labels.items()}
        made.append(labels)
        return student

    teacher = pair("bert")[1]
    teacher.config.id2label, teacher.config.label2id = order[0], {name: i for i, name in order[0].items()}
    trainer = make_trainer(tmp_path, models=(None, teacher), model_init=init, max_steps=1, task_weight=0.0)
    kd = trainer.evaluate()["eval_kd"]
    trainer.train()
    assert made == order
    permuted = make_trainer(tmp_path, max_steps=1, task_weight=0.0)
    with torch.no_grad():
        weight, bias = permuted.teacher.model.classifier.weight, permuted.teacher.model.classifier.bias
        weight.copy_(weight[[2, 0, 1]])
        bias.copy_(bias[[2, 0, 1]])
    assert losses(trainer) == pytest.approx(losses(permuted), rel=1e-6)
    assert kd != pytest.approx(permuted.evaluate()["eval_kd"], rel=1e-4)


def test_a_fresh_student_that_does_not_fit_the_teacher_is_refused(tmp_path):
    students = iter([bert(), bert(num_labels=4)])
    trainer = made_by_init(tmp_path, init=lambda: next(students))
    with pytest.raises(ValueError, match="label sets differ"):
        trainer.train()


def test_the_adapter_off_teacher_follows_a_fresh_student(tmp_path):
    def init():
        torch.manual_seed(3)
        return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))

    data = rows("causal")
    trainer = make_trainer(
        tmp_path, "llama", models=(None, None), model_init=init, train_dataset=data, learning_rate=0.1, max_steps=3
    )
    for _ in range(2):
        trainer.train()
        assert trainer.teacher.model is trainer.model.get_base_model()
        first, *later = logged(trainer, "loss_kd")
        assert first == pytest.approx(0, abs=1e-6)
        assert max(later) > 1e-6


def test_a_search_tries_temperatures_and_weights_and_goes_by_the_evaluation_loss(optuna, tmp_path):
    trials = [
        {"temperature": 1.0, "kd_weight": 0.1},
        {"temperature": 4.0, "kd_weight": 2.0},
        {"temperature": 8.0, "kd_weight": 0.5},
    ]
    seen = []

    class Watcher(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                expected = 0.5 * logs["loss_task"] + args.kd_weight * logs["loss_kd"]
                seen.append((logs["temperature"], args.kd_weight, logs["loss"] == pytest.approx(expected, rel=1e-5)))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    def space(trial):
        return {
            "temperature": trial.suggest_float("temperature", 1.0, 8.0),
            "kd_weight": trial.suggest_float("kd_weight", 0.1, 2.0),
        }

    study = {"sampler": optuna.samplers.RandomSampler(seed=0)}
    trainer = made_by_init(
        tmp_path, callbacks=[Watcher()], max_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.05
    )
    fixed = iter(trials)

    def enqueued(trial):
        trial.study.enqueue_trial(next(fixed, trials[-1]))
        return space(trial)

    best = trainer.hyperparameter_search(enqueued, n_trials=3, direction="minimize", backend="optuna", **study)
    logs = [entry for entry in seen if isinstance(entry, tuple)]
    objectives = [entry for entry in seen if isinstance(entry, float)]
    assert [entry[:2] for entry in logs][1:] == [(1.0, 0.1), (4.0, 2.0)], "the first trial is drawn at random"
    assert len({*logs}) == 3
    assert all(weighted for *_, weighted in logs)
    assert best.objective == min(objectives) < max(objectives)


def test_a_search_goes_by_another_objective_if_asked(optuna, tmp_path):
    trainer = made_by_init(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    best = trainer.hyperparameter_search(
        lambda trial: {"kd_weight": trial.suggest_float("kd_weight", 0.1, 2.0)},
        lambda metrics: metrics["eval_kd"],
        n_trials=1,
        backend="optuna",
    )
    assert best.objective == logged(trainer, "eval_kd")[-1]


def test_a_search_that_leaves_the_allowed_range_is_stopped_before_a_step(optuna, tmp_path):
    trainer = made_by_init(tmp_path)
    with pytest.raises(ValueError, match=r"temperature=-1\.0.*positive"):
        trainer.hyperparameter_search(
            lambda trial: {"temperature": trial.suggest_float("temperature", -1.0, -1.0)}, n_trials=1, backend="optuna"
        )
    assert trainer.state.global_step == 0


def test_batches_are_made_smaller_until_they_fit_and_nothing_of_a_failed_try_is_logged(tmp_path):
    student, teacher = pair("bert")
    calls = []

    def out_of_memory(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 4 and len(calls) > 1:  # in the second step of the first try
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    teacher.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    trainer = make_trainer(
        tmp_path,
        models=(student, teacher),
        train_dataset=rows("sequence", 24),
        per_device_train_batch_size=6,
        auto_find_batch_size=True,
        max_steps=3,
        logging_steps=3,
        learning_rate=0.0,
    )
    trainer.train()
    size = calls[-1]
    assert calls[0] == 6
    assert size <= 4
    expected = make_trainer(
        tmp_path,
        train_dataset=rows("sequence", 24),
        per_device_train_batch_size=size,
        max_steps=3,
        logging_steps=3,
        learning_rate=0.0,
    )
    expected.train()
    for name in ("loss", "loss_kd", "loss_task", "labelled_fraction"):
        assert logged(trainer, name) == pytest.approx(logged(expected, name), rel=1e-6), name
