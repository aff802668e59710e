"""Rows of prompts and completions, and what a student's likeliest answers to them are."""

from typing import Any

import torch

from tests.tiny import VOCABULARY, pair
from tests.training import make_trainer

GREEDY = {"do_sample": False}
# The student alone is trained on its own text; nothing of the data's.
ALWAYS = {"lmbda": 1.0, "task_weight": 0.0, "kd_weight": 1.0, "max_new_tokens": 6}


def prompt_rows(count: int = 8, *, length: int = 10, left: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a prompt of 2 to 4 tokens and a completion of 3 or 4, padded to `length`."""
    generator = torch.Generator().manual_seed(seed)
    return [_row(2 + i % 3, 3 + i % 2, length, left, generator) for i in range(count)]


def _row(prompt: int, completion: int, length: int, left: bool, generator: torch.Generator) -> dict[str, Any]:
    real = prompt + completion
    tokens = torch.randint(3, VOCABULARY, (real,), generator=generator)
    places = torch.arange(real) + (length - real if left else 0)
    empty = torch.zeros(length, dtype=torch.long)
    return {
        "input_ids": empty.index_put((places,), tokens),
        "attention_mask": empty.index_put((places,), torch.tensor(1)),
        "labels": (empty - 100).index_put((places[prompt:],), tokens[prompt:]),
    }


def prompt_of(row: dict[str, Any]) -> list[int]:
    """A row's tokens that have no label."""
    return row["input_ids"][row["attention_mask"].bool() & (row["labels"] == -100)].tolist()


def likeliest_answer(model: Any, prompt: list[int], count: int, end: int | None = None) -> list[int]:
    """The answer token by token, by forwards of the whole text: no cache, no padding, no `generate`."""
    model.eval()
    answer: list[int] = []
    while len(answer) < count and (end is None or end not in answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    model.train()
    return answer


def likeliest_translation(model: Any, row: dict[str, Any], count: int, end: int | None = None) -> list[int]:
    """The same of an encoder-decoder model: the answer after its start token."""
    model.eval()
    answer: list[int] = []
    kept = row["attention_mask"].bool()
    while len(answer) < count and (end is None or end not in answer):
        decoder = torch.tensor([[model.config.decoder_start_token_id, *answer]])
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][kept][None], decoder_input_ids=decoder).logits
        answer.append(int(logits[0, -1].argmax()))
    model.train()
    return answer


def on_policy_trainer(folder: Any, name: str = "llama", *, models: Any = None, **options: Any) -> Any:
    """A trainer whose student writes every batch, unless the options say another share."""
    data = options.pop("data", None) or prompt_rows()
    settings = {**ALWAYS, **options}
    return make_trainer(folder, name, models=models or pair(name), train_dataset=data, eval_dataset=data, **settings)


def window(trainer: Any, batches: int = 1) -> tuple[list[dict[str, Any]], Any]:
    """The first window of a trainer's batches, and its counts."""
    trainer.model.train()
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), batches, trainer.args.device)
