"""Models without a head: what reads a head, a decoder or another text is refused, with the terms that do not."""

import re
from unittest import mock

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

from tests import tiny
from tests.test_embeddings import made
from tests.training import logged, make_trainer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"distillation_config": None}, "kd_weight=0.5 and task_weight=0.5"),
        ({"kd_weight": 1.0}, "but kd_weight=1.0 "),
        ({"task_weight": 0.25}, "but task_weight=0.25 "),
    ],
)
def test_terms_of_a_head_are_refused_with_those_that_need_none(options, named, tmp_path):
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        made(tmp_path, **options)
    message = str(refusal.value)
    for remedy in ("pooled(mean)@hidden[-1]", "kd_weight=0, task_weight=0, hidden_weight=1"):
        assert remedy in message


def test_the_remedies_of_the_message_work(tmp_path):
    with pytest.raises(ValueError, match="distillation_config=") as refusal:
        made(tmp_path, distillation_config=None)
    config = re.search(r"distillation_config=(\{.*\})", str(refusal.value))[1]
    flat = {"distillation_config": None, "kd_weight": 0.0, "task_weight": 0.0, "hidden_weight": 1.0}
    for options in ({"distillation_config": eval(config)}, flat):
        trainer = made(tmp_path, **options)
        trainer.train()
        assert logged(trainer, "loss")[0] > 0


@pytest.mark.parametrize("weight", ["kd_weight", "task_weight"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_term_of_a_head_that_is_turned_on_later_is_refused(weight, labels, tmp_path):
    data = [{**row, "labels": torch.tensor(1)} if labels else row for row in tiny.texts()]
    trainer = made(tmp_path, train_dataset=data)
    setattr(trainer.args, weight, 1.0)
    with pytest.raises(ValueError, match=f"has no head.* but {weight}=1.0"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["T5Model", "BartModel"])
def test_a_decoder_without_a_head_is_refused(name, tmp_path):
    config = (tiny.t5() if name == "T5Model" else tiny.bart()).config
    model = getattr(hf, name)(config)
    for models in ((model, tiny.embedder("bert")), (tiny.embedder("bert"), model)):
        with pytest.raises(ValueError, match=rf"{name} has a decoder and no head.*T5EncoderModel"):
            made(tmp_path, models=models)


@pytest.mark.parametrize("name", ["t5", "bert-choices"])
def test_a_teacher_that_reads_more_than_one_text_a_row_is_refused(name, tmp_path):
    teacher = tiny.pair(name)[1]
    with pytest.raises(ValueError, match=rf"no head, and the teacher \({type(teacher).__name__}\).*AutoModel"):
        made(tmp_path, models=(tiny.embedder("bert"), teacher))


def test_a_student_with_a_head_needs_a_teacher_with_one(tmp_path):
    with pytest.raises(ValueError, match=r"does sequence_classification, the teacher \(BertModel\) embedding"):
        make_trainer(tmp_path, models=(tiny.bert(), tiny.embedder("bert")))


@pytest.mark.parametrize("remedy", [{"ddp_find_unused_parameters": True}, {"add_pooling_layer": False}])
def test_processes_that_would_wait_for_the_pooler_are_refused(remedy, tmp_path):
    student, teacher = tiny.embedding_pair("bert")
    trainer = made(tmp_path, models=(student, teacher), activation_checkpointing=True)
    with mock.patch.object(Accelerator, "num_processes", 2):
        with pytest.raises(ValueError, match=r"pooler of the student \(BertModel\).*ddp_find_unused_parameters"):
            trainer._plan_layers(student)
        if "add_pooling_layer" in remedy:
            student = hf.BertModel(student.config, add_pooling_layer=False)
        else:
            trainer.args.ddp_find_unused_parameters = True
        trainer._plan_layers(student)
