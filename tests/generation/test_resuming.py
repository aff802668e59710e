"""A run that was cut off goes on to what it would have been; another run is refused the folder."""

import pytest

from hf_distill.generation.answers import generate_answers
from tests.generation.two_processes import write
from tests.generation.writers import SAMPLED, SMALL, causal, encoder_decoder, files, some_prompts, words
from tests.processes import run_twice


class CutOffError(Exception):
    """The machine went away."""


def cut_off(teacher, prompts, folder, *, after, **options):
    """A run that ends in its forward pass number `after`."""
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) > after:
            raise CutOffError

    handle = teacher.register_forward_pre_hook(count)
    with pytest.raises(CutOffError):
        generate_answers(teacher, prompts, folder, **options)
    handle.remove()


@pytest.mark.parametrize("options", [SAMPLED, {"num_beams": 2}], ids=["sampled", "beams"])
@pytest.mark.parametrize("make", [causal, encoder_decoder])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been_byte_for_byte(tmp_path, make, options):
    teacher, prompts = make(), some_prompts(11)
    options = {"tokenizer": words(), **SMALL, **options}
    generate_answers(teacher, prompts, tmp_path / "whole", **options)
    for after in (3, 20, 10):  # in the first part; two parts on; nearly nothing new
        cut_off(teacher, prompts, tmp_path / "cut", after=after, **options)
    parts = [path.name for path in sorted((tmp_path / "cut/.parts").glob("part-*"))]
    assert 0 < len(parts) < 3
    generate_answers(teacher, prompts, tmp_path / "cut", **options)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert sorted(files(tmp_path / "cut")) == ["data/train-00000-of-00001.parquet", "generation.json"]


def test_nothing_is_written_twice(tmp_path):
    teacher, options = causal(), {"tokenizer": words(), **SMALL}
    first = generate_answers(teacher, some_prompts(), tmp_path / "out", **options)
    before = files(tmp_path / "out")
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked again"))
    second = generate_answers(teacher, some_prompts(), tmp_path / "out", **options)
    assert files(tmp_path / "out") == before
    assert second.rows == first.rows
    assert first.tokens_per_second > second.tokens_per_second == 0
    assert "all there already" in str(second)


def test_a_run_cut_off_while_its_parts_are_joined_is_mended(tmp_path):
    teacher, options = causal(), {"tokenizer": words(), **SMALL}
    generate_answers(teacher, some_prompts(), tmp_path / "whole", **options)
    cut_off(teacher, some_prompts(), tmp_path / "out", after=12, **options)
    (tmp_path / "out/data").mkdir()
    (tmp_path / "out/data/train-00000-of-00001.parquet").write_bytes(b"half")
    (tmp_path / "out/.parts/part-000002.json").unlink(missing_ok=True)
    generate_answers(teacher, some_prompts(), tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_seed_draws_other_answers(tmp_path):
    teacher, options = causal(), {"tokenizer": words(), **SMALL, **SAMPLED}
    for seed in (0, 1):
        generate_answers(teacher, some_prompts(), tmp_path / str(seed), seed=seed, **options)
    data = [files(tmp_path / str(seed))["data/train-00000-of-00001.parquet"] for seed in (0, 1)]
    assert data[0] != data[1]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"max_new_tokens": 9}, "generation.max_new_tokens is 8 there and 9 here"),
        ({"do_sample": True, "top_k": 3}, "generation.top_k is None there and 3 here"),
        ({"batch_size": 4}, "batch_size is 2 there and 4 here"),
        ({"teacher": causal(seed=2)}, "teacher.weights is"),
        ({"tokenizer": words(chat_template="another")}, "tokenizer is"),
        ({"prompts": ["w1"]}, "prompts.fingerprint is"),
        ({"drop_unfinished": True}, "drop_unfinished is False there and True here"),
    ],
)
def test_a_folder_of_other_answers_is_refused_with_what_differs(tmp_path, finished, change, named):
    asked = {"teacher": causal(), "prompts": some_prompts(6), "tokenizer": words(), **SMALL}
    if finished:
        generate_answers(output=tmp_path / "out", **asked)
    else:
        cut_off(folder=tmp_path / "out", after=10, **asked)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=named):
        generate_answers(output=tmp_path / "out", **asked | change)
    assert files(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("42", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds other things than answers: thesis\.tex"):
        generate_answers(causal(), ["w1"], tmp_path / "out", tokenizer=words(), max_new_tokens=2)
    with pytest.raises(ValueError, match="is a file"):
        generate_answers(causal(), ["w1"], tmp_path / "out/thesis.tex", tokenizer=words(), max_new_tokens=2)


def test_two_processes_write_what_one_does(tmp_path):
    """Also where one process began and two go on."""
    options = {"tokenizer": words(), **SMALL, **SAMPLED}
    generate_answers(causal(), some_prompts(15), tmp_path / "one", **options)
    cut_off(causal(), some_prompts(15), tmp_path / "cut", after=20, **options)
    run_twice(write, tmp_path / "two", tmp_path / "cut")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert files(tmp_path / "cut") == files(tmp_path / "one")
