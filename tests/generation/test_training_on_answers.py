"""From prompts to a student: what the teacher wrote is what the trainer reads."""

import pytest
import torch
from datasets import load_dataset

from hf_distill import DistillationTrainer, DistillationTrainingArguments, generate_answers
from tests.generation.writers import CHAT, answer_ids, causal, some_prompts, spaced, words


@pytest.mark.parametrize("chat", [False, True])
def test_a_student_learns_the_tokens_that_the_teacher_wrote(tmp_path, chat):
    teacher, tokenizer = causal(), words(chat_template=CHAT) if chat else spaced()
    prompts = some_prompts()
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    generate_answers(teacher, prompts, tmp_path / "answers", tokenizer=tokenizer, max_new_tokens=8)
    torch.manual_seed(1)
    trainer = DistillationTrainer(
        model=causal(),
        teacher_model=teacher,
        args=DistillationTrainingArguments(
            str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True
        ),
        train_dataset=load_dataset(str(tmp_path / "answers"), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    if chat:
        return
    for row, prompt in zip(trainer.train_dataset, dict.fromkeys(prompts), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        written = answer_ids(teacher, ids, max_new_tokens=8)[0]
        assert [label for label in row["labels"] if label != -100] == [token for token in written if token != 0]
