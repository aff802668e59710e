"""What to ask of a teacher that writes a data set; imports nothing heavy, as the command line reads it."""

import json
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class GenerationArguments:
    """How answers are generated, from which prompts, and which of them are kept.

    Raises:
        ValueError: a number out of its range, or text that is no JSON.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "Length of an answer at most, in tokens."})
    do_sample: bool = field(
        default=False,
        metadata={"help": "Draw the tokens. Else the likeliest ones are taken, or searched with num_beams."},
    )
    generation_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the draw. Not given: as in the teacher's generation config, else 1."},
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Share of the probability that is drawn from. Not given: as in the teacher's generation config, "
            "else 1."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "How many of the likeliest tokens are drawn from; 0 for all. Not given: as in the teacher's "
            "generation config, else 0."
        },
    )
    num_beams: int = field(
        default=1, metadata={"help": "Width of the beam search, 5 in Kim & Rush (2016); 1 for none."}
    )
    num_return_sequences: int = field(
        default=1, metadata={"help": "Answers to a prompt, with sampling or beams. Equal ones are kept once."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Other options of transformers.GenerationConfig as JSON, e.g. '{\"length_penalty\": 0.8}'."},
    )
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time, in each process."})
    save_steps: int = field(
        default=16,
        metadata={"help": "Batches between two savings. Within them prompts are sorted by length."},
    )
    split: str = field(
        default="train", metadata={"help": "Split of the prompts' data set; 'train[:1000]' takes a part of it."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the prompts' data set, where it has several."}
    )
    column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts: texts, or conversations, whose last answer is dropped. Not given: the "
            "first there is of prompt, messages and text."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables for the chat template as JSON, e.g. '{\"enable_thinking\": false}'."},
    )
    drop_unfinished: bool = field(
        default=False, metadata={"help": "Leave out answers that ran out of tokens before the teacher ended them."}
    )
    skip_long_prompts: bool = field(
        default=False,
        metadata={
            "help": "Leave out prompts that leave no room for an answer in the teacher's window. Else: an error."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("generation_kwargs", "chat_template_kwargs"):
            object.__setattr__(self, name, read_mapping(name, getattr(self, name)))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of all arguments."""
        return tuple(field.name for field in fields(cls))


def read_mapping(name: str, value: Any) -> dict[str, Any]:
    """A dict from itself or from JSON; empty for None.

    Raises:
        ValueError: it is neither.
    """
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        read = value
    if read is not None and not isinstance(read, dict):
        raise ValueError(f"{name}={value!r} is no JSON object. Write it as '{{\"name\": 1}}'.")
    return dict(read or {})
