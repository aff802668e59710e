import pytest
import torch
import transformers as hf

from hf_distill.signals import SparseLogits, TeacherOutput
from hf_distill.teachers import LocalTeacher, TopKTeacher
from hf_distill.teachers.sparse import most_likely
from tests.invariants.steps import assert_same_steps, recorded
from tests.tiny import VOCABULARY, ZOO, pair, rows
from tests.training import make_trainer


class Odd(hf.LlamaForCausalLM):
    """Does more to its logits than its head: `odd` says what."""

    odd = "masked"

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.odd == "masked":
            out.logits = out.logits.index_fill(-1, torch.tensor([VOCABULARY - 1]), -torch.inf)
        elif self.odd == "parameter":
            out.logits = out.logits + self.extra
        elif self.odd == "training" and self.training:
            out.logits = out.logits * 3
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
            if self.odd == "training loss" and self.training:
                out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).square().mean()
        return out


def gradients(trainer, *, dense):
    if dense:
        trainer._can_be_chunked = lambda *_, **__: False
    return recorded(trainer)


@pytest.mark.parametrize("odd", ["masked", "parameter", "training", "training loss"])
def test_what_a_model_does_behind_its_head_is_not_lost(odd, tmp_path):
    runs = []
    for dense in (False, True):
        models = [Odd(model.config) for model in pair("llama")]
        for model, like in zip(models, pair("llama"), strict=True):
            model.load_state_dict(like.state_dict(), strict=False)
            model.odd = odd
        data = rows("causal")
        for row in data:
            row["labels"][row["labels"] == VOCABULARY - 1] = -100
        runs.append(gradients(make_trainer(tmp_path, "llama", models=models, train_dataset=data), dense=dense))
    assert_same_steps(*runs)


@pytest.mark.parametrize("path", ["module:lm_head", "pooled(mean)@module:lm_head"])
def test_a_match_of_the_heads_sees_all_positions(path, tmp_path):
    match = {"name": "m", "student": path, "teacher": path, "loss": "hidden_mse"}
    terms = {"task": {"weight": 0.5}, "logits": {"weight": 0.5}, "matches": [match]}
    made = [make_trainer(tmp_path, "llama", distillation_config=terms) for _ in range(2)]
    assert_same_steps(*(gradients(trainer, dense=dense) for trainer, dense in zip(made, (False, True), strict=True)))


def test_a_head_that_was_replaced_is_read_in_the_next_training(tmp_path):
    trainer = make_trainer(tmp_path, "llama", max_steps=1)
    trainer.train()
    trainer.model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY, bias=False))
    trainer.optimizer = None
    trainer.train()
    assert trainer._chunked.reason is None


def test_predictions_after_an_interrupted_step_are_whole(tmp_path):
    class Interrupted(TopKTeacher):
        now = True

        def __call__(self, inputs):
            if self.now:
                raise KeyboardInterrupt
            return super().__call__(inputs)

    student, model = pair("llama")
    teacher = Interrupted(LocalTeacher(model), 5, 2.0)
    trainer = make_trainer(tmp_path, "llama", models=(student, teacher))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    teacher.now = False
    logits = trainer.predict(rows(ZOO["llama"][1])).predictions
    assert not (logits[:4, 1:] == -100).all()  # what pads batches of other lengths


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_an_empty_entry_keeps_its_probability_where_as_many_are_named_as_there_are_classes(loss, tmp_path):
    class Cached(TopKTeacher):
        def __call__(self, inputs):
            full = most_likely(self._teacher(inputs).logits[0], 3, 2.0)
            kept = torch.tensor([True, True, False])
            indices, log_probs = torch.where(kept, full.indices, -1), full.log_probs.where(kept, -torch.inf)
            return TeacherOutput((), sparse=SparseLogits(indices, log_probs, 2.0))

    runs = []
    for wrap in (LocalTeacher, lambda model: Cached(LocalTeacher(model), 3, 2.0)):
        student, teacher = pair("bert")
        runs.append(recorded(make_trainer(tmp_path, models=(student, wrap(teacher)), kd_loss=loss)))
    assert_same_steps(*runs)


def test_a_teacher_made_of_ours_may_have_a_call_without_our_keywords(tmp_path):
    class Mine(LocalTeacher):
        def __call__(self, inputs):
            return super().__call__(inputs)

    student, teacher = pair("llama")
    make_trainer(tmp_path, "llama", models=(student, Mine(teacher)), max_steps=1).train()


def test_float16_by_the_launcher_keeps_the_logits(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "llama")
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with trainer._chunked.attached(trainer.model):
        batch = trainer.split(inputs)
        assert not trainer._can_be_chunked(batch, trainer.active_terms(), training=True)
