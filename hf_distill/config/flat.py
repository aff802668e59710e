"""The short form: a config with the flat fields of the arguments laid over it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_distill.config.checks import check_choice, is_number
from hf_distill.config.distillation import DistillationConfig
from hf_distill.config.language import read_balance, read_map, read_number_or_schedule, read_schedule
from hf_distill.config.matches import MatchTerm
from hf_distill.config.terms import LayerMap, LogitTerm, TaskTerm
from hf_distill.features import parse_feature
from hf_distill.layer_mapping import EXPLICIT_MAP
from hf_distill.temperature import read_temperature, write_temperature
from hf_distill.weighting import read_item_weights

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
        "temperature": write_temperature(config.logits.temperature),
        "hidden_weight": weights.get(HIDDEN_MATCH, 0.0),
        "attention_weight": weights.get(ATTENTION_MATCH, 0.0),
    }


def with_flat_values(
    config: DistillationConfig,
    *,
    task_weight: float,
    kd_weight: float,
    kd_loss: str,
    temperature: Any,
    hidden_weight: float,
    hidden_loss: str | None,
    attention_weight: float,
    attention_loss: str | None,
    layer_mapping: Any,
    kd_options: Any = None,
    temperature_schedule: str | None = None,
    temperature_final: float | None = None,
    temperature_squared: bool | None = None,
    logit_transform: str | None = None,
    teacher_scale: Any = None,
    item_weights: Any = None,
    token_alignment: str | None = None,
    weight_schedules: Any = None,
    loss_balance: Any = None,
) -> DistillationConfig:
    """The config with the flat values in place of its own; what is None leaves what the config has.

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
    logits: dict[str, Any] = {
        "weight": kd_weight,
        "loss": kd_loss,
        "temperature": _temperature(temperature, temperature_schedule, temperature_final),
        "options": {**_options_kept(config.logits, kd_loss), **(kd_options or {})},
    }
    given: dict[str, Any] = {
        "temperature_squared": temperature_squared,
        "transform": logit_transform,
        "teacher_scale": None if teacher_scale is None else read_number_or_schedule(teacher_scale, "teacher_scale"),
        "item_weights": None if item_weights is None else read_item_weights(item_weights),
        "token_alignment": token_alignment,
    }
    changed = replace(
        config,
        logits=replace(config.logits, **logits, **{name: value for name, value in given.items() if value is not None}),
        task=replace(config.task, weight=task_weight),
        matches=tuple(matches.values()),
        balance=config.balance if loss_balance is None else read_balance(loss_balance),
    )
    return changed if weight_schedules is None else _scheduled(changed, weight_schedules)


def _options_kept(term: LogitTerm, loss: str) -> Mapping[str, Any]:
    """The options of the term, which another loss does not have."""
    return term.options if loss == term.loss else {}


def _temperature(value: Any, schedule: str | None, final: float | None) -> Any:
    if schedule is None and final is None:
        return read_temperature(value)
    if final is None or not is_number(value) or value == final:
        raise ValueError(
            f"temperature={value!r}, temperature_schedule={schedule!r}, temperature_final={final!r}: a schedule goes "
            "from one number to another one. Give temperature=8, temperature_schedule='linear', temperature_final=2, "
            "or the whole policy as temperature={'policy': 'linear', 'from': 8, 'to': 2, 'end': 0.5}."
        )
    known = ("linear", "cosine", "exponential")
    check_choice("temperature_schedule", schedule or known[0], known)
    return read_temperature({"policy": schedule or known[0], "from": value, "to": final})


def _scheduled(config: DistillationConfig, schedules: Any) -> DistillationConfig:
    """The config with a schedule on the weights of the terms that are named."""
    if not isinstance(schedules, Mapping):
        raise ValueError(
            f"weight_schedules={schedules!r} is no mapping. Write {{'kd': {{'kind': 'linear', 'from': 1, 'to': 0}}}}."
        )
    for name, value in schedules.items():
        name = "kd" if name == "logits" else name  # as the term is called in a config
        schedule = read_schedule(value, f"weight_schedules.{name}")
        if name not in config.terms or config.terms[name].weight == 0:  # a search may try without the term
            continue
        if name == "task":
            config = replace(config, task=replace(config.task, weight_schedule=schedule))
        elif name == "kd":
            config = replace(config, logits=replace(config.logits, weight_schedule=schedule))
        else:
            matches = (replace(m, weight_schedule=schedule) if m.name == name else m for m in config.matches)
            config = replace(config, matches=tuple(matches))
    return config


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
