"""On-policy batches: the student answers the prompts of a batch, and these answers are what the teacher scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_distill.accounting import TermMeter
from hf_distill.batches import ON_POLICY, TARGETS, Batch, student_inputs
from hf_distill.items import IGNORE_INDEX, LABEL_MASK, batch_size
from hf_distill.models.heads import context_length, task_model
from hf_distill.signals import Task
from hf_distill.teachers import in_eval_mode
from hf_distill.weighting import ITEM_WEIGHT

# What a model's own generation config may hold, and the value with which it changes nothing about the samples.
_PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    **dict.fromkeys(
        (
            "top_h",
            "exponential_decay_length_penalty",
            "sequence_bias",
            "guidance_scale",
            "forced_eos_token_id",
            "stop_strings",
            "max_time",
            "prompt_lookup_num_tokens",
        )
    ),
    **dict.fromkeys(("return_dict_in_generate", "early_stopping"), False),
}
_CAUSAL_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids")
_DECODER_COLUMNS = (*TARGETS, "decoder_input_ids", "decoder_attention_mask")


def make_on_policy(trainer: Any) -> "OnPolicy | None":
    """What writes a trainer's on-policy batches; None where there are none.

    Args:
        trainer: a `DistillationTrainer` with its pair of models.

    Raises:
        ValueError: the student cannot write, or the teacher cannot read what it writes.
    """
    args, pair = trainer.args, trainer._pair
    if args.lmbda == 0:
        return None
    name = type(task_model(trainer.model)).__name__
    writes = pair.task in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM) and task_model(trainer.model).can_generate()
    if not writes or task_model(trainer.model).main_input_name != "input_ids":
        raise ValueError(
            f"lmbda={args.lmbda}, but {name} ({pair.task}) cannot answer a prompt of text. Take a causal or an "
            "encoder-decoder language model, or lmbda=0."
        )
    if pair.needs_teacher_inputs:
        raise ValueError(
            f"lmbda={args.lmbda}, but the teacher has another tokenizer, so it cannot read the tokens that the "
            "student writes. Take a teacher with the student's tokenizer, or lmbda=0."
        )
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"lmbda={args.lmbda} under FSDP or DeepSpeed ZeRO-3: no process has the whole student to write with. Use "
            "DDP or ZeRO-2, or lmbda=0."
        )
    terms = args.distillation
    if terms.balance.kind == "uncertainty" and terms.task.weight > 0:
        raise ValueError(
            f"loss_balance='uncertainty' beside lmbda={args.lmbda}: only some of the batches have a task loss, and "
            "its uncertainty would be learned from the others too. Set task_weight=0, or balance by magnitude."
        )
    return OnPolicy(
        args,
        task=pair.task,
        classes=pair.classes,
        pad_token_id=getattr(trainer.processing_class, "pad_token_id", None),
    )


class OnPolicy:
    """Which batches the student writes, and what it writes in them.

    Both follow from the seed, the step and the number of the micro-batch alone, and what is written from the rank too:
    all ranks draw alike, a resumed training goes on as one that never stopped, and whatever else is random in a
    training stays as it was.

    Args:
        args: with the fields of `OnPolicyArguments`, checked.
        task: causal or encoder-decoder language model.
        classes: how many leading tokens the teacher knows too; None for all. Only these are written.
        pad_token_id: the tokenizer's, for a student that has none of its own.
    """

    def __init__(self, args: Any, *, task: Task, classes: int | None = None, pad_token_id: int | None = None) -> None:
        self.args, self.task, self.classes, self.pad_token_id = args, task, classes, pad_token_id

    def is_drawn(self, step: int, number: int) -> bool:
        """Whether the student writes micro-batch `number` of a step."""
        return bool(np.random.default_rng([self.args.seed, step, number, 0]).random() < self.args.lmbda)

    def replace(self, batches: list[Any], trainer: Any, *, check: bool) -> list[Any]:
        """A window of batches, in which those that are drawn hold the student's answers.

        Args:
            batches: the collated micro-batches of one step.
            trainer: the trainer, for its student as it is now.
            check: whether to look at the first batch even where it is not drawn.

        Raises:
            ValueError: a batch that holds more than prompts and answers, or a row without a prompt.
        """
        if check:
            self._check(batches[0], trainer)
        student = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        step, replaced = trainer.state.global_step, [*batches]
        for number, inputs in enumerate(batches):
            if not self.is_drawn(step, number):
                continue
            self._check(inputs, trainer)
            seed = [self.args.seed, step, number, 1 + trainer.accelerator.process_index]
            inputs = trainer._prepare_inputs(inputs)
            # torch.manual_seed below reaches all devices.
            with in_eval_mode(student), torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
                torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
                if self.task is Task.CAUSAL_LM:
                    replaced[number] = self._continued(student, inputs)
                else:
                    replaced[number] = self._answered(student, inputs, trainer)
        return replaced

    def note(self, meter: TermMeter, batch: Batch) -> None:
        """Adds a batch to what is logged."""
        counts = batch.items.counts()
        meter.add("written_of", counts[4])
        if batch.is_on_policy:
            meter.add("written_rows", counts[4])
            meter.add("written_tokens", counts[2])

    def describe(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The share of the rows that the student wrote, and the tokens it wrote in one, of a meter's totals."""
        rows = totals.get("written_rows", 0.0)
        length = {"generated_length": totals["written_tokens"] / rows} if rows else {}
        return {"on_policy_fraction": rows / totals["written_of"], **length}

    def _check(self, inputs: Mapping[str, Any], trainer: Any) -> None:
        """Refuses what does not fit another text than the data's, and rows without a prompt; waits for the device."""
        student = student_inputs(inputs, trainer._pair, trainer._extra_columns)
        known = _CAUSAL_COLUMNS if self.task is Task.CAUSAL_LM else (*student, *_DECODER_COLUMNS)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() > 1 and name not in known:
                remedy = "Weigh whole rows by a column of numbers" if name == ITEM_WEIGHT else "Drop the column"
                raise ValueError(
                    f"The batch's {name} {tuple(value.shape)} belongs to the text of the data, and with "
                    f"lmbda={self.args.lmbda} the student writes another. {remedy}, or set lmbda=0."
                )
        if "input_ids" not in inputs:
            raise ValueError(
                f"lmbda={self.args.lmbda} needs prompts in input_ids; the batch holds {', '.join(inputs)}."
            )
        if self.task is Task.CAUSAL_LM:
            self._check_rows(inputs)

    def _check_rows(self, inputs: Mapping[str, Any]) -> None:
        if _is_packed(inputs):
            raise ValueError(
                f"The batch packs several texts into a row, and with lmbda={self.args.lmbda} the student answers one "
                "prompt a row. Turn packing and padding_free off, or set lmbda=0."
            )
        if not prompt_mask(inputs).any(-1).all():
            raise ValueError(
                f"A row has a loss on its first token, so it has no prompt that the student could answer "
                f"(lmbda={self.args.lmbda}). Give prompt and completion columns, or labels that are -100 over the "
                "prompt; or set lmbda=0."
            )

    def _continued(self, student: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A causal model's batch: prompts and answers, padded on the right, with labels on the answers alone."""
        ids, asked = inputs["input_ids"], prompt_mask(inputs)
        # `generate` goes on from the last column.
        order = _gathered(asked, at_end=True)
        options = self._options(student, length=order.shape[1])
        prompt = asked.gather(1, order)
        written = _generate(student, options, input_ids=ids.gather(1, order), attention_mask=prompt.long())
        answer = up_to_end(written[:, order.shape[1] :], options["eos_token_id"])
        kept = torch.cat([prompt, answer], 1)
        labels = torch.where(torch.cat([torch.zeros_like(prompt), answer], 1), written, IGNORE_INDEX)
        order = _gathered(kept, at_end=False)
        made = {
            "input_ids": torch.where(kept, written, options["pad_token_id"]).gather(1, order),
            "attention_mask": kept.gather(1, order).long(),
            "labels": labels.gather(1, order),
        }
        if "position_ids" in inputs:
            made["position_ids"] = torch.arange(order.shape[1], device=ids.device).expand_as(order)
        return _marked({**inputs, **made})

    def _answered(self, student: nn.Module, inputs: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
        """An encoder-decoder model's batch: its own inputs, with the answers as labels."""
        read = student_inputs(inputs, trainer._pair, trainer._extra_columns)
        asked = {name: value for name, value in read.items() if name not in _DECODER_COLUMNS}
        options = self._options(student, length=1)
        # The first token is the one every decoder starts from, which is no label.
        written = _generate(student, options, **asked)[:, 1:]
        answer = up_to_end(written, options["eos_token_id"])
        others = {name: value for name, value in inputs.items() if name not in _DECODER_COLUMNS}
        return _marked({**others, "labels": torch.where(answer, written, IGNORE_INDEX)})

    def _options(self, student: Any, *, length: int) -> dict[str, Any]:
        """The arguments of `generate` for sequences that begin with `length` tokens."""
        model, own = task_model(student), student.generation_config
        given = dict(self.args.generation_kwargs or {})
        ends = given.pop("eos_token_id", own.eos_token_id)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else [*ends]
        # Some configs say -1 for none.
        pads = [given.pop("pad_token_id", None), own.pad_token_id, self.pad_token_id, *ends, 0]
        config, context = model.config.get_text_config(decoder=True), context_length(model)
        room = self.args.max_new_tokens if context is None else min(self.args.max_new_tokens, context - length)
        if room < 1:
            raise ValueError(
                f"A prompt of {length} tokens fills the student's context of {context}, so nothing can be written "
                "after it. Cut the prompts shorter."
            )
        options: dict[str, Any] = {"use_cache": True}
        options |= {name: value for name, value in _PLAIN.items() if getattr(own, name, None) is not None}
        if given.get("do_sample", True):
            options |= {"do_sample": True, "temperature": self.args.generation_temperature, "top_k": 0, "top_p": 1.0}
        if getattr(config, "output_router_logits", False):
            # The balance of experts is formed with it, over a mask that is longer than what a cached step reads.
            options["output_router_logits"] = False
        if self.classes is not None and self.classes < config.vocab_size:
            unknown = range(self.classes, config.vocab_size)
            given["suppress_tokens"] = [*(given.get("suppress_tokens") or own.suppress_tokens or ()), *unknown]
        pad = next(token for token in pads if token is not None and token >= 0)
        fixed = {"max_new_tokens": room, "pad_token_id": pad, "eos_token_id": ends}
        return {**options, **given, **fixed}


def prompt_mask(inputs: Mapping[str, Any]) -> Tensor:
    """(batch, length) bool: a row's real tokens before the first that has a label; all of them where none has."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return real if labels is None else real & ((labels != IGNORE_INDEX).cumsum(-1) == 0)


def up_to_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """(batch, length) bool: a row's tokens up to the first that ends it, and that one too.

    Args:
        tokens: (batch, length), as written: what follows an end is padding.
        ends: the tokens that end a row; without any no row ends.
    """
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return is_end.cumsum(-1) - is_end.long() == 0


def _is_packed(inputs: Mapping[str, Any]) -> bool:
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.dim() != 2:
        return True
    if positions is None:
        return False
    restarts = positions.diff(dim=-1) <= 0
    return bool((restarts if mask is None else restarts & mask[:, 1:].bool() & mask[:, :-1].bool()).any())


def _gathered(kept: Tensor, *, at_end: bool) -> Tensor:
    """(batch, longest) the places that bring a row's kept ones together, in their order, others beside."""
    order = (kept if at_end else ~kept).int().argsort(dim=-1, stable=True)
    longest = int(kept.sum(-1).max())  # `generate` has waited for the device all along
    return order[:, -longest:] if at_end else order[:, :longest]


def _generate(student: Any, options: Mapping[str, Any], **inputs: Tensor) -> Tensor:
    ends = options["eos_token_id"] or None
    tokens: Tensor = student.generate(**inputs, **{**options, "eos_token_id": ends})
    return tokens


def _marked(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch, marked as one whose labels are no target of the task loss."""
    none = torch.zeros(batch_size(inputs), dtype=torch.bool, device=inputs["labels"].device)
    return {**inputs, LABEL_MASK: none, ON_POLICY: True}
