"""A card says how the student came to be, and the Hub's own classes read it as it was meant."""

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from hf_distill.card import CardOptions, render_card, write_card
from hf_distill.card.metadata import pipeline_tag
from hf_distill.card.usage import usage
from hf_distill.models.heads import find_task
from hf_distill.presets import load_preset, preset_names
from hf_distill.provenance import STUDENT_ADAPTERS_OFF, describe_model
from hf_distill.report.markdown import headline, results_table
from hf_distill.run_record import RunRecord
from hf_distill.signals import Task
from tests import tiny
from tests.card.cards import ROWS, STUDENT_MODEL, TEACHER_MODEL, fill_the_disk, record, report

SECTIONS = [
    "## Results",
    "## How to use it",
    "## Distillation",
    "### What was minimised",
    "### Data",
    "### Training hyperparameters",
    "### Training results",
    "### Framework versions",
    "## Citation",
]
RELATIONS = ("adapter", "merge", "quantized", "finetune")  # those that the Hub knows


def rows_of_terms(text):
    """The lines of the table of terms by the term's name."""
    section = text.partition("### What was minimised")[2].partition("\n#")[0]
    return {line.split("|")[1].strip(" `"): line for line in section.splitlines() if line.startswith("| `")}


def loaded(folder):
    return ModelCard.load(folder / "README.md")


def test_the_head_of_a_card_is_what_the_hub_filters_by():
    data = render_card(record()).data
    assert (data.base_model, data.base_model_relation) == ("org/small", "finetune")
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "transformers",
        "text-classification",
        ["org/texts"],
    )
    assert data["teacher_model"] == "org/large"
    assert {"knowledge-distillation", "hf-distill", "generated_from_trainer"} <= {*data.tags}
    assert data.metrics == ["accuracy"]
    assert "language" not in data.to_dict()
    assert "license" not in data.to_dict()


def test_results_survive_the_way_through_the_file_and_the_hubs_own_reader(tmp_path):
    record().write(tmp_path)
    write_card(tmp_path, report=report())
    data = loaded(tmp_path).data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "small-distilled"
    found = {(each.metric_type, each.metric_value, each.dataset_type, each.task_type) for each in results}
    assert found == {
        ("accuracy", 0.931, "org/texts", "text-classification"),
        ("agreement", 0.931, "org/texts", "text-classification"),
    }
    assert {(each.dataset_split, each.dataset_name) for each in results} == {("test", "org/texts")}
    assert eval_results_to_model_index(name, results) == data.to_dict()["model-index"]
    assert data.base_model_relation in RELATIONS
    for repo in (data.base_model, *data.datasets):
        validate_repo_id(repo)


def test_without_a_report_the_card_is_whole_and_has_the_last_evaluation():
    card = render_card(record())
    found = [line for line in card.text.splitlines() if line.startswith("#")]
    assert found == ["# small-distilled", *SECTIONS]
    assert "| `accuracy` | 0.9000 |" in card.text
    assert "runtime" not in card.text
    results = card.data.eval_results
    assert [(each.metric_type, each.metric_value) for each in results] == [("accuracy", 0.9)]  # no loss, no distance


def test_with_a_report_the_card_has_its_finding_its_table_and_its_plots(tmp_path):
    record().write(tmp_path)
    for name in ("losses.png", "tradeoff.png", "other.png"):
        (tmp_path / "distillation" / name).write_bytes(b"")
    report().write_json(tmp_path / "distillation/report.json")
    write_card(tmp_path)
    text = loaded(tmp_path).text
    assert headline(report()) in text
    assert results_table(report()) in text
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert links == ["distillation/tradeoff.png", "distillation/losses.png"]
    assert all((tmp_path / link).is_file() for link in links)


def test_a_report_of_another_student_is_left_out(tmp_path):
    record().write(tmp_path)
    report(weights="eeee4444ffff5555").write_json(tmp_path / "distillation/report.json")
    write_card(tmp_path)
    assert results_table(report()) not in loaded(tmp_path).text
    assert loaded(tmp_path).data.eval_results[0].metric_value == 0.9


def test_a_score_on_rows_that_are_not_the_hubs_is_given_no_name_of_the_hub():
    card = render_card(record(), report(fingerprint="other"))
    assert {each.dataset_type for each in card.data.eval_results} == {"org/texts"}  # the name is the same
    other = replace(report(fingerprint="other"), data={"name": "my.csv", "fingerprint": "other"})
    results = render_card(record(), other).data.eval_results
    assert {(each.dataset_type, each.dataset_name) for each in results} == {("unknown", "my.csv")}


