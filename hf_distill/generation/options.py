"""How the teacher writes: options of `generate`, checked before the first batch, and the teacher's own elsewhere."""

import copy
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from hf_distill.generation.arguments import GenerationArguments, read_mapping
from hf_distill.models.heads import task_model

_ALWAYS_GIVEN = ("max_new_tokens", "do_sample", "num_beams", "num_return_sequences")
# Options of GenerationConfig that cannot be given among the others: what to do instead.
_ELSEWHERE = {
    **{name: f"give it as {name}, an argument of its own" for name in (*_ALWAYS_GIVEN, "top_p", "top_k")},
    "temperature": "give it as generation_temperature, an argument of its own",
    "max_length": "give max_new_tokens",
    "max_time": "it would make the answers depend on the speed of the machine",
    "token_healing": "it changes the prompt",
    **dict.fromkeys(("return_dict_in_generate", *GenerationConfig.extra_output_flags), "only answers are kept"),
}
# With sampling, where neither the caller nor the teacher's generation config says otherwise: the teacher's whole
# distribution. Transformers' own default would cut it to the 50 likeliest tokens.
_WHOLE_DISTRIBUTION = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def answer_config(teacher: nn.Module, tokenizer: Any, arguments: GenerationArguments) -> GenerationConfig:
    """Everything that decides what is written; an option that is not given is as in the teacher's generation config.

    Args:
        teacher: a model that can generate.
        tokenizer: whose end of sequence ends an answer too, and whose padding is used where it has some.
        arguments: what was asked for.

    Raises:
        ValueError: an unknown option, one that means nothing beside the others, or no token that ends an answer.
    """
    draw = {"temperature": arguments.generation_temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    others = read_mapping("generation_kwargs", arguments.generation_kwargs)
    _check_names(others)
    given = {name: getattr(arguments, name) for name in _ALWAYS_GIVEN}
    given |= {name: value for name, value in draw.items() if value is not None} | others
    # Set one by one: the constructor would only warn of what the check refuses.
    checked = GenerationConfig()
    for name, value in given.items():
        setattr(checked, name, value)
    checked.validate(strict=True, user_set_attributes=set(given))

    config = copy.deepcopy(task_model(teacher).generation_config)
    for name, value in given.items():
        setattr(config, name, value)
    if arguments.do_sample:
        config.update(**_WHOLE_DISTRIBUTION, defaults_only=True)
    config.max_length = None
    config.eos_token_id = _ends(config, tokenizer, chosen="eos_token_id" in others)
    if "pad_token_id" not in others:
        config.pad_token_id = config.eos_token_id[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return config


@contextmanager
def writing_as(teacher: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """The teacher in eval mode with `config` as its own, so that `generate` fills in nothing else."""
    # PEFT's causal wrapper has a generation config of its own, and puts it over that of the model at each call.
    owners = [module for module in (teacher, task_model(teacher)) if "generation_config" in vars(module)]
    before = [(owner, owner.generation_config) for owner in owners]
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, kept in before:
            owner.generation_config = kept
        for module, training in modes:
            module.training = training


def _check_names(others: Mapping[str, Any]) -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {*_ELSEWHERE}
    for name in others:
        if name in _ELSEWHERE:
            raise ValueError(f"generation_kwargs has {name!r}: {_ELSEWHERE[name]}.")
        if name not in known:
            nearest = difflib.get_close_matches(name, {*known, *_ELSEWHERE}, n=1)
            suggestion = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"generation_kwargs has {name!r}, which is no option of transformers.GenerationConfig.{suggestion}"
            )


def _ends(config: GenerationConfig, tokenizer: Any, *, chosen: bool) -> list[int]:
    """The ids that end an answer: of chat models often more than the tokenizer's own."""
    ends = config.eos_token_id
    ids = [] if ends is None else [ends] if isinstance(ends, int) else [*ends]
    if not chosen and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            "Neither the teacher's generation config nor the tokenizer names an end-of-sequence token, so no answer "
            'would ever end. Give one: generation_kwargs={"eos_token_id": ...}.'
        )
    return ids
