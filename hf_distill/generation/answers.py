"""A data set of the teacher's answers, written part by part: what a student learns from at the sequence level."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_distill.generation.arguments import GenerationArguments, read_mapping
from hf_distill.generation.folder import AnswerFolder
from hf_distill.generation.loading import load_writer, longest_prompt, tokenizer_fingerprint
from hf_distill.generation.options import answer_config, writing_as
from hf_distill.generation.progress_bar import ProgressBar
from hf_distill.generation.prompts import Prompt, Prompts, Question, choose_prompts, read_prompts, with_template_kwargs
from hf_distill.generation.writing import Answer, AnswerWriter
from hf_distill.models.fingerprint import fingerprint

_PACKAGES = ("hf-distill", "transformers", "tokenizers", "torch")
# The processes wait for the slowest one only at the end, which may be long.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class GenerationSummary:
    """What a call made.

    Attributes:
        output: the folder.
        rows: of the data set.
        counts: of the prompts and the answers, as in the record beside the data set.
        tokens_per_second: written in this call, by all processes; 0 where all was there already.
    """

    output: Path
    rows: int
    counts: dict[str, int]
    tokens_per_second: float

    def __str__(self) -> str:
        counts, left_out = self.counts, ("empty", "repeated", "too_long")
        prompts = [f"{counts[name]} {name.replace('_', ' ')}" for name in left_out if counts[name]]
        parts = [f"{self.rows} answers to {counts['prompts']} prompts in {self.output}"]
        parts += [f"prompts left out: {', '.join(prompts)}"] if prompts else []
        parts += [f"{counts['unfinished']} answers unfinished{' and dropped' if counts['dropped'] else ''}"]
        parts += [f"{counts['duplicates']} duplicates dropped"]
        parts += [f"{self.tokens_per_second:.0f} tokens/s" if self.tokens_per_second else "all there already"]
        return "; ".join(parts) + "."


def generate_answers(
    teacher: nn.Module | str | os.PathLike,
    prompts: str | os.PathLike | Sequence[Prompt] | Dataset,
    output: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    teacher_model_init_kwargs: Mapping[str, Any] | str | None = None,
    **options: Any,
) -> GenerationSummary:
    """Writes a data set of the teacher's answers, which `datasets.load_dataset(output)` reads, and says what it holds.

    Its columns are `prompt`, `completion` and `finished` (whether the teacher ended the answer itself). Where a prompt
    is a conversation, it is a list of messages, and so is its completion; the `tools` and `chat_template_kwargs` that
    the chat template was given for it stand beside them. A call that was cut off goes on when it is repeated, on any
    number of processes, and ends with the same rows.

    Args:
        teacher: a causal or an encoder-decoder language model, its Hub name or its folder. A module stays where it is.
        prompts: a file (txt, csv, json, jsonl, parquet), a folder, a name on the Hub, a data set, or the prompts.
        output: a folder, new or with the parts of an earlier call.
        tokenizer: the teacher's, or its name; None for the one saved with the teacher.
        teacher_model_init_kwargs: arguments of `from_pretrained` for a teacher given by name, as a dict or JSON.
        options: the fields of `GenerationArguments`.

    Raises:
        TypeError: the teacher generates no text, the prompts are none, or an option is unknown.
        ValueError: an option that means nothing, prompts that cannot be answered, a folder with something else in it.
    Source: Kim & Rush 2016, arXiv:1606.07947, section 3.2: the mode of the teacher's distribution over sequences,
        which a beam search approximates, stands for the distribution.
    """
    arguments = GenerationArguments(**options)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    model, tokenizer, names = load_writer(
        teacher, tokenizer, read_mapping("teacher_model_init_kwargs", teacher_model_init_kwargs), state.device
    )
    config = answer_config(model, tokenizer, arguments)
    writer = AnswerWriter(model, tokenizer, config)
    max_tokens = longest_prompt(model, arguments.max_new_tokens)
    with state.main_process_first():
        rows = read_prompts(prompts, split=arguments.split, dataset_config=arguments.dataset_config)
    chosen = choose_prompts(
        with_template_kwargs(rows, read_mapping("chat_template_kwargs", arguments.chat_template_kwargs)),
        arguments.column,
        encode=writer.encode,
        max_tokens=max_tokens,
        skip_long_prompts=arguments.skip_long_prompts,
    )
    folder = AnswerFolder(output, _settings(writer, chosen, arguments))
    source = {"source": os.fspath(prompts), "split": arguments.split} if isinstance(prompts, str | os.PathLike) else {}
    about = {**names, "prompts": source, "versions": {package: version(package) for package in _PACKAGES}}
    with writing_as(model, config):
        tokens_per_second = _fill(folder, chosen, writer, arguments, about, state)
    counts = folder.record()["counts"]
    return GenerationSummary(folder.path, counts["answers"], chosen.counts | counts, tokens_per_second)


def _settings(writer: AnswerWriter, prompts: Prompts, arguments: GenerationArguments) -> dict[str, Any]:
    """All that decides the rows; the same settings give the same rows."""
    generation = json.loads(writer.config.to_json_string())
    generation = {name: value for name, value in generation.items() if name[0] != "_" and "version" not in name}
    kept = ("seed", "batch_size", "save_steps", "drop_unfinished", "chat_template_kwargs")
    return {
        "teacher": fingerprint(writer.teacher),
        "tokenizer": tokenizer_fingerprint(writer.tokenizer),
        "prompts": {"column": prompts.column, "fingerprint": prompts.fingerprint, **prompts.counts},
        "generation": generation,
        **{name: getattr(arguments, name) for name in kept},
    }


def _fill(
    folder: AnswerFolder,
    prompts: Prompts,
    writer: AnswerWriter,
    arguments: GenerationArguments,
    about: Mapping[str, Any],
    state: PartialState,
) -> float:
    """Writes the parts that are missing, each process its share, and joins them; returns tokens per second."""
    size = arguments.batch_size * arguments.save_steps
    parts = math.ceil(len(prompts) / size)
    folder.check()
    state.wait_for_everyone()  # before one writes what another would check
    if folder.finished:
        if state.is_main_process:
            folder.tidy()
        return 0.0
    if state.is_main_process:
        folder.begin(about)
    missing, before = folder.missing(parts), folder.counts(parts)
    state.wait_for_everyone()  # before one writes what another would not find missing
    share = missing[state.process_index :: state.num_processes]
    started = time.perf_counter()
    total = sum(min(size, len(prompts) - size * number) for number in share)
    with ProgressBar(total, shown=state.is_main_process) as progress:
        for number in share:
            part = prompts.part(number * size, (number + 1) * size)
            answers = _answer(part, number, writer, arguments, progress)
            folder.save_part(number, *_kept(part, answers, drop_unfinished=arguments.drop_unfinished))
    state.wait_for_everyone()
    if state.is_main_process:
        folder.finish(parts, _features(prompts))
    state.wait_for_everyone()
    tokens = folder.record()["counts"]["completion_tokens"] - before.get("completion_tokens", 0)
    return tokens / (time.perf_counter() - started)


def _answer(
    part: list[Question], number: int, writer: AnswerWriter, arguments: GenerationArguments, progress: ProgressBar
) -> list[list[Answer]]:
    """The answers to each prompt of a part, which are the same whoever writes it and whatever came before."""
    ids = writer.encode(part)
    # The longest first: where memory is short, the first batch says so.
    order = sorted(range(len(part)), key=lambda i: -len(ids[i]))
    answers: dict[int, list[Answer]] = {}
    for step, start in enumerate(range(0, len(part), arguments.batch_size)):
        batch = order[start : start + arguments.batch_size]
        written = writer.write(
            [ids[i] for i in batch],
            goes_on=isinstance(part[0].prompt, str),
            seed=arguments.seed,
            number=number * arguments.save_steps + step,
        )
        answers |= dict(zip(batch, written, strict=True))
        progress.advance(len(batch))
    return [answers[i] for i in range(len(part))]


def _kept(
    part: list[Question], answers: list[list[Answer]], *, drop_unfinished: bool
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of a part, and its counts; prompts differ from each other, so that equal rows have the same one."""
    rows: list[dict[str, Any]] = []
    counts = dict.fromkeys(("answers", "unfinished", "dropped", "duplicates", "completion_tokens"), 0)
    for question, written in zip(part, answers, strict=True):
        texts: set[str] = set()
        for answer in written:
            counts["completion_tokens"] += answer.tokens
            counts["unfinished"] += not answer.finished
            if drop_unfinished and not answer.finished:
                counts["dropped"] += 1
            elif answer.text in texts:
                counts["duplicates"] += 1
            else:
                texts.add(answer.text)
                completion = answer.text if isinstance(question.prompt, str) else [_turn(answer.text)]
                row = {"prompt": question.prompt, "completion": completion, "finished": answer.finished}
                rows.append({**row, **question.beside})
    counts["answers"] = len(rows)
    return rows, counts


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _features(prompts: Prompts) -> Features:
    conversation = List({name: Value("string") for name in _turn("")})
    (first,) = prompts.part(0, 1)
    completion = Value("string") if isinstance(first.prompt, str) else conversation
    features = prompts.rows.features
    columns = {"prompt": features[prompts.column], "completion": completion, "finished": Value("bool")}
    return Features({**columns, **{name: features[name] for name in first.beside}})
