"""Trainings with terms between layers: one after another, interrupted, looked at from outside; and their maps."""

import dataclasses

import pytest
import torch

from hf_distill.features import Feature
from hf_distill.layer_mapping import ordered_argmin, transport
from hf_distill.matching.terms import _head_mean
from hf_distill.models.capture import Capture
from hf_distill.signals import Scores
from tests import tiny
from tests.test_layer_refusals import HIDDEN, LogitsOnly, made
from tests.training import batch_of, logged, make_trainer


def own_hooks(model):
    """The forward hooks that are not Transformers' own, which it leaves where hidden states were asked for."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if not hook.__module__.startswith("transformers")]


class TestOneAfterAnother:
    def test_projections_of_a_match_set_later_are_trained(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1, learning_rate=1e-2)
        trainer.train()
        trainer.args.hidden_weight = 1.0
        trainer.train()
        first = make_trainer(tmp_path, hidden_weight=1.0)._layers.modules.state_dict()
        trained = trainer._layers.modules.state_dict()
        assert {*trained} == {*first}
        assert all(not torch.equal(trained[name], first[name]) for name in first)

    def test_a_resume_that_fails_leaves_the_student_plain(self, tmp_path):
        student, teacher = tiny.pair("bert")
        student.save_pretrained(tmp_path / "no projections")
        trainer = made(tmp_path, HIDDEN, models=(student, teacher))
        with pytest.raises(ValueError, match=r"has no distillation_modules\.safetensors"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "no projections"))
        assert not hasattr(student, "distillation_modules")
        for model in (student, teacher):
            assert not own_hooks(model)
        made(tmp_path, HIDDEN, models=(student, teacher)).train()


class TestFromOutside:
    def test_the_training_loss_is_not_to_be_had_outside_the_training(self, tmp_path):
        trainer = made(tmp_path, HIDDEN)
        batch = batch_of(tiny.rows("sequence"))
        trainer.model.train()
        with pytest.raises(RuntimeError, match=r"inside train\(\) alone.*model\.eval\(\)"):
            trainer.compute_loss(trainer.model, batch)
        trainer.model.eval()
        assert trainer.compute_loss(trainer.model, batch) > 0

    def test_a_teacher_of_logits_only_teaches_beside_a_loss_on_the_student_alone(self, tmp_path):
        student, teacher = tiny.pair("bert")
        data = [{**row, "domain": torch.tensor(i % 2)} for i, row in enumerate(tiny.rows("sequence"))]
        match = {"name": "domains", "student": "pooled(mean)@hidden[-1]", "loss": "mmd", "domain": "domain"}
        trainer = make_trainer(
            tmp_path,
            models=(student, LogitsOnly(teacher)),
            train_dataset=data,
            distillation_config={"logits": {"weight": 1.0}, "matches": [match]},
        )
        trainer.train()
        assert logged(trainer, "loss_kd")[0] > 0
        assert logged(trainer, "loss_domains")[0] != 0


class TestMaps:
    @pytest.mark.parametrize(("strategy", "summed"), [("random", 2), ("argmin", 4), ("emd", 1)])
    def test_the_mean_over_pairs_is_over_those_that_a_changing_map_takes(self, strategy, summed, tmp_path):
        match = {"student": "pooled(cls)@hidden[*]", "loss": "hidden_normalized_mse", "map": strategy}
        values = []
        for reduction in ("token_mean", "reference"):
            torch.manual_seed(0)
            models = tiny.bert(), tiny.bert(layers=4)
            trainer = made(tmp_path, {**match, "reduction": reduction}, models=models, max_steps=1)
            trainer.train()
            values.append(logged(trainer, "loss_own_0")[0])
        assert values[0] == pytest.approx(summed * values[1], rel=1e-5)

    def test_what_a_changing_map_chooses_does_not_depend_on_the_scale_of_the_costs(self):
        for seed in range(10):
            costs = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(ordered_argmin(costs), ordered_argmin(costs * 37))
            torch.testing.assert_close(transport(costs), transport(costs * 37))


class TestRecords:
    @pytest.mark.parametrize("heads", [1, 4])
    def test_the_mean_of_scores_is_that_of_their_biases_too(self, heads):
        torch.manual_seed(0)
        bias = torch.randn(1, heads, 5, 5)
        scores = Scores(torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), 0.3, bias=bias)
        torch.testing.assert_close(_head_mean(scores).dense(), scores.dense().mean(1, keepdim=True))

    def test_a_record_of_another_device_is_moved_with_all_its_tensors(self):
        model = tiny.t5().eval()
        capture = Capture(model, [Feature("attention", 1, stack="encoder")])
        with torch.no_grad(), capture.recording():
            out = model(**batch_of(tiny.rows("translation")), **capture.forward_arguments)
            (record,) = capture.collect(out).values()
        capture.close()
        record = dataclasses.replace(record, options={**record.options, "scaling": 0.5})
        assert record.to(record.query.device) is record
        moved = record.to(torch.device("meta"))
        tensors = [moved.query, moved.key, moved.value, moved.mask, *moved.options.values()]
        tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 4
        assert all(value.device.type == "meta" for value in tensors)
        assert moved.options["scaling"] == 0.5
        assert moved.scores().dense().device.type == "meta"
