"""A teacher's weights in the layout of another architecture, such as BERT's as a DistilBERT of the same depth."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.models.student.fresh import new_model, saved_tensors
from hf_distill.models.student.report import Origin


@dataclass(frozen=True)
class Layout:
    """How the weights of one architecture are written as another's.

    Attributes:
        classes: beginnings of the two architectures' class names, student's first.
        config: teacher's config -> the student's, of the same depth and widths.
        names: (pattern of a student's tensor, the teacher's name), the first that the teacher has; names are those
            inside the base model, or of the head.
        merged: student's tensor -> how it is made of several of the teacher's.
        notes: teacher's config and student -> what is only approximately the same.
    """

    classes: tuple[str, str]
    config: Callable[[Any], Any]
    names: tuple[tuple[str, str], ...]
    merged: Mapping[str, Callable[[Any, Mapping[str, Tensor]], Tensor]]
    notes: Callable[[Any, PreTrainedModel], tuple[str, ...]]


@dataclass(frozen=True)
class LaidOut:
    """A model in another layout, and what became of each tensor."""

    model: PreTrainedModel
    origins: Mapping[str, Origin]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def to_layout(teacher: PreTrainedModel, architecture: str, *, seed: int = 0) -> LaidOut:
    """The teacher as a model of another architecture, with its depth, widths and head.

    Args:
        teacher: the model to copy.
        architecture: the `model_type` to copy into, e.g. "distilbert".
        seed: of the values of new weights.

    Raises:
        ValueError: no rule for these two architectures, or the other one has no such head.
    """
    pair = (teacher.config.model_type, architecture)
    if pair not in LAYOUTS:
        raise ValueError(
            f"There is no rule to copy {pair[0]!r} into {architecture!r}; there is one for "
            f"{', '.join(' -> '.join(known) for known in LAYOUTS)}. Leave architecture out to keep the teacher's own."
        )
    layout = LAYOUTS[pair]
    student_prefix, teacher_prefix = layout.classes
    class_name = student_prefix + type(teacher).__name__.removeprefix(teacher_prefix)
    if not hasattr(transformers, class_name) or getattr(teacher.config, "is_decoder", False):
        raise ValueError(
            f"{type(teacher).__name__} as {architecture!r} would be {class_name}"
            f"{' with causal attention' if hasattr(transformers, class_name) else ''}, which does not exist. Load the "
            "teacher with a head that both architectures have, such as masked LM or sequence classification."
        )
    model = new_model(getattr(transformers, class_name), layout.config(teacher.config), teacher, seed=seed)
    source = {
        name.removeprefix(f"{teacher.base_model_prefix}."): value for name, value in teacher.state_dict().items()
    }
    origins, used = {}, set()
    for full_name, target in saved_tensors(model).items():
        name = full_name.removeprefix(f"{model.base_model_prefix}.")
        origins[full_name] = Origin.NEW
        if name in layout.merged:
            target.copy_(layout.merged[name](teacher.config, source))
            origins[full_name] = Origin.MERGED
        elif (old := _source_name(name, layout.names, source)) is not None and source[old].shape == target.shape:
            target.copy_(source[old])
            origins[full_name] = Origin.COPIED
            used.add(old)
    merged = ("embeddings.position_embeddings.", "embeddings.token_type_embeddings.")
    own = {name.removeprefix(f"{teacher.base_model_prefix}.") for name in saved_tensors(teacher)}
    dropped = tuple(name for name in source if name in own - used and not name.startswith(merged))
    return LaidOut(model, origins, dropped, layout.notes(teacher.config, model))


def _source_name(name: str, names: tuple[tuple[str, str], ...], source: Mapping[str, Tensor]) -> str | None:
    candidates = [re.sub(pattern, old, name) for pattern, old in names if re.match(pattern, name)]
    return next((old for old in [*candidates, name] if old in source), None)


def _distilbert_config(config: Any) -> Any:
    return transformers.DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings - _first_position(config),
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        activation=config.hidden_act,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        seq_classif_dropout=getattr(config, "classifier_dropout", None) or config.hidden_dropout_prob,
        initializer_range=config.initializer_range,
        id2label=config.id2label,
        label2id=config.label2id,
        problem_type=config.problem_type,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _first_position(config: Any) -> int:
    # RoBERTa counts positions from the one after the padding's.
    return 0 if config.model_type == "bert" else config.pad_token_id + 1


def _positions(config: Any, source: Mapping[str, Tensor]) -> Tensor:
    positions = source["embeddings.position_embeddings.weight"][_first_position(config) :]
    return positions + source["embeddings.token_type_embeddings.weight"][0]


def _distilbert_notes(config: Any, model: PreTrainedModel) -> tuple[str, ...]:
    notes = []
    if hasattr(model, "pre_classifier"):
        notes.append("DistilBERT's classifier applies ReLU where the teacher's pooled output has tanh")
    if config.type_vocab_size > 1:
        notes.append("token type 0 is added to the positions; other token types are gone")
    if config.layer_norm_eps != 1e-12:
        notes.append(f"DistilBERT's norms use eps=1e-12, the teacher's {config.layer_norm_eps}")
    return tuple(notes)


_LAYER = r"transformer\.layer\.(\d+)\."
_BERT_LAYER = (
    (_LAYER + r"attention\.q_lin\.", r"encoder.layer.\1.attention.self.query."),
    (_LAYER + r"attention\.k_lin\.", r"encoder.layer.\1.attention.self.key."),
    (_LAYER + r"attention\.v_lin\.", r"encoder.layer.\1.attention.self.value."),
    (_LAYER + r"attention\.out_lin\.", r"encoder.layer.\1.attention.output.dense."),
    (_LAYER + r"sa_layer_norm\.", r"encoder.layer.\1.attention.output.LayerNorm."),
    (_LAYER + r"ffn\.lin1\.", r"encoder.layer.\1.intermediate.dense."),
    (_LAYER + r"ffn\.lin2\.", r"encoder.layer.\1.output.dense."),
    (_LAYER + r"output_layer_norm\.", r"encoder.layer.\1.output.LayerNorm."),
    (r"pre_classifier\.", "pooler.dense."),
)
_BERT_HEAD = (
    (r"vocab_transform\.", "cls.predictions.transform.dense."),
    (r"vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"vocab_projector\.bias", "cls.predictions.bias"),
    (r"vocab_projector\.weight", "cls.predictions.decoder.weight"),
)
_ROBERTA_HEAD = (
    (r"pre_classifier\.", "classifier.dense."),
    (r"classifier\.", "classifier.out_proj."),
    (r"vocab_transform\.", "lm_head.dense."),
    (r"vocab_layer_norm\.", "lm_head.layer_norm."),
    (r"vocab_projector\.bias", "lm_head.bias"),
    (r"vocab_projector\.weight", "lm_head.decoder.weight"),
)


def _distilbert_from(class_prefix: str, head: tuple[tuple[str, str], ...]) -> Layout:
    return Layout(
        classes=("DistilBert", class_prefix),
        config=_distilbert_config,
        names=(*head, *_BERT_LAYER),
        merged={"embeddings.position_embeddings.weight": _positions},
        notes=_distilbert_notes,
    )


# (model_type of the teacher, of the student) -> how to copy.
LAYOUTS: dict[tuple[str, str], Layout] = {
    ("bert", "distilbert"): _distilbert_from("Bert", _BERT_HEAD),
    ("roberta", "distilbert"): _distilbert_from("Roberta", _ROBERTA_HEAD),
    ("xlm-roberta", "distilbert"): _distilbert_from("XLMRoberta", _ROBERTA_HEAD),
}
