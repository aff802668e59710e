"""Which task a model's head serves, and the inputs it takes: from Transformers' own tables, then from structure."""

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hf_distill.signals import Task

# Auto class -> (its table in modeling_auto, task). Language heads are split further by `is_encoder_decoder`.
# The order settles classes that stand in two tables.
_AUTO_CLASSES = {
    "AutoModelForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", Task.QUESTION_ANSWERING),
    "AutoModelForMultipleChoice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", Task.MULTIPLE_CHOICE),
    "AutoModelForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", Task.TOKEN_CLASSIFICATION),
    "AutoModelForSequenceClassification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        Task.SEQUENCE_CLASSIFICATION,
    ),
    "AutoModelForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", Task.SEQUENCE_CLASSIFICATION),
    "AutoModelForVideoClassification": ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", Task.SEQUENCE_CLASSIFICATION),
    "AutoModelForAudioClassification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", Task.SEQUENCE_CLASSIFICATION),
    "AutoModelForCTC": ("MODEL_FOR_CTC_MAPPING_NAMES", Task.CTC),
    "AutoModelForSpeechSeq2Seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", Task.CAUSAL_LM),
    "AutoModelForSeq2SeqLM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", Task.CAUSAL_LM),
    "AutoModelForImageTextToText": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", Task.CAUSAL_LM),
    "AutoModelForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", Task.CAUSAL_LM),
    "AutoModelForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", Task.MASKED_LM),
}
# The tables of models without a head: whole ones, and the encoders of text alone that some of them have.
_HEADLESS = ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES")
# What PreTrainedModel reads off a class name that no table knows, as with a user's own subclass or remote code.
_LOSS_TYPES = {
    "ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
    "ForImageClassification": Task.SEQUENCE_CLASSIFICATION,
    "ForVideoClassification": Task.SEQUENCE_CLASSIFICATION,
    "ForTokenClassification": Task.TOKEN_CLASSIFICATION,
    "ForQuestionAnswering": Task.QUESTION_ANSWERING,
    "ForMaskedLM": Task.MASKED_LM,
    "ForCausalLM": Task.CAUSAL_LM,
}


def task_model(model: nn.Module) -> Any:
    """The Transformers model itself: `model` without the PEFT or compile wrapper around it."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _class_names(table: str) -> set[str]:
    entries = getattr(modeling_auto, table).values()
    return {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}


def _stands_in(model: nn.Module, names: set[str]) -> bool:
    return not names.isdisjoint(cls.__name__ for cls in type(model).__mro__)


def _head_class_name(model: nn.Module) -> str | None:
    found = (auto for auto, (table, _) in _AUTO_CLASSES.items() if _stands_in(model, _class_names(table)))
    return next(found, None)


def _task_of_head(model: Any) -> Task | None:
    auto_class = _head_class_name(model)
    if auto_class is not None:
        task = _AUTO_CLASSES[auto_class][1]
    elif "start_positions" in inspect.signature(model.forward).parameters:
        task = Task.QUESTION_ANSWERING
    elif (loss_type := getattr(model, "loss_type", None)) in _LOSS_TYPES:
        task = _LOSS_TYPES[loss_type]
    elif hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
        task = Task.CAUSAL_LM if model.can_generate() else Task.MASKED_LM
    else:
        return None
    is_text_generator = task in (Task.CAUSAL_LM, Task.MASKED_LM)
    return Task.SEQ2SEQ_LM if is_text_generator and model.config.is_encoder_decoder else task


def _is_headless(model: nn.Module) -> bool:
    # The table has some models that exist with one head only, and a user's own head may sit on one that has none.
    names = {name for table in _HEADLESS for name in _class_names(table) if not re.search("For[A-Z]", name)}
    return _stands_in(model, names) and "labels" not in inspect.signature(model.forward).parameters


def auto_class_name(model: nn.Module) -> str | None:
    """The name of the Auto class that builds models like this one; None if none does.

    Returns: e.g. `AutoModelForMaskedLM`, or `AutoModel` for any model without a head.
    """
    inner = task_model(model)
    name = _head_class_name(inner)
    return "AutoModel" if name is None and _task_of_head(inner) is None and _is_headless(inner) else name


def find_task(model: nn.Module) -> Task:
    """The task of a model's head, for any architecture; `Task.EMBEDDING` of a model without one.

    Raises:
        ValueError: neither Transformers' tables nor the model's structure say what the head predicts, or a model
            without a head has a decoder.
    """
    inner = task_model(model)
    task = _task_of_head(inner)
    if task is not None:
        return task
    name = type(inner).__name__
    if not _is_headless(inner):
        raise ValueError(
            f"Cannot tell what the head of {name} predicts: it stands in none of Transformers' tables "
            f"for {', '.join(auto.removeprefix('AutoModelFor') for auto in _AUTO_CLASSES)} and has no language-model "
            "head. Use a model with one of these heads, name your class after one (MyBertForTokenClassification), or "
            "learn embeddings with a model that has none (AutoModel)."
        )
    if "decoder_input_ids" in inspect.signature(inner.forward).parameters:
        raise ValueError(
            f"{name} has a decoder and no head, so it has neither logits nor one text to embed. Take the encoder "
            "alone (AutoModelForTextEncoding, such as T5EncoderModel), or the model with its head."
        )
    return Task.EMBEDDING


def input_names(model: nn.Module) -> frozenset[str]:
    """The named arguments of a model's forward."""
    return frozenset(inspect.signature(task_model(model).forward).parameters) - {"args", "kwargs"}


