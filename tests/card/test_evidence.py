"""The trainer writes card and report beside the student, as people who know `Trainer` expect, and loses no text."""

import re

import peft
import pytest
import transformers
from huggingface_hub import ModelCard

from hf_distill.card import write_card
from hf_distill.card.usage import usage
from hf_distill.models.heads import find_task
from hf_distill.provenance import describe_model
from hf_distill.report.markdown import results_table
from hf_distill.report.results import Report
from hf_distill.run_record import RunRecord
from tests import tiny
from tests.card.cards import record
from tests.training import make_trainer, plain_trainer

CHEAP = {"baselines": (), "batch_sizes": (1,), "lengths": (8,), "repeats": 2, "warm_up": 1}


@pytest.fixture
def trainer(tmp_path):
    trainer = make_trainer(tmp_path / "student", processing_class=tiny.tokenizer(), hub_model_id="me/my-student")
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def card_of(trainer):
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_the_arguments_of_create_model_card_are_those_of_trainer(trainer):
    trainer.create_model_card(
        "de", "mit", ["one"], "A Name", "org/origin", "text-classification", ["org/data"], ["Data"], ["small"]
    )
    data = card_of(trainer).data
    assert (data.language, data.license, data.base_model, data.datasets) == (["de"], "mit", "org/origin", ["org/data"])
    assert "one" in data.tags
    assert "# A Name" in card_of(trainer).text
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("org/data", "Data", "small")


def test_a_card_written_anew_keeps_what_was_said_before(trainer):
    trainer.create_model_card(language="de", license="mit", tags="one", dataset_tags="org/data")
    trainer.create_model_card(tags="two")
    data = card_of(trainer).data
    assert (data.language, data.license, data.datasets) == (["de"], "mit", ["org/data"])
    assert {"one", "two"} <= {*data.tags}
    write_card(trainer.args.output_dir)  # as `hf-distill card` does
    assert card_of(trainer).data.to_dict() == data.to_dict()


def test_a_card_by_hand_is_kept_and_one_of_ours_is_not(trainer, tmp_path):
    folder = tmp_path / "student"
    mine = "---\nlicense: mit\n---\n\n# What I wrote\n"
    (folder / "README.md").write_text(mine, encoding="utf-8")
    trainer.create_model_card()
    trainer.create_model_card(license="apache-2.0")
    assert [path.name for path in sorted(folder.glob("*README*"))] == ["README.md", "_README.old.md"]
    assert (folder / "_README.old.md").read_text(encoding="utf-8") == mine
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "What I wrote" not in text
    changed = text.replace("## Citation", "## My own thoughts\n\n## Citation")
    (folder / "README.md").write_text(changed, encoding="utf-8")
    trainer.create_model_card()
    assert (folder / "_README.old2.md").read_text(encoding="utf-8") == changed


def test_without_a_teacher_the_card_is_trainers_own(tmp_path):
    ours = make_trainer(tmp_path / "ours", teacher_model=None, kd_weight=0.0, task_weight=1.0)
    plain = plain_trainer(tmp_path / "plain")
    for each in (ours, plain):
        each.create_model_card(model_name="same", tags=["x"])
    assert str(card_of(ours)) == str(card_of(plain))


def test_the_card_of_an_adapter_survives_that_peft_saves_it_again(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "private/base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "private/base")
    student = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path / "run", "llama", models=(student, None), teacher_model=None)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit")
    first = card_of(trainer)
    trainer.save_model()
    trainer.create_model_card()
    again = card_of(trainer)
    assert not (tmp_path / "run/_README.old.md").exists()
    assert again.text == first.text
    assert "private" not in str(again)
    assert (again.data.library_name, again.data.license, again.data.base_model) == ("peft", "mit", None)
    assert {"lora", "transformers", "knowledge-distillation"} <= {*again.data.tags}


def test_a_report_stands_beside_the_student_and_on_its_card(trainer, tmp_path):
    report = trainer.report(**CHEAP)
    folder = tmp_path / "student/distillation"
    assert Report.read_json(folder / "report.json").to_dict() == report.to_dict()
    assert {"run.json", "report.json", "report.md", "losses.png"} <= {path.name for path in folder.iterdir()}
    assert report.training["student"]["weights"] == RunRecord.read(tmp_path / "student").student["weights"]
    trainer.create_model_card()
    text = card_of(trainer).text
    assert results_table(report) in text
    for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (tmp_path / "student" / link).is_file()
    assert "](distillation/losses.png)" in text


@pytest.mark.parametrize("disabled", [False, True])
def test_a_report_says_what_it_measures_where_trainer_would_show_bars(trainer, capsys, disabled):
    trainer.args.disable_tqdm = disabled
    capsys.readouterr()
    trainer.report(**CHEAP)
    shown = capsys.readouterr().err
    assert all((text in shown) is not disabled for text in ("student: scores", "latency, batch 1, length 8"))


def test_the_lines_of_a_report_go_where_they_are_asked_to(trainer, capsys):
    lines = []
    trainer.report(**CHEAP, progress=lines.append)
    assert any(line.startswith("student: scores") for line in lines)
    assert "student: scores" not in capsys.readouterr().err


def test_a_report_without_a_teacher_is_refused(tmp_path):
    plain = make_trainer(tmp_path, teacher_model=None, kd_weight=0.0, task_weight=1.0)
    with pytest.raises(ValueError, match="no teacher to compare the student with"):
        plain.report()
    assert not (tmp_path / "distillation").exists()


@pytest.mark.parametrize("name", [*tiny.ZOO])
def test_the_student_of_every_head_gets_a_card(name, tmp_path):
    trainer = make_trainer(tmp_path, name)
    trainer.create_model_card()
    card = card_of(trainer)
    assert type(trainer.model).__name__ in card.text
    assert card.data.library_name == "transformers"
    loss = RunRecord.read(tmp_path).logit_loss
    assert loss == {"bert-multi-label": "binary_forward_kl", "bert-regression": "logit_mse"}.get(name, "forward_kl")
    assert f"`{loss}`" in card.text


RUNNABLE = ["bert", "bert-tokens", "bert-spans", "bert-choices", "bert-masked", "gpt2", "t5", "peft"]


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_code_on_the_card_runs_on_what_is_saved(name, tmp_path, monkeypatch, capsys):
    model = tiny.bert() if name == "peft" else tiny.ZOO[name][0]()
    tokenizer = tiny.tokenizer()
    if name == "peft":
        model.save_pretrained(tmp_path / "base")
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "my-student")
    tokenizer.save_pretrained(tmp_path / "my-student")
    monkeypatch.chdir(tmp_path)
    made = record(student=describe_model(model), task=str(find_task(model)))
    exec(compile(usage(made, "my-student"), "card", "exec"), {})
    assert capsys.readouterr().out.strip()
