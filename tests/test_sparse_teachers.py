"""Trainings with a teacher that names its most likely classes alone."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_distill.signals import SparseLogits, TeacherOutput
from hf_distill.teachers import LocalTeacher, SparseTeacher, TopKTeacher
from tests.invariants.test_no_host_sync import _Reads
from tests.tiny import VOCABULARY, ZOO, llama, pair, rows, tokenizer
from tests.training import GradientRecorder, assert_same_gradients, batch_of, logged, make_trainer

LANGUAGE_MODELS = ["llama", "t5", "bert-masked"]


def sparse_pair(name, k=8, temperature=2.0):
    student, teacher = pair(name)
    return student, TopKTeacher(LocalTeacher(teacher), k, temperature)


def gradients(folder, name, *, chunked=True, **options):
    """Of the first step, and the trainer; by the head, or from logits."""
    recorder = GradientRecorder()
    trainer = make_trainer(folder, name, callbacks=[recorder], **options)
    if not chunked:
        trainer._chunked.suit = lambda *args: False
    trainer.train()
    return recorder.steps[0], trainer


def head_forwards(monkeypatch):
    """How many positions each forward of a head formed logits of."""
    seen = []
    linear = torch.nn.Linear.forward

    def forward(self, inputs):
        outputs = linear(self, inputs)
        if outputs.shape[-1] == VOCABULARY:
            seen.append(tuple(outputs.shape[:-1]))
        return outputs

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_the_head_and_the_logits_give_one_gradient(name, loss, tmp_path):
    options = {"kd_loss": loss, "eval_strategy": "steps", "eval_steps": 2}
    found, trainer = gradients(tmp_path, name, models=sparse_pair(name), **options)
    expected, reference = gradients(tmp_path, name, models=sparse_pair(name), chunked=False, **options)
    assert_same_gradients(found, expected)
    for key in ("loss", "loss_kd", "loss_task", "eval_loss", "eval_kd", "eval_agreement"):
        assert logged(trainer, key) == pytest.approx(logged(reference, key), rel=1e-4), key
        assert len(logged(trainer, key)) > 0


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_training_and_evaluation_form_no_logits_of_the_student(name, tmp_path, monkeypatch):
    student, teacher = sparse_pair(name)
    trainer = make_trainer(tmp_path, name, models=(student, teacher))
    data = trainer.train_dataset
    cache = {str(batch_of(part)["input_ids"]): teacher(batch_of(part)) for part in (data[:4], data[4:])}
    monkeypatch.setattr(TopKTeacher, "__call__", lambda self, inputs: cache[str(inputs["input_ids"])])
    trainer.train()
    seen = head_forwards(monkeypatch)
    trainer.train()
    trainer.evaluate()
    assert len(seen) >= 4
    assert all(positions[1] == 1 for positions in seen), seen


@pytest.mark.parametrize("name", ["llama", "bert-masked", "bert"])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_with_all_classes_it_is_the_teacher_itself(name, loss, tmp_path):
    k = 3 if name == "bert" else VOCABULARY
    found, sparse = gradients(tmp_path, name, models=sparse_pair(name, k), kd_loss=loss)
    expected, whole = gradients(tmp_path, name, kd_loss=loss)
    assert_same_gradients(found, expected)
    sparse.evaluate()
    whole.evaluate()
    for key in ("loss_kd", "eval_kd", "eval_agreement"):
        assert logged(sparse, key) == pytest.approx(logged(whole, key), rel=1e-4)


def test_all_classes_may_be_of_another_temperature_and_meet_any_loss(tmp_path):
    options = {"kd_loss": "dkd", "temperature": 3.0}
    found, _ = gradients(tmp_path, "bert", models=sparse_pair("bert", 3, 1.0), **options)
    expected, _ = gradients(tmp_path, "bert", **options)
    assert_same_gradients(found, expected)


def test_top_k_kl_of_all_logits_is_forward_kl_of_as_many_classes(tmp_path):
    found, sparse = gradients(tmp_path, "llama", models=sparse_pair("llama", 8))
    config = {"task": {"weight": 0.5}, "logits": {"loss": "top_k_kl", "options": {"k": 8}}}
    expected, whole = gradients(tmp_path, "llama", distillation_config=config)
    assert_same_gradients(found, expected)
    assert logged(sparse, "loss_kd") == pytest.approx(logged(whole, "loss_kd"), rel=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("chunked", [True, False])
def test_micro_batches_and_padding_do_not_matter(name, chunked, tmp_path):
    whole, _ = gradients(tmp_path, name, models=sparse_pair(name), per_device_train_batch_size=8, chunked=chunked)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, _ = gradients(tmp_path, name, models=sparse_pair(name), chunked=chunked, **options)
    assert_same_gradients(parts, whole)
    if name != "t5":
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded = [
            {key: F.pad(value, (0, 5), value=fill[key]) for key, value in row.items()} for row in rows(ZOO[name][1])
        ]
        options = {"train_dataset": padded, "per_device_train_batch_size": 8}
        longer, _ = gradients(tmp_path, name, models=sparse_pair(name), chunked=chunked, **options)
        assert_same_gradients(longer, whole)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_step_reads_no_more_than_that_of_a_teacher_with_logits(chunked, tmp_path, monkeypatch):
    counts = []
    for models in (sparse_pair("llama"), pair("llama")):
        trainer = make_trainer(tmp_path, "llama", models=models)
        trainer._start_layers()
        if not chunked:
            trainer._chunked.suit = lambda *args: False
        student = models[0].train()
        first, second = trainer.get_train_dataloader()
        trainer.compute_loss(student, first)
        for name, module in [*sys.modules.items()]:
            if name.startswith("hf_distill.losses") and hasattr(module, "may_read"):
                monkeypatch.setattr(module, "may_read", lambda tensor: False)  # as on a device
        with _Reads() as reads:
            trainer.compute_loss(student, second)
        counts.append(reads.counts)
    assert not counts[0] - counts[1]


class Undeclared:
    """A teacher of one's own that names classes without having said so."""

    def __init__(self, teacher):
        self._teacher, self.model = teacher, teacher.model

    def place(self, device):
        self._teacher.place(device)

    def __call__(self, inputs):
        return self._teacher(inputs)


