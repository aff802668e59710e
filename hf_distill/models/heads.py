"""Which task a model's head serves, and the inputs it takes: from Transformers' own tables, then from structure."""

import inspect
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


def _class_names(auto_class: str) -> set[str]:
    table = getattr(modeling_auto, _AUTO_CLASSES[auto_class][0])
    return {name for entry in table.values() for name in ((entry,) if isinstance(entry, str) else entry)}


def auto_class_name(model: nn.Module) -> str | None:
    """The name of the Auto class that builds models like this one, e.g. `AutoModelForMaskedLM`; None if none does."""
    names = [cls.__name__ for cls in type(task_model(model)).__mro__]
    found = [auto for auto in _AUTO_CLASSES if not _class_names(auto).isdisjoint(names)]
    return found[0] if found else None


def find_task(model: nn.Module) -> Task:
    """The task of a model's head, for any architecture.

    Raises:
        ValueError: neither Transformers' tables nor the model's structure say what the head predicts.
    """
    head = task_model(model)
    auto_class = auto_class_name(head)
    if auto_class is not None:
        task = _AUTO_CLASSES[auto_class][1]
    elif "start_positions" in inspect.signature(head.forward).parameters:
        task = Task.QUESTION_ANSWERING
    elif (loss_type := getattr(head, "loss_type", None)) in _LOSS_TYPES:
        task = _LOSS_TYPES[loss_type]
    elif hasattr(head, "get_output_embeddings") and head.get_output_embeddings() is not None:
        task = Task.CAUSAL_LM if head.can_generate() else Task.MASKED_LM
    else:
        raise ValueError(
            f"Cannot tell what the head of {type(head).__name__} predicts: it stands in none of Transformers' tables "
            f"for {', '.join(auto.removeprefix('AutoModelFor') for auto in _AUTO_CLASSES)} and has no language-model "
            "head. Use a model with one of these heads, or name your class after one (MyBertForTokenClassification)."
        )
    is_text_generator = task in (Task.CAUSAL_LM, Task.MASKED_LM)
    return Task.SEQ2SEQ_LM if is_text_generator and head.config.is_encoder_decoder else task


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
