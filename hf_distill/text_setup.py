"""Raw text in a training: its data sets tokenised, its batches made, and refused what would mix packed texts."""

import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_distill.collator import DistillationCollator
from hf_distill.config import MatchTerm
from hf_distill.dataset_checks import random_states_kept
from hf_distill.layer_training import LayerTrainingMixin
from hf_distill.losses.base import LOSSES
from hf_distill.models.heads import context_length, input_names, task_model
from hf_distill.signals import Task
from hf_distill.teachers import AdapterOffTeacher
from hf_distill.text.arguments import TextArguments, given_fields
from hf_distill.text.collation import make_collator
from hf_distill.text.columns import check_columns, say_which_columns
from hf_distill.text.formats import TextFormat
from hf_distill.text.preparation import (
    check_tokenised,
    largest_token,
    longest_row,
    prepare_text,
    prompt_lengths,
    text_format,
)
from hf_distill.text.probe import check_keeps_apart
from hf_distill.weighting import weighting_columns

_OF_THE_TRAINING = ("packing", "packing_strategy", "padding_free")
_UNPACKED = "Set packing=False and padding_free=False"


class TextMixin(LayerTrainingMixin):
    """Data sets of raw text for a causal language model, tokenised before they are read."""

    _common_collator: bool
    _text_collator: Any | None = None
    _packs_text: bool = False
    _text_settings: dict[str, Any] | None = None

    def _prepare_text(self) -> None:
        """Tokenises the data sets that hold raw text, and takes the collator for them."""
        args, train = self.args, self.train_dataset
        found = {name: self._format(part) for name, part in self._datasets.items()}
        _check_read(self, found)
        for name, part in self._datasets.items():
            self._check_columns(part, name)
        if found.get("train_dataset") is not None:
            if isinstance(train, Mapping):
                raise ValueError(
                    f"train_dataset is a dict of {', '.join(train)}. Pass one of them, or join them "
                    "(datasets.concatenate_datasets)."
                )
            self._packs_text = args.packing or args.padding_free
            _check_text_training(self)
            self.train_dataset = self._with_tokens(train, "train_dataset", training=True)
            _check_prompts(self)
            counts_rows = self.accelerator.num_processes > 1
            self.data_collator = make_collator(args, self._tokenizer, training=True, counts_rows=counts_rows)
        elif self._pads_labels:
            self._check_labels(train)
            self.data_collator = self._padding_collator()
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_tokens(self.eval_dataset, "eval_dataset")

    @property
    def _pads_labels(self) -> bool:
        """Whether tokenised rows of a language model are padded, by nobody but `Trainer`."""
        is_generative = self._pair.task in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM)
        tokenizer: Any = self.processing_class
        return is_generative and self.data_collator == DataCollatorWithPadding(tokenizer)

    def _check_labels(self, dataset: Any) -> None:
        """Of tokens that the user made: whether every one has its label, and any of them teaches."""
        if self._pair.task is Task.CAUSAL_LM:
            with random_states_kept():
                is_needed = getattr(self.args, "lmbda", 0) == 0 and not self.args.distillation.matches
                check_tokenised(dataset, "train_dataset", needs_labels=is_needed)

    def _padding_collator(self) -> Any:
        if self._pair.task is Task.CAUSAL_LM:
            return make_collator(self.args, self._tokenizer, training=False)
        return DataCollatorForSeq2Seq(self._tokenizer, pad_to_multiple_of=self.args.pad_to_multiple_of)

    @property
    def _datasets(self) -> dict[str, Any]:
        sets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        return {name: part for name, part in sets.items() if part is not None}

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _format(self, dataset: Any) -> Any:
        """The format of a data set of raw text, if it is read here: a collator of the user's own may tokenise."""
        if self._pair.task is not Task.CAUSAL_LM or not self._common_collator:
            return None
        with random_states_kept():
            return text_format(dataset, self.args.dataset_text_field)

    def _check_columns(self, dataset: Any, name: str) -> None:
        task = self._pair.task
        if not self.args.remove_unused_columns or task not in (Task.CAUSAL_LM, Task.SEQ2SEQ_LM, Task.MASKED_LM):
            return
        with random_states_kept():
            check_columns(
                dataset,
                name,
                task=task,
                inputs=input_names(self.model),
                text_field=self.args.dataset_text_field,
                own_collator=not self._common_collator,
            )

    def _with_tokens(self, dataset: Any, name: str, *, training: bool = False) -> Any:
        if self._format(dataset) is None:
            self._check_columns(dataset, name)
            return dataset
        kept = self._match_columns | weighting_columns(self.args.distillation.logits.item_weights)
        prepared = prepare_text(dataset, self.processing_class, self.args, training=training, kept=kept, name=name)
        self._text_settings = _settings(self.args)
        parts = dataset if isinstance(dataset, Mapping) else {None: dataset}
        for key, part in parts.items():
            if self._format(part) is not None:
                tokens, called = (prepared, name) if key is None else (prepared[key], key)
                say_which_columns(part, called, self._format(part), self.args.dataset_text_field, kept)
                _check_tokens(self, tokens, called)
                _check_length(self, tokens, called)
        if self._text_collator is None:
            self._text_collator = make_collator(self.args, self._tokenizer, training=False)
        return prepared

    def _check_text_settings(self) -> None:
        """Refuses text settings that were changed since the text was tokenised, as a search may."""
        now = _settings(self.args)
        changed = [f"{key}={now[key]!r}" for key, was in (self._text_settings or now).items() if now[key] != was]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} was set after the text was tokenised, so nobody reads it. Set it before the "
                "trainer is made; search over it with a trainer for each value."
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """`Trainer`'s, of raw text too."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._with_tokens(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """`Trainer`'s, of raw text too."""
        return super().get_test_dataloader(self._with_tokens(test_dataset, "test_dataset"))

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        collator: Any = self.data_collator
        is_ours = isinstance(collator, DistillationCollator)  # the user may have set one of their own since
        if self._text_collator is None or kwargs.get("is_training", False) or not is_ours:
            return super()._get_dataloader(*args, **kwargs)
        padding = copy(collator)
        padding.collator = self._text_collator
        self.data_collator = padding
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def _plan_layers(self, student: nn.Module) -> None:
        if self._packs_text:
            for match in self._terms.matches:
                if match.weight > 0:
                    _check_match(match, has_padding=not self.args.padding_free)
            self._try_packing(student)
        super()._plan_layers(student)

    def _try_packing(self, student: nn.Module) -> None:
        models = {"student": student}
        if self.teacher is not None and not isinstance(self.teacher, AdapterOffTeacher):
            models["teacher"] = self.teacher.model
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        collator = make_collator(self.args, self._tokenizer, training=True)
        for role, model in models.items():
            if is_deepspeed_zero3_enabled() or any(parameter.is_meta for parameter in model.parameters()):
                warnings.warn(
                    f"The weights of the {role} are not on this process yet, so whether it keeps packed texts apart "
                    f"could not be tried. Try it once without sharding, or {_UNPACKED.lower()}.",
                    stacklevel=2,
                )
                continue
            with random_states_kept():
                check_keeps_apart(model, collator, role=role, autocast=self.accelerator.autocast, dtype=dtype)


