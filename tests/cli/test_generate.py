"""`hf-distill generate`: what it writes, prints and refuses. That its help loads no torch: see test_student."""

import json
import shutil
import subprocess
import sys

import datasets
import pytest
from datasets import load_dataset

from hf_distill.cli.main import main
from hf_distill.generation.arguments import GenerationArguments
from tests.generation.writers import causal, words


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    causal().save_pretrained(tmp_path / "teacher")
    words().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\nw3\n", encoding="utf-8")
    return str(tmp_path / "teacher")


def generate(teacher, tmp_path, *options):
    return main(["generate", teacher, str(tmp_path / "prompts.txt"), str(tmp_path / "out"), *options])


def test_answers_are_written_and_summed_up(teacher, tmp_path, capsys):
    options = ["--max_new_tokens", "5", "--do_sample", "--top_k", "9", "--generation_kwargs", '{"min_new_tokens": 2}']
    assert generate(teacher, tmp_path, *options, "--seed", "3") == 0
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows["prompt"][:] == ["w1 w2", "w3"]
    assert rows.column_names == ["prompt", "completion", "finished"]
    settings = json.loads((tmp_path / "out/generation.json").read_text(encoding="utf-8"))["settings"]
    assert settings["seed"] == 3
    assert {"do_sample": True, "top_k": 9, "min_new_tokens": 2}.items() <= settings["generation"].items()
    printed = capsys.readouterr().out
    assert f"2 answers to 2 prompts in {tmp_path / 'out'}; prompts left out: 1 repeated; " in printed
    assert "tokens/s" in printed
    assert generate(teacher, tmp_path, *options, "--seed", "3") == 0
    assert "all there already" in capsys.readouterr().out


@pytest.mark.parametrize("value", [["=4"], ["", "4"]])
def test_an_unknown_option_is_told_with_the_commands_usage_and_the_nearest(capsys, value):
    with pytest.raises(SystemExit) as end:
        main(["generate", "t", "p", "o", f"--max_new_tokenz{value[0]}", *value[1:]])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "usage: hf-distill generate [-h]" in said
    assert "unrecognized arguments: --max_new_tokenz" in said
    assert said.endswith("Did you mean '--max_new_tokens'?\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_new_tokens", "64"], "no room"),
        (["--max_new_tokens", "4", "--top_p", "0.5"], "do_sample"),
        (
            ["--max_new_tokens", "4", "--column", "question"],
            "no column 'question'; there are: text. Choose one with column= (--column)",
        ),
        (["--max_new_tokens", "4", "--tokenizer", "nowhere/at-all"], "nowhere/at-all"),
        (["--teacher_model_init_kwargs", "bfloat16"], "no JSON object"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(teacher, tmp_path, capsys, options, message):
    assert generate(teacher, tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert "hf-distill generate: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["generation.json", ".parts/settings.json", ".parts/part-000000.json"])
def test_a_torn_file_of_the_answers_is_named(name, teacher, tmp_path, capsys):
    assert generate(teacher, tmp_path, "--max_new_tokens", "4") == 0
    torn, record = tmp_path / "out" / name, tmp_path / "out" / "generation.json"
    if torn != record:  # as before the end
        (tmp_path / "out" / ".parts").mkdir()
        shutil.rmtree(tmp_path / "out" / "data")
        note = {"settings": json.loads(record.read_text(encoding="utf-8"))["settings"], "about": {}}
        (tmp_path / "out" / ".parts" / "settings.json").write_text(json.dumps(note), encoding="utf-8")
        record.unlink()
    torn.write_text('{"settings": {"seed"', encoding="utf-8")
    assert generate(teacher, tmp_path, "--max_new_tokens", "4") == 1
    printed = capsys.readouterr().err
    assert f"hf-distill generate: {torn} is damaged (" in printed
    assert ("Choose a new folder." if torn == record else "Delete it; what it held is made again.") in printed
    if torn != record:
        torn.unlink()
        assert generate(teacher, tmp_path, "--max_new_tokens", "4") == 0


def test_an_interruption_is_one_line(teacher, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_distill.generation.answers.generate_answers", stop)
    assert generate(teacher, tmp_path) == 130
    assert capsys.readouterr().err == "hf-distill generate: stopped; repeat the command to go on\n"


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "hf_distill", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("hf-distill ")


def test_every_argument_has_an_option_and_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in GenerationArguments.names():
        assert f"--{name} " in printed.replace("\n", " \n")
    assert "Traceback" not in printed


def test_numbers_are_read_as_numbers(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "teacher", "prompts", "out", "--max_new_tokens", "many"])
    assert stop.value.code == 2
    assert "max_new_tokens" in capsys.readouterr().err
