"""What a teacher says without forming its logits."""

import pytest
import torch

from hf_distill.signals import TeacherOutput
from hf_distill.teachers import FactoredTeacher, LocalTeacher
from tests.tiny import ZOO, bert, pair, rows
from tests.training import batch_of, logged, make_trainer


@pytest.mark.parametrize("name", ["llama", "t5", "bert-masked"])
def test_a_teacher_gives_factors_in_place_of_its_logits(name):
    _, model = pair(name)
    teacher, inputs = LocalTeacher(model), batch_of(rows(ZOO[name][1]))
    (logits,) = teacher(inputs).logits
    factored = teacher(inputs, factored=True)
    assert isinstance(teacher, FactoredTeacher)
    assert factored.logits == ()
    torch.testing.assert_close(factored.formed().logits, (logits,))
    assert teacher(inputs).factors is None


def test_a_teacher_without_such_a_head_gives_its_logits():
    teacher, inputs = LocalTeacher(bert()), batch_of(rows("sequence"))
    output = teacher(inputs, factored=True)
    assert not teacher.gives_factors
    assert output.factors is None
    assert len(output.logits) == 1


def test_a_float16_teacher_is_said_to_be_the_reason_why_logits_are_formed(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_distill.chunked_terms.logger.warning", said.append)
    student, teacher = pair("llama")
    make_trainer(tmp_path, "llama", models=(student, teacher.half())).train()
    assert said == [
        "Logits of tokens x vocabulary are formed: the teacher's logits cannot be taken apart: the head of "
        "LlamaForCausalLM is held in torch.float16; load it in bfloat16 or float32."
    ]


def test_a_teacher_that_cannot_give_factors_is_asked_for_logits(tmp_path):
    class Plain:
        def __init__(self, model):
            self.model = model

        def place(self, device):
            pass

        def __call__(self, inputs):
            with torch.no_grad():
                return TeacherOutput(logits=(self.model.eval()(inputs["input_ids"], inputs["attention_mask"]).logits,))

    student, model = pair("llama")
    plain = make_trainer(tmp_path, "llama", models=(student, Plain(model)))
    plain.train()
    local = make_trainer(tmp_path, "llama")
    local.train()
    assert logged(plain, "loss") == pytest.approx(logged(local, "loss"), rel=1e-5)


def test_a_head_elsewhere_is_used_through_its_logits(tmp_path, monkeypatch):
    trainer, reference = make_trainer(tmp_path, "llama"), make_trainer(tmp_path, "llama")
    formed = []
    monkeypatch.setattr(trainer, "_usable", lambda output, batch: formed.append(1) or output.formed())
    trainer.train()
    reference.train()
    assert len(formed) == 2
    assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-5)