def _check_read(trainer: Any, found: Mapping[str, Any]) -> None:
    """Refuses text settings that no data set reads."""
    field, read = trainer.args.dataset_text_field, {part for part in found.values() if part is not None}
    if "dataset_text_field" in given_fields(trainer.args) and read and TextFormat.TEXT not in read:
        formats = " and ".join(sorted(part.value for part in read))
        raise ValueError(
            f"dataset_text_field={field!r}: nobody reads this, since the columns of {formats} go before it. Drop it, "
            "or these columns (Dataset.remove_columns)."
        )
    if not found or ("train_dataset" not in found and read):
        return
    names = _OF_THE_TRAINING if read else None
    given = given_fields(trainer.args, names)
    if trainer._pads_labels:
        given.pop("pad_to_multiple_of", None)
    if trainer.args.max_length is None:  # nothing is cut, as it says
        given.pop("max_length", None)
    if not given or found.get("train_dataset") is not None:
        return
    name = next(iter(found))
    dataset = getattr(trainer, name)
    columns = getattr(dataset, "column_names", None)
    if trainer._pair.task is not Task.CAUSAL_LM:
        reason = f"the student does {trainer._pair.task}, and raw text is read for causal_lm alone"
    elif not trainer._common_collator:
        reason = f"the data collator is your own ({type(trainer.data_collator).__name__}), so batches are its affair"
    elif columns is not None and "input_ids" not in columns:
        trainer._check_columns(dataset, name)
        reason = f"{name} has no column {field!r}, prompt and completion, or messages (it has {', '.join(columns)})"
    else:
        reason = f"{name} holds no raw text: it is tokenised already, or no data set of `datasets`"
    settings = ", ".join(f"{key}={value!r}" for key, value in given.items())
    raise ValueError(f"{settings}: nobody reads this, since {reason}. Drop it, or leave the text to the trainer.")


