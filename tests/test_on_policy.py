"""Batches whose answers the student writes: what it writes, and what enters the terms."""

import logging
import warnings

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

from hf_distill import DistillationTrainingArguments
from hf_distill.chunked_terms import ChunkedTerms
from hf_distill.fused_terms import FusedTerms
from hf_distill.items import LABEL_MASK
from hf_distill.on_policy import OnPolicy, prompt_mask, up_to_end
from tests import tiny
from tests.on_policy_cases import (
    GREEDY,
    likeliest_answer,
    likeliest_translation,
    on_policy_trainer,
    prompt_of,
    prompt_rows,
    window,
)
from tests.training import arguments, batch_of, logged


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_a_prompt_is_what_comes_before_the_first_label(left):
    rows = prompt_rows(3, left=left)
    batch = batch_of(rows)
    for row, mask in zip(rows, prompt_mask(batch), strict=True):
        assert row["input_ids"][mask].tolist() == prompt_of(row)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(prompt_mask(unlabelled), batch["attention_mask"].bool())
    # A second turn's answer is no part of the first one's prompt, nor is the user's second turn.
    labels = torch.tensor([[-100, -100, 5, -100, 7]])
    assert prompt_mask({"input_ids": labels, "labels": labels}).tolist() == [[True, True, False, False, False]]


def test_an_answer_ends_with_the_first_end():
    tokens = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [9, 2, 0, 0]])
    assert up_to_end(tokens, [2, 9]).tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]
    assert up_to_end(tokens, []).all()


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_batch_holds_the_prompts_with_the_students_answers_up_to_the_end(name, left, tmp_path):
    models, rows = tiny.pair(name), prompt_rows(4, left=left)
    student = models[0]
    # A token that comes up early in some answers ends them.
    end = likeliest_answer(student, prompt_of(rows[1]), 2)[-1]
    student.generation_config.eos_token_id = end
    answers = [likeliest_answer(student, prompt_of(row), 6, end) for row in rows]
    assert len({len(answer) for answer in answers}) > 1
    for row in rows:
        row["position_ids"] = (row["attention_mask"].cumsum(0) - 1).clamp(min=0)
    trainer = on_policy_trainer(tmp_path, name, models=models, data=rows, generation_kwargs=GREEDY)
    (batch,), counts = window(trainer)
    longest = max(len(prompt_of(row)) + len(answer) for row, answer in zip(rows, answers, strict=True))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, longest)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        prompt = prompt_of(row)
        real, rest = len(prompt) + len(answer), longest - len(prompt) - len(answer)
        assert batch["input_ids"][i, :real].tolist() == prompt + answer
        assert batch["labels"][i].tolist() == [-100] * len(prompt) + answer + [-100] * rest
        assert batch["attention_mask"][i].tolist() == [1] * real + [0] * rest
        assert batch["position_ids"][i, :real].tolist() == [*range(real)]
    assert int(counts.kd) == sum(map(len, answers))
    assert int(counts.task[0]) == 0
    assert student.training


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_answers_what_its_encoder_reads(name, tmp_path):
    models, rows = tiny.pair(name), tiny.rows("translation", 4)
    student = models[0]
    student.generation_config.forced_eos_token_id = None
    student.generation_config.eos_token_id = end = likeliest_translation(student, rows[0], 3)[-1]
    answers = [likeliest_translation(student, row, 6, end) for row in rows]
    trainer = on_policy_trainer(tmp_path, name, models=models, data=rows, generation_kwargs=GREEDY)
    (batch,), counts = window(trainer)
    longest = max(map(len, answers))
    assert batch["labels"].tolist() == [answer + [-100] * (longest - len(answer)) for answer in answers]
    assert torch.equal(batch["input_ids"], batch_of(rows)["input_ids"])
    assert int(counts.kd) == sum(map(len, answers))
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0


def test_prompts_without_labels_are_answered_whole(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in prompt_rows(4)]
    trainer = on_policy_trainer(tmp_path, data=rows, generation_kwargs=GREEDY)
    (batch,), _ = window(trainer)
    for i, row in enumerate(rows):
        prompt = row["input_ids"][row["attention_mask"].bool()].tolist()
        answer = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert answer == likeliest_answer(trainer.model, prompt, 6, 2)


def test_the_share_of_the_draws_is_lmbda_whatever_else_is_random(tmp_path):
    args = arguments(tmp_path, lmbda=0.3)
    drawn = []
    for attempt in range(2):
        torch.manual_seed(attempt)
        own = OnPolicy(args, task="causal_lm")
        drawn.append([own.is_drawn(step, number) for step in range(1000) for number in range(2)])
    assert drawn[0] == drawn[1]
    assert sum(drawn[0]) / 2000 == pytest.approx(0.3, abs=0.03)
    both = sum(a and b for a, b in zip(drawn[0][::2], drawn[0][1::2], strict=True)) / 1000
    assert both == pytest.approx(0.09, abs=0.03)  # micro-batches of one step are drawn apart
    args.seed += 1
    assert [OnPolicy(args, task="causal_lm").is_drawn(step, 0) for step in range(1000)] != drawn[0][::2]


