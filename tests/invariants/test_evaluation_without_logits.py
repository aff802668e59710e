"""An evaluation of a language model from its hidden states has the metrics of the evaluation from its logits."""

import peft
import pytest
import torch
import transformers as hf

from tests.invariants.objective_cases import EXACT_TEMPERATURES, WEIGHTS, weighted_rows
from tests.invariants.steps import longer, without_labels
from tests.invariants.test_without_logits import HEADS, Largest
from tests.tiny import ZOO, llama, mixtral, pair, rows
from tests.training import logged, make_trainer

OPTIONS = [
    {},
    {"task_weight": 0.0, "kd_loss": "dkd"},
    {"kd_loss": "jsd", "temperature": 1.0},
    # At higher temperatures rounding alone is 1e-5 of a KL this small, times T squared.
    {"temperature": {"policy": "adaptive", "signal": "disagreement", "min": 0.5, "max": 3}},
    {"logit_transform": "standardize", "teacher_scale": 0.7},
    {"temperature": EXACT_TEMPERATURES["linear"], "distillation_config": {"logits": {"temperature_squared": False}}},
]


def evaluated(trainer, monkeypatch, *, chunked, **options):
    """The metrics of an evaluation, with a check of which way they were formed."""
    ways = []
    method = trainer._chunked_values
    monkeypatch.setattr(trainer, "_chunked_values", lambda *args: ways.append(1) or method(*args))
    if chunked is None:
        monkeypatch.setattr(trainer, "_can_be_chunked", lambda *_, **__: False)
    metrics = trainer.evaluate(**options)
    assert bool(ways) == bool(chunked)
    return {name: value for name, value in metrics.items() if not name.endswith(("second", "runtime", "time"))}


def assert_same_metrics(make, monkeypatch, *names):
    """Both ways agree; the names must be among the metrics."""
    found, expected = (evaluated(make(), monkeypatch, chunked=way) for way in (True, None))
    assert {*names} <= {*expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)


ALL = ("eval_loss", "eval_kd", "eval_agreement")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in HEADS
        for options in (OPTIONS if name in ("llama", "t5", "bert-masked") else OPTIONS[:1])
    ],
    ids=str,
)
def test_the_metrics_are_those_of_the_logits(name, options, tmp_path, monkeypatch):
    data = rows(ZOO[name][1], count=7)
    data = longer([without_labels(row) if place in (2, 3) else row for place, row in enumerate(data)], ZOO[name][1])

    def make():
        return make_trainer(tmp_path, name, eval_dataset=data, per_device_eval_batch_size=2, **options)

    assert_same_metrics(make, monkeypatch, *ALL)


def test_batches_of_another_size_than_the_trainings_are_evaluated(tmp_path, monkeypatch):
    def make():
        # Without the task's weight the training has not looked at the model's own loss: the evaluation does.
        options = {"task_weight": 0.0, "kd_weight": 1.0, "per_device_eval_batch_size": 2}
        trainer = make_trainer(tmp_path, "llama", eval_dataset=rows("causal", 6), **options)
        trainer.train()
        return trainer

    assert_same_metrics(make, monkeypatch, *ALL)


@pytest.mark.parametrize("loss", ["forward_kl", "dkd"])
@pytest.mark.parametrize("name", ["llama", "bert-masked"])
def test_unlabelled_text_has_the_teachers_metrics(name, loss, tmp_path, monkeypatch):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(ZOO[name][1])]

    def make():
        return make_trainer(tmp_path, name, eval_dataset=data, kd_loss=loss)

    assert_same_metrics(make, monkeypatch, "eval_kd", "eval_agreement")
    assert "eval_loss" not in make().evaluate()


@pytest.mark.parametrize("others", [[], WEIGHTS["confidence"]], ids=["alone", "beside the teacher's confidence"])
def test_groups_of_rows_have_their_losses(others, tmp_path, monkeypatch):
    data = weighted_rows("llama")
    weights = [{"by": "group", "column": "language", "follow": "loss"}, *others]

    def make():
        options = {"item_weights": weights, "eval_strategy": "steps", "eval_steps": 1}
        return make_trainer(tmp_path, "llama", train_dataset=data, eval_dataset=data, **options)

    assert_same_metrics(make, monkeypatch, *ALL, "eval_loss_en", "eval_loss_de")