def _check_text_training(trainer: Any) -> None:
    """Refuses what cannot be trained on text, and what packed texts do not allow."""
    args, accelerator = trainer.args, trainer.accelerator
    is_stream = isinstance(trainer.train_dataset, IterableDataset)
    if accelerator.num_processes > 1 and is_stream and accelerator.dispatch_batches is not False:
        raise ValueError(
            "Of a stream the main process makes the batches of all, which must then be of one length, and those of "
            "text are not. Set accelerator_config={'dispatch_batches': False}: each process then reads its own rows."
        )
    if trainer._pair.needs_teacher_inputs:
        raise ValueError(
            "train_dataset holds raw text, which is tokenised for the student alone, and the teacher reads tokens of "
            "its own. Tokenise it for both, into input_ids and teacher_input_ids (for a language model with "
            "hf_distill.token_alignment.tokenize_for_teacher), or take a teacher with the student's tokenizer."
        )
    if not trainer._packs_text:
        return
    if args.use_cache:
        raise ValueError(
            "use_cache=True keeps models from telling packed texts apart by their position_ids. Set use_cache=False."
        )
    if getattr(args, "lmbda", 0) > 0:
        raise ValueError(
            f"lmbda={args.lmbda} has the student answer the prompt of each row, and packed rows have several. "
            f"{_UNPACKED}, or lmbda=0."
        )
    config = task_model(trainer.model).config.get_text_config(decoder=True)
    if not args.padding_free and getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{type(task_model(trainer.model)).__name__} balances its experts over the tokens of a batch, and packed "
            "rows are filled up without a mask that tells them. Set padding_free=True beside packing, or "
            "config.output_router_logits=False."
        )
    by_row = [setting for setting in trainer._weights_wanted if setting.columns]
    if args.packing and by_row:
        raise ValueError(
            f"item_weights read the columns {', '.join(sorted(weighting_columns(by_row)))} of each text, and a packed "
            "row is of several. Set packing=False; padding_free=True keeps the weights and pads nothing."
        )


def _settings(args: Any) -> dict[str, Any]:
    return {each.name: getattr(args, each.name) for each in fields(TextArguments)}


