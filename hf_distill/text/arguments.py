"""The settings of raw text: how it becomes rows of tokens, and rows become batches."""

from dataclasses import dataclass, field, fields
from typing import Any

from hf_distill.config.checks import check_choice

TRUNCATION_MODES = ("keep_start", "keep_end")
PACKING_STRATEGIES = ("bfd", "wrapped")


@dataclass
class TextArguments:
    """What is read of a data set of raw text, for a causal language model.

    Raises:
        ValueError: an unknown word, a length that is none, or settings that nobody would read together.
    """

    dataset_text_field: str = field(default="text", metadata={"help": "The column of plain text."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens kept of each text, and the length of packed rows; None keeps all."}
    )
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "Which end of a long text is kept: keep_start or keep_end."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Whether several texts share a row of max_length tokens, each seeing itself alone. Evaluation "
            "sets are not packed."
        },
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "bfd (best fit decreasing) keeps every text whole; wrapped cuts them at the row's end, so that "
            "rows are full."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Whether a training batch is one row, its texts one after another, without padding. It pays with "
            "flash attention, and with other attention where texts are short."
        },
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Whether prompts have no loss; they have none unless this is False."}
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Whether only the assistant's turns have a loss: of messages, unless this is False; of prompts "
            "and completions that are messages, if it is True."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Rows of a batch are padded to a multiple of this length."}
    )

    def check_text(self) -> None:
        """Refuses settings that do not fit together."""
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        check_choice("packing_strategy", self.packing_strategy, PACKING_STRATEGIES)
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}, but it is a number of tokens, at least 1, or None.")
        if self.packing and self.max_length is None:
            raise ValueError("packing=True fills rows of max_length tokens, and max_length is None. Set max_length.")
        if not self.packing and self.packing_strategy != "bfd":
            raise ValueError(f"packing_strategy={self.packing_strategy!r}, but packing is False. Set packing=True.")
        if self.packing_strategy == "wrapped" and self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r}, but packing_strategy='wrapped' cuts no text short: what "
                "does not fit a row goes on in the next. Drop one."
            )
        if self.max_length is None and self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r}, but max_length is None, so nothing is cut. Set max_length."
            )
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of}, but padding_free=True leaves nothing to pad. Drop one."
            )


def given_fields(args: TextArguments, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The text settings, or those of `names`, that are not at their default."""
    chosen = [field for field in fields(TextArguments) if names is None or field.name in names]
    return {field.name: value for field in chosen if (value := getattr(args, field.name)) != field.default}
