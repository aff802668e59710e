"""The short form: a config with the flat fields of the arguments laid over it."""

from dataclasses import replace
from typing import Any

from hf_distill.config.distillation import DistillationConfig
from hf_distill.config.language import read_map
from hf_distill.config.matches import MatchTerm
from hf_distill.config.terms import LayerMap, LogitTerm, TaskTerm
from hf_distill.features import parse_feature
from hf_distill.layer_mapping import EXPLICIT_MAP

HIDDEN_MATCH, ATTENTION_MATCH = "hidden", "attention"
_PROBABILITIES = ("attention_kl", "attention_probs_mse")


def default_config() -> DistillationConfig:
    """What is minimised unless something else is asked for: the labels' and the logits' loss, each with weight 0.5."""
    return DistillationConfig(TaskTerm(), LogitTerm())


def flat_values(config: DistillationConfig) -> dict[str, Any]:
    """The numbers and words of a config that have a flat field."""
    weights = {name: float(term.weight) for name, term in config.terms.items()}
    return {
        "task_weight": weights["task"],
        "kd_weight": weights["kd"],
        "kd_loss": config.logits.loss,
        "temperature": float(config.logits.temperature),
        "hidden_weight": weights.get(HIDDEN_MATCH, 0.0),
        "attention_weight": weights.get(ATTENTION_MATCH, 0.0),
    }


def with_flat_values(
    config: DistillationConfig,
    *,
    task_weight: float,
    kd_weight: float,
    kd_loss: str,
    temperature: float,
    hidden_weight: float,
    hidden_loss: str | None,
    attention_weight: float,
    attention_loss: str | None,
    layer_mapping: Any,
) -> DistillationConfig:
    """The config with the flat values in place of its own; losses and map of None leave those of the config.

    A match that the config does not have is added where its weight is not zero.
    """
    layer_map = None if layer_mapping is None else read_map(layer_mapping, "layer_mapping")
    matches = {match.name: match for match in config.matches}
    for name, weight, loss in (
        (HIDDEN_MATCH, hidden_weight, hidden_loss),
        (ATTENTION_MATCH, attention_weight, attention_loss),
    ):
        if name in matches:
            matches[name] = _changed(matches[name], weight, loss, layer_map)
        elif weight != 0:
            make = _hidden_match if name == HIDDEN_MATCH else _attention_match
            matches[name] = _changed(make(loss), weight, loss, layer_map)
    return DistillationConfig(
        task=replace(config.task, weight=task_weight),
        logits=replace(config.logits, weight=kd_weight, loss=kd_loss, temperature=temperature),
        matches=tuple(matches.values()),
    )


def _hidden_match(loss: str | None) -> MatchTerm:
    return MatchTerm(HIDDEN_MATCH, parse_feature("hidden[*]"), loss or "hidden_mse")


def _attention_match(loss: str | None) -> MatchTerm:
    feature = "attention_probs[*]" if loss in _PROBABILITIES else "attention_scores[*]"
    return MatchTerm(ATTENTION_MATCH, parse_feature(feature), loss or "attention_mse")


def _changed(match: MatchTerm, weight: float, loss: str | None, layer_map: LayerMap | None) -> MatchTerm:
    changes: dict[str, Any] = {"weight": weight}
    if loss is not None:
        changes["loss"] = loss
    if layer_map is not None:
        changes["map"] = _without_embeddings(layer_map) if match.student.is_attention else layer_map
    return replace(match, **changes)


def _without_embeddings(layer_map: LayerMap) -> LayerMap:
    """The map of attention layers: the embeddings, layer 0, have no attention."""
    if layer_map.strategy == EXPLICIT_MAP:
        return replace(layer_map, pairs=tuple(pair for pair in layer_map.pairs if 0 not in pair))
    return replace(layer_map, candidates=tuple(layer for layer in layer_map.candidates if layer != 0))
