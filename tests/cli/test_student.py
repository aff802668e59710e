"""`hf-distill student`: what it writes, prints and refuses."""

import subprocess
import sys
import time

import pytest
import transformers as hf

from hf_distill.cli.main import COMMANDS, main
from tests.tiny import bart, bert, tokenizer, vit


@pytest.fixture
def teacher(tmp_path):
    words = ["good", "bad", "film", "plot"]
    bert("MaskedLM", layers=4, vocab_size=9).save_pretrained(tmp_path / "teacher")
    tokenizer(words).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_student_and_its_tokenizer_are_written_and_described(teacher, tmp_path, capsys):
    out = str(tmp_path / "student")
    assert main(["student", teacher, out, "--layers", "2", "--hidden_size", "16", "--init", "importance"]) == 0
    printed = capsys.readouterr()
    student = hf.AutoModelForMaskedLM.from_pretrained(out)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    assert hf.AutoTokenizer.from_pretrained(out).tokenize("good film") == ["good", "film"]
    assert "layers (from 0): 0, 3" in printed.out
    assert out in printed.out
    assert "Loading weights" not in printed.err


def test_a_corpus_trims_the_vocabulary(teacher, tmp_path):
    (tmp_path / "texts.txt").write_text("good film\ngood\n", encoding="utf-8")
    out = str(tmp_path / "student")
    assert main(["student", teacher, out, "--corpus", str(tmp_path / "texts.txt")]) == 0
    assert len(hf.AutoTokenizer.from_pretrained(out)) == 7


def test_another_layout_with_chosen_layers(teacher, tmp_path):
    out = str(tmp_path / "student")
    assert main(["student", teacher, out, "--architecture", "distilbert", "--layers", "0,3"]) == 0
    assert hf.AutoConfig.from_pretrained(out).model_type == "distilbert"


def test_a_model_without_a_tokenizer_is_written_alone(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "teacher")
    assert main(["student", str(tmp_path / "teacher"), str(tmp_path / "out"), "--layers", "1"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out


def test_stacks_are_given_by_name(tmp_path):
    teacher, out = str(tmp_path / "teacher"), str(tmp_path / "out")
    bart(layers=3).save_pretrained(teacher)
    assert main(["student", teacher, out, "--layers", "encoder=0,2", "decoder=1"]) == 0
    config = hf.AutoConfig.from_pretrained(out)
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "choose 1 to 4"),
        (["--layers", "2", "decoder=1"], "every part with its stack"),
        (["--architecture", "gpt2"], "no rule to copy"),
        (["--tokenizer", "nowhere/at-all"], "No tokenizer"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(teacher, tmp_path, capsys, options, message):
    assert main(["student", teacher, str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert "hf-distill student: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        main(["--debug", "student", teacher, str(tmp_path / "out"), *options])


def test_a_folder_with_something_in_it_is_not_overwritten(teacher, capsys):
    assert main(["student", teacher, teacher]) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["student", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_wrong_arguments_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["student", "teacher", "out", "--layers", "many"])
    assert stop.value.code == 2
    assert "0,2,5" in capsys.readouterr().err


def test_help_loads_no_torch_and_comes_at_once():
    code = """
import sys
from hf_distill.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    print("loaded", *({"torch", "transformers", "datasets", "yaml", "rich"} & {*sys.modules}))
"""
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        started = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert run.stdout.endswith("loaded\n")
        assert time.perf_counter() - started < 3.0  # 0.1 s on an idle machine
