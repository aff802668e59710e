"""One batch: prompts to tokens, tokens through the teacher, new tokens to texts."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hf_distill.generation.prompts import Question
from hf_distill.text.beginnings import begun_once, own_beginning
from hf_distill.text.conversations import Conversation


class Answer(NamedTuple):
    """What the teacher wrote for a prompt.

    Attributes:
        text: without special tokens and without the prompt.
        finished: whether the teacher ended it, before the tokens ran out.
        tokens: how many it took, the end included.
    """

    text: str
    finished: bool
    tokens: int


class AnswerWriter:
    """A teacher with its tokenizer and its way to write; neither of them is changed.

    Args:
        teacher: a causal or an encoder-decoder language model, in `writing_as(teacher, config)` when it writes.
        tokenizer: the teacher's.
        config: from `answer_config`.
    """

    def __init__(self, teacher: nn.Module, tokenizer: Any, config: GenerationConfig) -> None:
        model: Any = teacher
        self.teacher = model
        self.tokenizer = tokenizer
        self.config = config
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._beginning = own_beginning(tokenizer)
        # A tokenizer that ends every text would have the teacher write on after an end.
        ending = {*tokenizer("a")["input_ids"][-1:]}
        self._drops_end = not self.encoder_decoder and not ending.isdisjoint(config.eos_token_id)

    def encode(self, questions: list[Question]) -> list[list[int]]:
        """The tokens of each prompt, a conversation through the chat template, up to where the answer begins.

        Raises:
            ValueError: conversations, and a tokenizer without a chat template; tokens that the teacher does not have.
        """
        ids = self._tokens(questions)
        largest = max((max(row) for row in ids if row), default=0)
        if largest >= self._vocabulary:
            raise ValueError(
                f"The tokenizer {self.tokenizer.name_or_path!r} gives token {largest}, and the teacher has embeddings "
                f"for {self._vocabulary}. Give the tokenizer the teacher was trained with."
            )
        return ids

    def _tokens(self, questions: list[Question]) -> list[list[int]]:
        if isinstance(questions[0].prompt, str):
            ids = self.tokenizer([each.prompt for each in questions], verbose=False)["input_ids"]
            ids = [begun_once(row, self._beginning) for row in ids]
            return [row[:-1] for row in ids] if self._drops_end else ids
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The prompts are conversations, and the tokenizer {self.tokenizer.name_or_path!r} has no chat "
                "template. Give prompts as texts, or a tokenizer with the template the teacher was trained with."
            )
        conversations = (
            Conversation.of_row(self.tokenizer, each.prompt, each.beside, each.number) for each in questions
        )
        return [conversation.tokens(asks=True) for conversation in conversations]

    def write(self, prompts: list[list[int]], *, goes_on: bool, seed: int, number: int) -> list[list[Answer]]:
        """The answers to each prompt of a batch.

        Args:
            prompts: the batch, as `encode` gives it.
            goes_on: whether an answer is to be read as the rest of its prompt's text.
            seed: of the run.
            number: of the batch in the run; with the seed it decides what is drawn, whatever was drawn before.
        """
        drawn = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
        new = self._generate(prompts, int(drawn >> 1))
        per_prompt = self.config.num_return_sequences
        # Word pieces lose the space before them at the start of a text: it is only seen behind the prompt.
        lead = prompts if goes_on and not self.encoder_decoder else [[]] * len(prompts)
        answers = [self._read(row, lead[i // per_prompt]) for i, row in enumerate(new.tolist())]
        return [answers[i : i + per_prompt] for i in range(0, len(answers), per_prompt)]

    def _generate(self, ids: list[list[int]], seed: int) -> Tensor:
        """(batch x answers, new tokens) the teacher's tokens, without the prompt."""
        device = self.teacher.device
        # Padding comes first where the answer goes on behind the prompt.
        side = "right" if self.encoder_decoder else "left"
        rows = [torch.tensor(row) for row in ids]
        masks = [torch.ones_like(row) for row in rows]
        inputs = pad_sequence(rows, True, self.config.pad_token_id, side).to(device)
        mask = pad_sequence(masks, True, 0, side).to(device)
        devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            # `tokenizer` is read for stop_strings.
            output = self.teacher.generate(
                input_ids=inputs, attention_mask=mask, generation_config=self.config, tokenizer=self.tokenizer
            )
        # An encoder-decoder model's output begins with the token that starts its decoder.
        return output[:, 1 if self.encoder_decoder else inputs.shape[1] :].cpu()

    def _read(self, row: list[int], lead: list[int]) -> Answer:
        ends = [i for i, token in enumerate(row) if token in self.config.eos_token_id]
        new = row[: ends[0]] if ends else row
        before, whole = (self._decode(tokens) for tokens in (lead, lead + new))
        text = whole[len(before) :] if whole.startswith(before) else self._decode(new)
        stops = self.config.stop_strings or []
        stopped = any(stop in text for stop in ([stops] if isinstance(stops, str) else stops))
        finished = bool(ends) or stopped or len(row) < self.config.max_new_tokens
        return Answer(text, finished, len(new) + bool(ends))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