def _check_prompts(trainer: Any) -> None:
    """Refuses rows that an on-policy student cannot answer: it finds no prompt, or no room after it."""
    if trainer.args.completion_only_loss is False and getattr(trainer.args, "lmbda", 0) > 0:
        raise ValueError(
            f"completion_only_loss=False gives prompts a loss, and lmbda={trainer.args.lmbda} tells by the loss where "
            "a prompt ends. Drop completion_only_loss, or set lmbda=0."
        )
    lmbda = getattr(trainer.args, "lmbda", 0)
    if lmbda == 0 or not isinstance(trainer.train_dataset, Dataset):
        return
    prompts = prompt_lengths(trainer.train_dataset)
    context = context_length(trainer.model)
    if (without := int((prompts == 0).sum())) > 0:
        raise ValueError(
            f"{without} of the {len(prompts)} rows of train_dataset have a loss on their first token, so they have no "
            f"prompt that the student could answer (lmbda={lmbda}): plain text has none, and others are empty or "
            "were cut off. Give prompt and completion columns or messages, drop such rows (Dataset.filter), or set "
            "truncation_mode='keep_start', or lmbda=0."
        )
    if context is not None and (full := int((prompts >= context).sum())) > 0:
        raise ValueError(
            f"{full} of the {len(prompts)} rows of train_dataset have prompts that fill the student's context of "
            f"{context} tokens (lmbda={lmbda}), so nothing can be written after them. Set max_length={context - 1} or "
            "less, or drop the rows (Dataset.filter)."
        )


def _check_tokens(trainer: Any, dataset: Any, name: str) -> None:
    """Refuses texts with tokens that the student or the teacher has no embedding of."""
    if not isinstance(dataset, Dataset):
        return
    models = {"student": trainer.model, **({} if trainer.teacher is None else {"teacher": trainer.teacher.model})}
    for role, model in models.items():
        rows = getattr(task_model(model).get_input_embeddings(), "num_embeddings", None)
        if rows is None or len(trainer._tokenizer) <= rows or (largest := largest_token(dataset)) < rows:
            continue
        raise ValueError(
            f"{name} has the token {largest} ({trainer._tokenizer.convert_ids_to_tokens(largest)!r}), and the {role} "
            f"embeds {rows} tokens: the tokenizer ({len(trainer._tokenizer)}) was extended and the model was not. "
            "Call model.resize_token_embeddings(len(tokenizer)) first."
        )


def _check_length(trainer: Any, dataset: Any, name: str) -> None:
    """Refuses texts that are longer than a student's or a teacher's table of positions."""
    longest = longest_row(dataset) or trainer.args.max_length
    models = [trainer.model, *(() if trainer.teacher is None else (trainer.teacher.model,))]
    for model in map(task_model, models):
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is None or longest is None or longest <= positions:
            continue
        tables = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
        ]
        if tables:  # others compute their positions, and may go on
            raise ValueError(
                f"Texts of {name} have up to {longest} tokens, and {type(model).__name__} knows {positions} positions "
                f"({tables[0]}). Set max_length={positions}."
            )


def _check_match(match: MatchTerm, *, has_padding: bool) -> None:
    """Refuses a match whose items or features would be of all texts of a packed row."""
    spec = LOSSES.get(match.loss)
    reduction = spec.reference.items if match.reduction == "reference" else match.reduction
    features = [feature for feature in (match.student, match.teacher) if feature is not None]
    reason = None
    if spec.feature not in ("hidden", "attention") or match.heads == "relation":
        reason = f"{match.loss} relates the tokens of a row to each other"
    elif any(feature.pooling is not None for feature in features) or match.mask == "cls":
        reason = "it pools a row, or takes its first token"
    elif spec.item == "pair":
        reason = f"{match.loss} is a mean over all pairs of a row's tokens"
    elif reduction == "sample_mean" or spec.item == "sequence":
        reason = "it is a mean over rows"
    elif match.mask is not None and match.mask.startswith("batch:"):
        reason = "packed batches have no other columns"
    if reason is not None:
        raise ValueError(
            f"Match {match.name!r}: {reason}, and packed rows are of several texts. {_UNPACKED}, or compare hidden "
            "states token by token (hidden_mse), or attention query by query (attention_kl)."
        )
    if has_padding:
        raise ValueError(
            f"Match {match.name!r} counts the tokens of a row, and packed rows are filled up without a mask that "
            "tells them. Set padding_free=True beside packing."
        )