def test_what_the_user_says_is_on_the_card():
    options = CardOptions(
        language=["en", "de"],
        license="apache-2.0",
        tags="mine",
        model_name="my-name",
        finetuned_from="org/origin",
        tasks=["text-classification", "zero-shot-classification"],
        dataset_tags=["org/a", "org/b"],
        dataset=["A", "B"],
        dataset_args=["x"],
    )
    card = render_card(record(), options=options)
    data = card.data
    assert (data.language, data.license, data.base_model) == (["en", "de"], "apache-2.0", "org/origin")
    assert "mine" in data.tags
    assert data.datasets == ["org/a", "org/b"]
    assert card.text.startswith("# my-name\n")
    found = {(each.task_type, each.dataset_type, each.dataset_name, each.dataset_config) for each in data.eval_results}
    assert len(found) == 4
    assert ("zero-shot-classification", "org/a", "A", "x") in found
    assert ("text-classification", "org/b", "B", None) in found


def test_an_adapter_is_a_peft_model_of_its_base():
    student = {**STUDENT_MODEL, "peft": "LORA", "trained_parameters": 5000}
    teacher = {**STUDENT_MODEL, "kind": STUDENT_ADAPTERS_OFF}
    card = render_card(record(student=student, teacher=teacher))
    assert (card.data.library_name, card.data.base_model) == ("peft", "org/small")
    assert card.data.base_model_relation == "adapter"
    assert {"lora", "transformers", "base_model:adapter:org/small"} <= {*card.data.tags}
    assert STUDENT_ADAPTERS_OFF in card.text
    assert "AutoPeftModelForSequenceClassification" in card.text
    assert "- PEFT 0.21.2" in card.text.partition("### Framework versions\n\n")[2].splitlines()


def test_layers_cut_out_of_the_teacher_are_no_fine_tuning_of_it():
    student = {**STUDENT_MODEL, "name": TEACHER_MODEL["name"]}
    data = render_card(record(student=student)).data
    assert data.base_model == "org/large"
    assert data.get("base_model_relation") is None


def test_a_model_that_the_hub_does_not_have_is_nobodys_base():
    local = {**STUDENT_MODEL, "name": "folder", "on_hub": False, "revision": None}
    card = render_card(record(student=local, teacher={**local, "kind": "LocalTeacher"}))
    assert {"base_model", "base_model_relation", "teacher_model"} & {*card.data.to_dict()} == set()
    assert "huggingface.co/folder" not in card.text


@pytest.mark.parametrize("name", preset_names())
def test_the_card_of_every_preset_names_its_terms_and_papers(name):
    preset = load_preset(name)
    for stage in preset.stages:
        terms = stage.config.to_dict()
        text = render_card(record(terms, preset=name)).text
        assert preset.title in text
        for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", preset.paper):
            assert f"https://arxiv.org/abs/{number}" in text
            assert f"eprint = {{{number}}}" in text
        rows = rows_of_terms(text)
        for term_name, term in stage.config.terms.items():
            assert (term_name in rows) == (term.weight > 0)
            if term.weight > 0:
                assert rows[term_name].split("|")[2].strip().startswith(f"{term.weight:g}")


def test_a_weight_a_loss_a_temperature_and_a_map_are_in_their_terms_row():
    terms = {
        "task": {"weight": 0.3, "weight_schedule": {"kind": "linear", "from": 1, "to": 0}},
        "logits": {"loss": "jsd", "options": {"beta": 0.2}, "weight": 0.7, "temperature": 3, "active": [0.5, 1]},
        "matches": [
            {
                "name": "inner",
                "student": "hidden[*]",
                "loss": "hidden_cosine",
                "map": [[1, 4], [2, 8]],
                "mask": "content",
                "weight": 2,
            }
        ],
    }
    layers = {"inner": [["hidden[1]", "hidden[4]"], ["hidden[2]", "hidden[8]"]]}
    text = render_card(record(terms, layers=layers)).text
    rows = rows_of_terms(text)
    assert "0.3 times from 1 to 0 (linear)" in rows["task"]
    assert "0.7, on from 50% to 100% of the training" in rows["kd"]
    assert "`jsd`" in rows["kd"]
    assert "T = 3; beta = 0.2" in rows["kd"]
    assert "(1→4, 2→8)" in rows["inner"]
    assert "real tokens that are not special" in rows["inner"]
    assert "DistilBERT" in rows["inner"]