def test_an_evaluation_in_a_training_leaves_it_its_hooks_and_its_steps(tmp_path):
    def train(**options):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, "llama", logging_steps=1, **options)
        dense, method = [], trainer._dense_shares
        trainer._dense_shares = lambda *args, **keywords: dense.append(1) or method(*args, **keywords)
        trainer.train()
        assert not dense
        assert not trainer.model.lm_head._forward_hooks
        return trainer

    plain, evaluating = train(), train(eval_on_start=True, eval_strategy="steps", eval_steps=1)
    assert logged(evaluating, "loss") == logged(plain, "loss")
    assert logged(evaluating, "eval_kd")[-1] == pytest.approx(evaluating.evaluate()["eval_kd"], rel=1e-6)
    assert not evaluating.model.lm_head._forward_hooks


def test_logits_that_somebody_reads_are_formed(tmp_path, monkeypatch):
    def accuracy(prediction):
        assert prediction.predictions.shape == (8, 12, 97)
        return {"rows": len(prediction.predictions)}

    expected = evaluated(make_trainer(tmp_path, "llama"), monkeypatch, chunked=True)
    trainer = make_trainer(tmp_path, "llama", compute_metrics=accuracy)
    found = evaluated(trainer, monkeypatch, chunked=False)
    assert found.pop("eval_rows") == 8
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs["logits"].square().mean()},
        {"temperature": "flsw"},
        {"temperature": "learned"},
        {"fp16_full_eval": True},
    ],
    ids=["smoothing", "a loss of one's own", "flsw", "learned", "float16"],
)
def test_what_needs_all_logits_at_once_forms_them(options, tmp_path, monkeypatch):
    metrics = evaluated(make_trainer(tmp_path, "llama", **options), monkeypatch, chunked=False)
    assert {*ALL} <= {*metrics}


def test_a_loss_with_more_than_the_cross_entropy_keeps_the_logits(tmp_path, monkeypatch):
    def make():
        return make_trainer(tmp_path, "llama", models=(mixtral(), pair("llama")[1]))

    found, expected = (evaluated(make(), monkeypatch, chunked=way) for way in (False, None))
    assert found == pytest.approx(expected, rel=1e-6)


class Fickle(hf.LlamaForCausalLM):
    """Runs its head on a few batches only."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        if len(input_ids) < 4:
            hidden = self.model(input_ids).last_hidden_state
            logits = hidden @ self.lm_head.weight.T
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
            return hf.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def test_a_forward_that_goes_another_way_to_its_logits_is_evaluated_by_these(tmp_path, monkeypatch):
    def make():
        student = Fickle(llama().config)
        student.load_state_dict(llama().state_dict())
        data = [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows("causal", count=6)]
        return make_trainer(tmp_path, "llama", models=(student, pair("llama")[1]), eval_dataset=data)

    assert_same_metrics(make, monkeypatch, *ALL)


def test_a_student_with_adapters_is_compared_with_its_own_base(tmp_path, monkeypatch):
    def make():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        return make_trainer(tmp_path, "llama", models=(peft.get_peft_model(llama(), config), None))

    assert_same_metrics(make, monkeypatch, *ALL)


@pytest.mark.parametrize("name", ["llama", "t5", "bert-masked"])
def test_no_tensor_of_tokens_by_vocabulary_is_made(name, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.losses.chunked_head._SMALLEST_CHUNK", 4)
    monkeypatch.setattr("hf_distill.losses.chunked_head._CPU_CHUNK_BYTES", 1)
    trainer = make_trainer(tmp_path, name, per_device_eval_batch_size=8)
    with Largest() as largest:
        trainer.evaluate()
    tokens = sum(row["labels"].numel() for row in rows(ZOO[name][1]))
    assert 0 < largest.rows < tokens


def test_a_loss_that_is_looked_at_outside_an_evaluation_has_its_graph(tmp_path):
    trainer = make_trainer(tmp_path, "llama")
    with trainer._chunked.attached(trainer.model):
        batch = next(iter(trainer.get_eval_dataloader()))
        loss = trainer.compute_loss(trainer.model.eval(), batch)
    loss.backward()
    assert trainer.model.lm_head.weight.grad.norm() > 0


@pytest.mark.slow
def test_a_compiled_student_is_evaluated_alike(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "llama", torch_compile=True, torch_compile_backend="eager")
    for train in (lambda: None, trainer.train):
        train()
        with monkeypatch.context() as patch:
            found, expected = (evaluated(trainer, patch, chunked=way) for way in (True, None))
        assert {*ALL} <= {*expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=2e-6)
