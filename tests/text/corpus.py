"""A small tokenizer and small texts for it, made in the process."""

from functools import cache
from typing import Any

import tokenizers
import transformers as hf

SENTENCES = [
    "the old lighthouse keeper counted the ships",
    "a ship without a name came in the morning",
    "nobody asked where it had come from",
    "he wrote its colour into the book",
    "the book had room for one more line",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

# A turn is header, content, end and a line break, as in ChatML.
TURN = "{{ '<|' + message['role'] + '|>' }}{{ message['content'] + '<|end|>\n' }}"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As of models that think: only the last answer keeps its thoughts.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '(hm) ' }}{% endif %}"
    "{{ message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@cache
def _backend() -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return backend.to_str()


def tokenizer(template: str | None = None, *, begins: bool = False, **options: Any) -> Any:
    """A byte-level BPE tokenizer of 330 tokens that puts nothing behind a text, and `<s>` before it with `begins`."""
    backend = tokenizers.Tokenizer.from_str(_backend())
    if begins:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    options = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", **options}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    made.chat_template = template
    return made


VOCABULARY = 330


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages, of the user first."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def supervised(made: Any, row: dict[str, list[int]]) -> str:
    """What of a tokenised row has a loss, as text; a gap is a bar."""
    parts, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100:
            parts += [made.decode(current)] if current else []
            current = []
        else:
            assert label == token
            current.append(token)
    return "|".join([*parts, *([made.decode(current)] if current else [])])