def test_the_loss_that_was_computed_is_shown_and_cited():
    text = render_card(record(logit_loss="binary_forward_kl")).text
    assert "`binary_forward_kl`" in text
    assert "Multi-Label Knowledge Distillation" in text


def test_stages_are_told_in_order():
    stages = [
        {
            "name": name,
            "terms": record().terms,
            "teacher": {**TEACHER_MODEL, "origin": origin},
            "student": STUDENT_MODEL,
            "data": {"rows": 100},
            "learning_rate": 1e-4,
            "steps": 7,
            "epochs": 1.0,
            "metrics": {"train_loss": 0.5},
        }
        for name, origin in (("first", "run"), ("second", "previous"))
    ]
    text = render_card(record(stages=stages)).text
    assert text.index("| 1 | first |") < text.index("| 2 | second | the student of the stage before |")
    assert "What **second** minimised" in text


def test_names_cannot_break_the_page():
    bad = {**STUDENT_MODEL, "name": "a|b<script>*", "on_hub": False}
    card = render_card(record(teacher={**bad, "kind": "LocalTeacher"}, name="x_y*z"))
    assert "<script>" not in card.text
    assert "a\\|b" in card.text


def test_data_without_a_name_are_called_by_their_files_or_their_builder_and_are_no_data_set_of_the_hub():
    rows = {"name": None, "on_hub": False, "rows": 800, "fingerprint": "f00d", "builder": "csv"}
    card = render_card(record(data={"train": {**rows, "files": ["a_b.csv", "c|d.csv"]}, "eval": rows}))
    assert "| Training | local files: a_b.csv, c\\|d.csv (builder `csv`) |" in card.text
    assert "| Evaluation | not named (builder `csv`) |" in card.text
    assert "datasets" not in card.data.to_dict()
    assert {each.dataset_type for each in card.data.eval_results} == {"unknown"}
    named = render_card(record(data={"train": {**rows, "files": ["a.csv"]}}), options=CardOptions(dataset="Mine"))
    assert "| Training | Mine |" in named.text
    older = render_card(record(data={"train": {**ROWS, "name": None, "on_hub": False, "rows": 1}}))
    assert "| Training | not named |" in older.text


def test_a_card_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = write_card(tmp_path, record=record(), report=report())
    before = path.read_bytes()
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_card(tmp_path, record=record(name="another"), report=report())
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert path.read_bytes() == before


def test_equal_records_make_equal_cards():
    assert str(render_card(record(), report())) == str(render_card(record(), report()))


@pytest.mark.parametrize("name", [*tiny.ZOO, "embedding"])
def test_every_head_has_a_pipeline_of_the_hub_and_code_that_compiles(name):
    model = tiny.embedder("bert") if name == "embedding" else tiny.ZOO[name][0]()
    kind = {"sound": "audio-classification", "image": "image-classification", "speech": "automatic-speech-recognition"}
    kind |= {"features": "automatic-speech-recognition", "causal": "text-generation", "masked": "fill-mask"}
    kind |= {"sequence": "text-classification", "number": "text-classification", "multi_label": "text-classification"}
    kind |= {"tokens": "token-classification", "spans": "question-answering", "choices": "multiple-choice"}
    kind |= {"translation": "text2text-generation"}
    made = record(student=describe_model(model), task=str(find_task(model)))
    expected = "feature-extraction" if name == "embedding" else kind[tiny.ZOO[name][1]]
    assert pipeline_tag(made) == expected
    for processing in ("Tokenizer", None):
        compile(usage(replace(made, processing=processing), "me/student"), "card", "exec")
    assert (render_card(made).data.pipeline_tag is None) == (expected == "multiple-choice")


def test_tasks_without_a_text_form_still_get_a_card():
    for task in Task:
        for reads in ("input_ids", "pixel_values", "input_values"):
            made = record(task=str(task), student={**STUDENT_MODEL, "input": reads})
            compile(usage(made, "x"), "card", "exec")
            assert render_card(made).text


def test_the_card_passes_through_the_hubs_validator(monkeypatch):
    received = []

    class Validator(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Validator)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    card = render_card(record(), report())
    card.validate()
    server.server_close()
    [(path, body)] = received
    assert (path, body["repoType"]) == ("/api/validate-yaml", "model")
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)[1])
    assert head == card.data.to_dict()


def test_a_record_made_of_plain_json_is_enough():
    again = RunRecord.from_dict(record().to_dict())
    assert str(render_card(again)) == str(render_card(record()))