def test_answers_are_samples_at_their_own_temperature(tmp_path):
    rows = prompt_rows(4)

    def labels(**options):
        (batch,), _ = window(on_policy_trainer(tmp_path, data=rows, **options))
        return batch["labels"].tolist()

    likeliest = labels(generation_kwargs=GREEDY)
    assert labels(generation_temperature=1e-4) == likeliest
    warm = labels(generation_temperature=5.0)
    assert warm != likeliest
    assert warm == labels(generation_temperature=5.0)
    assert warm != labels(generation_temperature=5.0, seed=7)
    assert labels(generation_temperature=5.0, generation_kwargs={"top_k": 1}) == likeliest
    assert labels(generation_temperature=1e-4, temperature=9.0) == likeliest
    assert max(map(len, labels(max_new_tokens=2))) == 6


def test_a_models_own_sampling_settings_change_nothing(tmp_path):
    def labels(**settings):
        models = tiny.pair("llama")
        models[0].generation_config.update(**settings)
        (batch,), _ = window(on_policy_trainer(tmp_path, models=models))
        return batch["labels"].tolist()

    own = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "min_p": 0.9, "do_sample": False}
    assert labels(**own) == labels()


def test_answers_end_with_the_students_context(tmp_path):
    torch.manual_seed(0)
    models = tiny.llama(max_position_embeddings=8), tiny.llama()
    trainer = on_policy_trainer(tmp_path, models=models, data=prompt_rows(4), generation_kwargs={"min_new_tokens": 4})
    (batch,), _ = window(trainer)
    assert batch["input_ids"].shape[1] == 8
    unlabelled = [{"input_ids": torch.full((8,), 5)}] * 4
    with pytest.raises(ValueError, match=r"prompt of 8 tokens fills the student's context of 8"):
        window(on_policy_trainer(tmp_path, models=models, data=unlabelled))


def test_only_tokens_that_the_teacher_knows_are_written(tmp_path):
    torch.manual_seed(0)
    padded = tiny.llama(vocab_size=2000)  # as heads are, beyond the tokens of both
    both = {"processing_class": tiny.tokenizer(), "teacher_processing_class": tiny.tokenizer()}
    trainer = on_policy_trainer(tmp_path, models=(padded, tiny.llama()), **both)
    (batch,), _ = window(trainer)
    assert batch["input_ids"].max() < tiny.VOCABULARY
    assert trainer.train().training_loss > 0


PATHS = ["without logits", "fused", "apart", "smoothed", "own loss"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_students_own_text_is_no_target_of_the_task_loss(name, path, tmp_path, monkeypatch):
    """Of two micro-batches the student writes the first: the teacher scores both, labels teach the second alone."""
    monkeypatch.setattr(OnPolicy, "is_drawn", lambda self, step, number: number == 0)
    if path != "without logits":
        monkeypatch.setattr(ChunkedTerms, "suit", lambda *args: False)
    if path == "apart":
        monkeypatch.setattr(FusedTerms, "suits", lambda *args: False)
    seen = []

    def own_loss(outputs, labels, num_items_in_batch):
        seen.append(labels)
        logits = outputs["logits"][:, :-1] if name == "llama" else outputs["logits"]
        labels = labels[:, 1:] if name == "llama" else labels
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    rows = prompt_rows(8) if name == "llama" else tiny.rows("translation")
    options = {
        "lmbda": 0.5,
        "task_weight": 0.7,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "temperature": 1.0,
        "generation_kwargs": GREEDY,
        "label_smoothing_factor": 0.1 if path == "smoothed" else 0.0,
        "compute_loss_func": own_loss if path == "own loss" else None,
    }
    trainer = on_policy_trainer(tmp_path, name, data=rows, **options)
    (written, _), _ = window(trainer, 2)
    expected = reference_gradients(trainer, written, batch_of(rows[4:]), smoothing=options["label_smoothing_factor"])
    trainer.train()
    assert all(torch.equal(labels, batch_of(rows[4:])["labels"]) for labels in seen)
    assert (len(seen) > 0) == (path == "own loss")
    assert logged(trainer, "loss_task") == pytest.approx([expected["task"]], rel=1e-5)
    assert logged(trainer, "loss_kd") == pytest.approx([expected["kd"]], rel=1e-5)
    assert logged(trainer, "loss") == pytest.approx([0.7 * expected["task"] + expected["kd"]], rel=1e-4)
    assert logged(trainer, "on_policy_fraction") == [0.5]
    tokens = int((written["labels"] != -100).sum())
    assert logged(trainer, "generated_length") == pytest.approx([tokens / 4])
    assert logged(trainer, "labelled_fraction") == [0.5]


def reference_gradients(trainer, written, taught, *, smoothing):
    """The two terms of a window by their formulas, in float64."""
    shift = 1 if written["input_ids"].shape == written["labels"].shape else 0
    values, items = [], 0
    for batch in (written, taught):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            pairs = [model.eval()(**inputs).logits.double() for model in (trainer.model, trainer.teacher.model)]
        labels = batch["labels"][:, shift:]
        student, teacher = (F.log_softmax(logits[:, : labels.shape[1]], -1)[labels != -100] for logits in pairs)
        values.append((teacher.exp() * (teacher - student)).sum())
        items += len(student)
    nll = -student.gather(1, labels[labels != -100][:, None]).mean()
    task = (1 - smoothing) * nll - smoothing * student.mean()
    trainer.model.train()
    return {"task": float(task), "kd": float(sum(values) / items)}


def test_a_window_that_the_student_wrote_whole_logs_no_task_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(OnPolicy, "is_drawn", lambda self, step, number: step == 0)
    trainer = on_policy_trainer(tmp_path, lmbda=0.5, task_weight=1.0)
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "loss" in log]
    assert "loss_task" not in first
    assert first["on_policy_fraction"] == 1
    assert second["loss_task"] > 1
    assert second["on_policy_fraction"] == 0
    assert "generated_length" not in second
    together = on_policy_trainer(tmp_path, lmbda=0.5, task_weight=1.0, logging_steps=2)
    together.train()
    assert logged(together, "loss_task") == [second["loss_task"]]
    assert logged(together, "generated_length") == [first["generated_length"]]


