"""On-policy steps are the same however their rows are cut, after a resume, and on several processes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.invariants.on_policy_two_processes import SPLITS, save_results, steps_of
from tests.invariants.steps import Run, assert_same_steps, distil, with_dropout
from tests.invariants.test_resume import logged, models_of, trainer_of
from tests.on_policy_cases import ALWAYS, GREEDY, on_policy_trainer, prompt_rows, window
from tests.processes import run_twice

HALF = {"lmbda": 0.5, "max_new_tokens": 5}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_likeliest_answers_teach_the_same_in_any_micro_batches(name, output_dir):
    rows = tiny.rows("translation", 16) if name == "t5" else prompt_rows(16)
    options = {**ALWAYS, "generation_kwargs": GREEDY, "hidden_weight": 0.5}
    whole = distil(tiny.pair(name), rows, output_dir, 8, 1, **options)
    for batch, accumulation in ((4, 2), (2, 4)):
        assert_same_steps(distil(tiny.pair(name), rows, output_dir, batch, accumulation, **options), whole)


def test_prompts_padded_on_either_side_teach_the_same(output_dir):
    options = {**ALWAYS, "generation_kwargs": GREEDY}
    right, left = (
        distil(tiny.pair("gpt2"), prompt_rows(8, length=length, left=left), output_dir, **options)
        for length, left in ((10, False), (14, True))
    )
    assert_same_steps(left, right)


def prompted(name, output_dir, **changes):
    """The training that is resumed elsewhere, with dropout, on prompts."""
    trainer = trainer_of(name, output_dir, **changes)
    trainer.train_dataset = prompt_rows(16)
    return trainer


@pytest.mark.parametrize("name", ["llama", "llama with LoRA"])
def test_a_resumed_training_writes_what_an_uninterrupted_one_does(name, output_dir):
    whole = prompted(name, output_dir, **HALF)
    whole.train()
    fractions = [log["on_policy_fraction"] for log in logged(whole)]
    assert {0.5} < {*fractions}
    resumed = prompted(name, output_dir, **HALF)
    resumed.train(resume_from_checkpoint=str(Path(output_dir, "checkpoint-3")))
    assert logged(resumed)[3:] == logged(whole)[3:]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


def test_a_share_that_is_never_drawn_is_a_plain_training_to_the_bit(output_dir):
    plain = prompted("llama", output_dir)
    plain.train()
    never = prompted("llama", output_dir, lmbda=1e-12)
    never.train()
    kept = [{key: value for key, value in log.items() if key != "on_policy_fraction"} for log in logged(never)]
    assert kept == logged(plain)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(never.model.state_dict()[key], value), key


def test_writing_leaves_all_random_states_and_the_modes_as_they_were(output_dir):
    student, teacher = models_of("llama")
    student.model.layers[0].eval()
    trainer = on_policy_trainer(output_dir, models=(student, teacher))
    student.train()
    student.model.layers[0].eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    torch.set_rng_state(states[0])
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert student.training
    assert not student.model.layers[0].training


def test_answers_are_written_without_dropout(output_dir):
    student, teacher = tiny.pair("llama")
    (expected,), _ = window(on_policy_trainer(output_dir, models=(student, teacher), generation_kwargs=GREEDY))
    trainer = on_policy_trainer(output_dir, models=(with_dropout(student), teacher), generation_kwargs=GREEDY)
    (batch,), _ = window(trainer)
    assert torch.equal(batch["labels"], expected["labels"])


def test_two_processes_write_and_count_what_one_does(tmp_path, output_dir, subtests):
    path = tmp_path / "results.pt"
    run_twice(save_results, path)
    results = torch.load(path, weights_only=True)
    assert results["processes"] == 2
    one = steps_of("always", 8, 1, output_dir)
    for split in SPLITS:
        with subtests.test(split):
            two = results[str(("always", *split))]
            assert_same_steps(Run(**two), Run(**one))
            for log, expected in zip(two["logs"], one["logs"], strict=True):
                assert log["on_policy_fraction"] == 1
                assert log["generated_length"] == pytest.approx(expected["generated_length"])
    # The ranks draw alike, so that a step's batches are all the students' or all the data's; as one process would.
    alone = [log["on_policy_fraction"] for log in steps_of("half", 8, 1, output_dir)["logs"]]
    assert [log["on_policy_fraction"] for log in results[str(("half", 4, 1))]["logs"]] == alone
    assert {*alone} == {0.0, 1.0}