def problem_type(config: Any, labels: Tensor | None, *, default: str | None = None) -> str:
    """`regression`, `multi_label_classification` or `single_label_classification`, by the rule of Transformers' heads.

    Args:
        config: the model's config; its `problem_type` wins.
        labels: the batch's labels or None; float labels over several classes mean multi-label.
        default: what a head of several classes has where neither tells, as the teacher's config may.
    """
    if getattr(config, "problem_type", None) is not None:
        return config.problem_type
    if getattr(config, "num_labels", 2) == 1:
        return "regression"
    if labels is None and default is not None:
        return default
    is_float = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if is_float else "single_label_classification"


def frame_mask(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(batch, frames) bool: which output frames of a CTC model hold sound, from the mask over its input samples.

    Raises:
        ValueError: the model does not say how many frames an input becomes.
    """
    head = task_model(model)
    values = inputs[head.main_input_name]
    if not hasattr(head, "_get_feat_extract_output_lengths"):
        raise ValueError(
            f"{type(head).__name__} does not say how many frames it makes of an input (it has no "
            "_get_feat_extract_output_lengths), so its frames cannot be counted. Use a Wav2Vec2-like CTC model."
        )
    mask = inputs.get("attention_mask")
    lengths = torch.full((len(values),), values.shape[1], device=values.device) if mask is None else mask.sum(-1)
    samples = values.shape[1] if mask is None else mask.shape[1]  # Whisper's features are (batch, bins, samples)
    frames = int(head._get_feat_extract_output_lengths(torch.tensor(samples)))
    lengths = head._get_feat_extract_output_lengths(lengths).to(torch.long)
    return torch.arange(frames, device=values.device) < lengths[:, None]


def decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """What an encoder-decoder model needs to decode `labels` (batch, length) without forming its own loss."""
    head = task_model(model)
    if hasattr(head, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": head.prepare_decoder_input_ids_from_labels(labels)}
    shift = getattr(sys.modules[type(head).__module__], "shift_tokens_right", None)
    if shift is not None:  # Whisper has the function and not the method
        config = head.config
        return {"decoder_input_ids": shift(labels, config.pad_token_id, config.decoder_start_token_id)}
    return {"labels": labels}


def context_length(model: nn.Module) -> int | None:
    """The tokens that a model of text reads and writes at most, as its config says; None where nothing limits it."""
    inner = task_model(model)
    config = inner.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if limit is None or limit < 0:  # XLNet's is -1
        return None
    # RoBERTa and its kin count positions from behind the padding token's.
    unused = [
        module.padding_idx + 1
        for name, module in inner.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    ]
    return limit - max(unused, default=0)