def test_learning_from_its_own_text_brings_the_student_to_the_teacher(tmp_path):
    torch.manual_seed(0)
    options = {"kd_loss": "reverse_kl", "temperature": 1.0, "learning_rate": 3e-3, "max_steps": 40}
    trainer = on_policy_trainer(tmp_path, **options)
    trainer.train()
    kd = logged(trainer, "loss_kd")
    assert sum(kd[-5:]) < 0.8 * sum(kd[:5])
    assert logged(trainer, "on_policy_fraction") == [1.0] * 40


def test_an_evaluation_reads_the_data(tmp_path):
    own = on_policy_trainer(tmp_path).evaluate()
    data = on_policy_trainer(tmp_path, lmbda=0.0, max_new_tokens=128).evaluate()
    assert own["eval_loss"] == data["eval_loss"]
    assert own["eval_kd"] == data["eval_kd"]


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.told = []

    def emit(self, record):
        self.told.append(record.getMessage())


def test_adapters_and_checkpointed_gradients_learn_without_warnings(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    student, teacher = tiny.pair("llama")
    models = peft.get_peft_model(student, config), teacher
    messages = Messages()
    hf_logging.set_verbosity_warning()
    hf_logging.add_handler(messages)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = on_policy_trainer(tmp_path, models=models, gradient_checkpointing=True, max_steps=3)
            trainer.train()
    finally:
        hf_logging.remove_handler(messages)
        hf_logging.set_verbosity_error()
    told = [*messages.told, *(str(each.message) for each in caught)]
    assert [text for text in told if "cache" in text or "generat" in text or "checkpointing format" in text] == []
    assert logged(trainer, "loss_kd")[0] > 0
    assert all(log["generated_length"] > 1 for log in trainer.state.log_history if "loss" in log)


def test_a_student_with_experts_writes_too(tmp_path):
    models = tiny.mixtral(), tiny.mixtral(hidden=48)
    trainer = on_policy_trainer(tmp_path, models=models, generation_kwargs=GREEDY)
    (batch,), _ = window(trainer)
    expected = likeliest_answer(models[0], prompt_of(prompt_rows()[1]), 6, 2)
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == expected
    trainer.train()


def test_layers_are_matched_on_what_the_student_wrote(tmp_path):
    trainer = on_policy_trainer(tmp_path, hidden_weight=1.0, attention_weight=1.0, generation_kwargs=GREEDY)
    trainer.train()
    alone = on_policy_trainer(tmp_path, generation_kwargs=GREEDY)
    alone.train()
    assert logged(trainer, "loss_hidden")[0] > 0
    assert logged(trainer, "loss_attention")[0] > 0
    assert logged(trainer, "loss_kd")[0] == pytest.approx(logged(alone, "loss_kd")[0], rel=1e-6)


def test_rows_keep_their_weights(tmp_path):
    rows = [{**row, "quality": float(i % 2)} for i, row in enumerate(prompt_rows(4))]
    weights = [{"by": "column", "column": "quality"}]
    trainer = on_policy_trainer(tmp_path, data=rows, item_weights=weights)
    (batch,), counts = window(trainer)
    assert float(counts.kd) == int((batch["labels"][1::2] != -100).sum())


def test_a_command_line_sets_the_arguments_of_generate(tmp_path):
    words = ["--output_dir", str(tmp_path), "--lmbda", "0.5", "--generation_kwargs", '{"top_k": 3}']
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(words)
    assert (args.lmbda, args.generation_kwargs) == (0.5, {"top_k": 3})


def test_a_batch_is_marked_and_its_marks_reach_no_model(tmp_path):
    trainer = on_policy_trainer(tmp_path)
    (inputs,), _ = window(trainer)
    batch = trainer.split(inputs)
    assert batch.is_on_policy
    assert not batch.has_targets
    assert not inputs[LABEL_MASK].any()
    assert {*batch.student} == {*batch.teacher} == {"input_ids", "attention_mask", "labels"}