def test_a_teacher_that_does_not_say_so_may_name_classes_too(tmp_path):
    student, teacher = sparse_pair("llama")
    assert isinstance(teacher, SparseTeacher)
    assert not isinstance(Undeclared(teacher), SparseTeacher)
    found, _ = gradients(tmp_path, "llama", models=(student, Undeclared(teacher)))
    expected, _ = gradients(tmp_path, "llama", models=sparse_pair("llama"))
    assert_same_gradients(found, expected)


def test_labels_in_another_order_are_matched_by_name(tmp_path):
    names = [f"class {i}" for i in range(9)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    moved = {"id2label": dict(enumerate(names[::-1])), "label2id": {name: 8 - i for i, name in enumerate(names)}}
    results = []
    for wrap in (lambda teacher: TopKTeacher(LocalTeacher(teacher), 8, 2.0), lambda teacher: teacher):
        make = ZOO["bert"][0]
        torch.manual_seed(0)
        student, teacher = make(num_labels=9, **labels), make(num_labels=9, **moved)
        with torch.no_grad():
            teacher.classifier.weight.mul_(60)
        config = {"logits": {"loss": "top_k_kl", "options": {"k": 8}}}
        results.append(gradients(tmp_path, "bert", models=(student, wrap(teacher)), distillation_config=config)[0])
    assert_same_gradients(*results)


def test_a_teacher_with_a_padded_vocabulary_fits(tmp_path):
    torch.manual_seed(1)
    teacher = llama(hidden=48, layers=3, vocab_size=VOCABULARY + 7)
    student, _ = pair("llama")
    words = tokenizer()
    options = {"processing_class": words, "teacher_processing_class": words}
    sparse = TopKTeacher(LocalTeacher(teacher), VOCABULARY + 7, 2.0)
    found, _ = gradients(tmp_path, "llama", models=(student, sparse), **options)
    expected, _ = gradients(tmp_path, "llama", models=(pair("llama")[0], teacher), **options)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_loss": "dkd"}, "dkd needs every class.*forward_kl"),
        ({"kd_loss": "logit_mse"}, "logit_mse needs every class"),
        ({"temperature": 4.0}, "temperature 2.0, and the term's temperature is 4.0.*Set temperature=2.0"),
        ({"temperature_schedule": "linear", "temperature_final": 1.0}, "temperature 2.0, and the term's"),
        ({"distillation_config": {"logits": {"transform": "standardize"}}}, "logit_transform"),
        ({"distillation_config": {"logits": {"teacher_scale": 0.5}}}, "teacher_scale changes all"),
        ({"hidden_weight": 1.0}, "hidden"),
    ],
    ids=str,
)
def test_what_needs_more_of_a_teacher_is_refused_before_the_first_step(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, "llama", models=sparse_pair("llama"), **options)


def test_weights_by_the_teacher_are_refused(tmp_path):
    config = {"logits": {"item_weights": [{"by": "teacher", "signal": "confidence"}]}}
    with pytest.raises(ValueError, match="read its logits"):
        make_trainer(tmp_path, "llama", models=sparse_pair("llama"), distillation_config=config).train()


@pytest.mark.parametrize(
    ("name", "message"), [("bert-spans", "no single distribution"), ("bert-regression", "logit_mse")]
)
def test_heads_without_one_distribution_are_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, name, models=sparse_pair(name, 1)).train()


def test_a_temperature_that_turns_out_to_be_another_is_refused_in_the_first_step(tmp_path):
    student, teacher = sparse_pair("llama")
    trainer = make_trainer(tmp_path, "llama", models=(student, Undeclared(teacher)), temperature=4.0)
    with pytest.raises(ValueError, match=r"temperature 2\.0, and the term's temperature is 4\.0"):
        trainer.train()


def test_other_positions_are_refused(tmp_path):
    class Shorter(Undeclared):
        def __call__(self, inputs):
            sparse = super().__call__(inputs).sparse
            return TeacherOutput(
                (), sparse=replace(sparse, indices=sparse.indices[:, 1:], log_probs=sparse.log_probs[:, 1:])
            )

    trainer = make_trainer(tmp_path, "llama", models=(pair("llama")[0], Shorter(sparse_pair("llama")[1])))
    with pytest.raises(ValueError, match="the same tokens"):
        trainer.train()


def test_a_teacher_is_asked_for_what_a_cache_would_keep():
    _, model = pair("llama")
    inputs = batch_of(rows("causal"))
    output = TopKTeacher(LocalTeacher(model), 4, 2.0)(inputs)
    (logits,) = LocalTeacher(model)(inputs).logits
    assert output.logits == ()
    assert isinstance(output.sparse, SparseLogits)
    expected = (logits / 2).log_softmax(-1)
    torch.testing.assert_close(output.sparse.log_probs, expected.topk(4).values)
    torch.testing.assert_close(output.sparse.log_probs, expected.gather(-1, output.sparse.indices))
    with pytest.raises(ValueError, match="k is 0"):
        TopKTeacher(LocalTeacher(model), 0)
    with pytest.raises(ValueError, match="2 tensors of logits"):
        TopKTeacher(LocalTeacher(pair("bert-spans")[1]), 1)(batch_of(rows("spans")))
