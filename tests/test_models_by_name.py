"""Students and teachers given as a folder: the right head, labels, dtype and tokenizer, and the same training."""

import pytest
import torch
import transformers as hf

from tests.tiny import ZOO, bert, distilbert, llama, pair, rows, tokenizer
from tests.training import logged, make_trainer

# A family for each head.
HEADS = {kind: name for name, (_, kind) in reversed(ZOO.items())}.values()
LABELS = {0: "good", 1: "bad", 2: "ugly"}


def saved(model, folder, words=None):
    """The folder, as a string, with the model and perhaps a tokenizer in it."""
    model.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    return str(folder)


def losses(trainer):
    trainer.train()
    return logged(trainer, "loss"), logged(trainer, "loss_kd")


@pytest.mark.parametrize("name", HEADS)
def test_a_teachers_folder_gives_the_teacher_with_its_head(name, tmp_path):
    student, teacher = pair(name)
    folder = saved(teacher, tmp_path / "teacher")
    by_name = make_trainer(tmp_path, name, models=(student, folder))
    assert type(by_name.teacher.model) is type(teacher)
    assert losses(by_name) == losses(make_trainer(tmp_path, name))


@pytest.mark.parametrize("as_path", [False, True])
def test_a_students_folder_gives_it_the_teachers_kind_of_head_and_label_names(as_path, tmp_path):
    torch.manual_seed(0)
    body = hf.BertModel(bert().config)
    folder = saved(body, tmp_path / "student")
    teacher = bert(hidden=48, id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    trainer = make_trainer(tmp_path, models=(tmp_path / "student" if as_path else folder, teacher))
    assert type(trainer.model) is hf.BertForSequenceClassification
    assert trainer.model.config.id2label == LABELS
    assert trainer.model.config.label2id == {name: i for i, name in LABELS.items()}
    theirs = trainer.model.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(theirs, body.encoder.layer[0].output.dense.weight)
    trainer.train()
    trainer.save_model(str(tmp_path / "distilled"))
    assert hf.AutoConfig.from_pretrained(tmp_path / "distilled").id2label == LABELS


@pytest.mark.parametrize("wrong", ["model", "teacher_model"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_name_that_nothing_is_found_under_is_told_with_its_argument(wrong, by_name, tmp_path):
    student, teacher = pair("bert")
    right = saved(student, tmp_path / "student") if by_name else student
    models = (right, "nowhere/at-all") if wrong == "teacher_model" else ("nowhere/at-all", teacher)
    if by_name and wrong == "model":
        models = ("nowhere/at-all", saved(teacher, tmp_path / "teacher"))
    with pytest.raises(OSError, match=f"^{wrong}='nowhere/at-all' could not be loaded: ") as refusal:
        make_trainer(tmp_path, models=models)
    assert isinstance(refusal.value.__cause__, OSError)


def test_between_two_folders_the_teacher_decides_on_the_head(tmp_path):
    student = saved(hf.DistilBertForMaskedLM(distilbert().config), tmp_path / "student")
    teacher = bert(id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    trainer = make_trainer(tmp_path, models=(student, saved(teacher, tmp_path / "teacher")))
    assert type(trainer.teacher.model) is hf.BertForSequenceClassification
    assert type(trainer.model) is hf.DistilBertForSequenceClassification
    assert trainer.model.config.id2label == LABELS
    trainer.train()
    assert trainer.evaluate()["eval_kd"] > 0


def test_two_folders_train_as_their_models_do(tmp_path):
    student, teacher = pair("llama")
    names = saved(student, tmp_path / "student"), saved(teacher, tmp_path / "teacher")
    assert losses(make_trainer(tmp_path, "llama", models=names)) == losses(make_trainer(tmp_path, "llama"))


@pytest.mark.parametrize("kwargs", [{"dtype": "bfloat16"}, '{"dtype": "bfloat16"}'])
def test_a_teacher_is_loaded_with_the_arguments_asked_for(kwargs, tmp_path):
    student, teacher = pair("bert")
    folder = saved(teacher, tmp_path / "teacher")
    trainer = make_trainer(tmp_path, models=(student, folder), teacher_model_init_kwargs=kwargs)
    assert {value.dtype for value in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0


def test_a_teacher_keeps_the_dtype_it_was_saved_in(tmp_path):
    student, teacher = pair("bert")
    trainer = make_trainer(tmp_path, models=(student, saved(teacher.to(torch.bfloat16), tmp_path / "teacher")))
    assert trainer.teacher.model.dtype == torch.bfloat16


def test_a_student_is_loaded_with_the_arguments_asked_for(tmp_path):
    student, teacher = pair("bert")
    options = {"models": (saved(student, tmp_path / "student"), teacher)}
    trainer = make_trainer(tmp_path, model_init_kwargs={"attn_implementation": "eager"}, **options)
    assert trainer.model.config._attn_implementation == "eager"


def test_a_students_own_label_names_win_if_it_is_asked_for_them(tmp_path):
    folder = saved(hf.BertModel(bert().config), tmp_path / "student")
    shouted = {i: name.upper() for i, name in LABELS.items()}
    trainer = make_trainer(
        tmp_path, models=(folder, bert(id2label=LABELS, num_labels=3)), model_init_kwargs={"id2label": shouted}
    )
    assert trainer.model.config.id2label == shouted


def test_loading_a_teacher_does_not_change_the_students_random_numbers(tmp_path):
    folder = saved(bert(hidden=48), tmp_path / "teacher")
    student, _ = pair("bert")
    torch.manual_seed(5)
    make_trainer(tmp_path, models=(student, folder), seed=5)
    after_loading = torch.rand(1)
    make_trainer(tmp_path, models=(student, bert(hidden=48)), seed=5)
    assert torch.rand(1) == after_loading


def test_a_students_new_head_is_drawn_by_the_runs_seed(tmp_path):
    folder = saved(hf.BertModel(bert().config), tmp_path / "student")
    teacher = saved(pair("bert")[1], tmp_path / "teacher")
    heads = [make_trainer(tmp_path, models=(folder, teacher), seed=seed).model.classifier.weight for seed in (7, 7, 8)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_teachers_folder_brings_the_tokenizer_to_compare(tmp_path):
    student, teacher = llama(), llama(hidden=48)
    others = tokenizer([f"other{i}" for i in range(92)])
    options = {"processing_class": tokenizer(), "train_dataset": rows("causal")}
    same = saved(teacher, tmp_path / "same", tokenizer())
    make_trainer(tmp_path, "llama", models=(student, same), **options)
    with pytest.raises(ValueError, match="vocabularies differ"):
        make_trainer(tmp_path, "llama", models=(student, saved(teacher, tmp_path / "other", others)), **options)
