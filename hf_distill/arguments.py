"""The flat face of the configuration: `TrainingArguments` with the fields of a distillation."""

import contextlib
import copy
import json
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_distill.config import DistillationConfig, default_config, flat_values, read_map, with_flat_values, write_map
from hf_distill.config.checks import check_choice
from hf_distill.metrics.direction import smaller_is_better
from hf_distill.on_policy_arguments import OnPolicyArguments
from hf_distill.presets import load_preset
from hf_distill.publishing import TokensNotPickled
from hf_distill.schedules import Schedule
from hf_distill.temperature import TemperaturePolicy, write_temperature
from hf_distill.text.arguments import TextArguments
from hf_distill.weighting import read_item_weights, write_item_weights

_SOURCES = ("preset", "distillation_config")
FLAT_FIELDS = (
    "task_weight",
    "kd_weight",
    "kd_loss",
    "temperature",
    "hidden_weight",
    "hidden_loss",
    "attention_weight",
    "attention_loss",
    "layer_mapping",
    "kd_options",
    "temperature_schedule",
    "temperature_final",
    "temperature_squared",
    "logit_transform",
    "teacher_scale",
    "item_weights",
    "token_alignment",
    "weight_schedules",
    "loss_balance",
)
# Of these nobody reads anything where the logits have no weight.
_OF_THE_LOGITS = (
    "kd_options",
    "temperature_schedule",
    "temperature_final",
    "temperature_squared",
    "logit_transform",
    "teacher_scale",
    "item_weights",
    "token_alignment",
)
# More of it is better, whatever the metric.
_RETENTION = re.compile(r"(.+_)?retention_.+")


def _unless_given(help_text: str) -> Any:
    """A field that `__post_init__` fills in where it is not given, so that later it reads as its annotation says."""
    return field(default=None, metadata={"help": help_text})


@dataclass
class DistillationTrainingArguments(OnPolicyArguments, TextArguments, TokensNotPickled, TrainingArguments):
    """`TrainingArguments` plus what a distillation needs; every field is also a command-line option.

    `preset` or `distillation_config` say what is minimised, and the flat fields change it; without either, the flat
    fields are all. A flat field that is not given (None) is filled in with the number that counts.

    Raises:
        ValueError: a negative weight, no weight at all, a temperature that is not positive, an unknown loss or preset,
            a preset beside a config, a loss or a map that no term reads.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in TrainingArguments, where dataclass must not take it for a field
        *TrainingArguments._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "model_init_kwargs",
        "generation_kwargs",
        "distillation_config",
        "layer_mapping",
        "temperature",
        "kd_options",
        "teacher_scale",
        "item_weights",
        "weight_schedules",
        "loss_balance",
    ]

    preset: str | None = field(
        default=None,
        metadata={
            "help": "A method from a paper by name, such as tinybert or minilmv2 (see hf_distill.presets). The other "
            "fields of the distillation change it where they are given; its learning rate and epochs are not applied."
        },
    )
    distillation_config: DistillationConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Every term in full: the path of a YAML or JSON file, or the same as JSON. It is read once, and "
            "kept with the arguments. The other fields change it where they are given."
        },
    )
    task_weight: float = _unless_given(
        "Weight of the student's own loss on the labels, 0.5 unless a preset or a config has another. Weights are not "
        "normalised."
    )
    kd_weight: float = _unless_given(
        "Weight of the distance of the student's logits from the teacher's, 0.5 unless a preset or a config has "
        "another. 0 everywhere but in task_weight: plain Trainer."
    )
    kd_loss: str = _unless_given(
        "Distance of the logits: forward_kl (the default; Hinton et al. 2015; multi-label heads take "
        "binary_forward_kl, regression heads logit_mse in its place), reverse_kl, jsd, dkd or another; see "
        "docs/objectives.md."
    )
    kd_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of kd_loss as JSON, such as '{\"beta\": 0.1}' of jsd."}
    )
    temperature: float | str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "T > 0 in softmax(logits / T) of teacher and student, 2 unless a preset or a config has another; "
            "the loss is multiplied by T squared, so that its gradient stays comparable. Or a policy as JSON, such as "
            '\'{"policy": "adaptive", "signal": "teacher_entropy", "min": 2, "max": 10}\'.'
        },
    )
    temperature_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How T goes from temperature to temperature_final: linear (the default beside temperature_final), "
            "cosine or exponential."
        },
    )
    temperature_final: float | None = field(default=None, metadata={"help": "T at the end of the training."})
    temperature_squared: bool | None = field(
        default=None, metadata={"help": "Whether the loss is multiplied by T squared; it is, unless this is False."}
    )
    logit_transform: str | None = field(
        default=None,
        metadata={"help": "Of both models' logits before they are compared: standardize (LSKD), or none."},
    )
    teacher_scale: float | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Factor on the teacher's logits: a number, or a schedule as JSON (Annealing-KD)."},
    )
    item_weights: dict[str, Any] | str | list | None = field(
        default=None,
        metadata={
            "help": "What some items weigh more in the logits' term, as JSON: by phrases, column, group or teacher, "
            'such as \'[{"by": "phrases", "file": "terms.txt", "boost": 0.3}]\'.'
        },
    )
    token_alignment: str | None = field(
        default=None,
        metadata={
            "help": "offsets compares causal language models with other tokenizers where both have read the same text "
            "(columns of hf_distill.token_alignment.tokenize_for_teacher): kd_loss uld by sorted probabilities, the "
            "others over the tokens that spell the same. none: both read the same tokens."
        },
    )
    weight_schedules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Factors on the weights over the training by the terms\' names, as JSON: \'{"hidden": "warmup", '
            '"kd": {"kind": "linear", "from": 1, "to": 0}}\'.'
        },
    )
    loss_balance: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "How the terms are weighed against each other while training: uncertainty or magnitude."},
    )
    hidden_weight: float = _unless_given(
        "Weight of the distance of the hidden states, layer by layer (the match called hidden), 0 unless a preset or "
        "a config has it. Where the widths differ, learned projections bridge them."
    )
    hidden_loss: str | None = field(
        default=None,
        metadata={"help": "Distance of the hidden states: hidden_mse unless given, or another such as hidden_cosine."},
    )
    attention_weight: float = _unless_given(
        "Weight of the distance of the attention, layer by layer (the match called attention), 0 unless a preset or a "
        "config has it."
    )
    attention_loss: str | None = field(
        default=None,
        metadata={
            "help": "Distance of the attention: attention_mse of the scores unless given, or attention_kl or "
            "attention_probs_mse of the probabilities."
        },
    )
    layer_mapping: dict[str, Any] | str | list | None = field(
        default=None,
        metadata={
            "help": "The teacher's layers for the student's, of hidden states and attention: uniform unless given, "
            "uniform_last, last, first, skip, copied (for a student with layers of the teacher), or pairs such as "
            '\'{"1": 3, "2": 6}\'.'
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Arguments of from_pretrained for a teacher given by name, e.g. \'{"dtype": "bfloat16"}\'.'},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a student given by name."}
    )
    evaluate_teacher: bool = field(
        default=False,
        metadata={
            "help": "Whether evaluations add eval_teacher_<metric> and eval_retention_<metric>, the share of the "
            "teacher's score that the student reaches, for each metric of compute_metrics. The teacher is scored once "
            "for an evaluation set."
        },
    )

    def __post_init__(self) -> None:
        self._read_json()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            if self.evaluate_teacher and _RETENTION.fullmatch(self.metric_for_best_model):
                self.greater_is_better = True
            elif smaller_is_better(self.metric_for_best_model):
                self.greater_is_better = False
        super().__post_init__()
        for name in ("teacher_model_init_kwargs", "model_init_kwargs"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f'{name}={value!r} is not a JSON object. Write it as \'{{"dtype": "bfloat16"}}\'.')
            if isinstance(value, dict) and {"token", "use_auth_token"} & {*value}:
                raise ValueError(
                    f"{name} holds an access token, which would be saved and logged with the arguments. Set the "
                    "environment variable HF_TOKEN, or log in with `hf auth login`."
                )
        if self.distillation_config is not None:
            # Plain values: they can be saved as JSON, and stay what was trained when the file changes.
            self.distillation_config = DistillationConfig.load(self.distillation_config).to_dict()
        if self.layer_mapping is not None:
            self.layer_mapping = write_map(read_map(self.layer_mapping, "layer_mapping"))
        # Plain values, which Trainer's loggers can write as JSON.
        if isinstance(self.temperature, TemperaturePolicy):
            self.temperature = write_temperature(self.temperature)
        if isinstance(self.teacher_scale, Schedule):
            self.teacher_scale = self.teacher_scale.to_plain()
        if self.item_weights is not None:
            self.item_weights = write_item_weights(read_item_weights(self.item_weights))
        terms = self.distillation
        self._check_readers()
        self.check_text()
        asks_teacher = terms.logits.weight > 0 or any(match.asks_teacher for match in terms.matches)
        self.check_on_policy(asks_teacher=asks_teacher, task_weight=terms.task.weight)

    def _read_json(self) -> None:
        """Takes JSON and numbers out of the texts that a command line gives."""
        for name in (*FLAT_FIELDS, "distillation_config"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
                try:
                    setattr(self, name, json.loads(value))
                except ValueError as error:
                    raise ValueError(
                        f"{name}={value!r} is no JSON ({error}). Write names and texts in double quotes, and on a "
                        'command line the whole in single ones: \'{"policy": "adaptive"}\'.'
                    ) from None
            elif isinstance(value, str) and name in ("temperature", "teacher_scale"):
                with contextlib.suppress(ValueError):
                    setattr(self, name, float(value))

    @property
    def distillation(self) -> DistillationConfig:
        """The checked terms these arguments stand for, as they are now: a hyperparameter search may change them."""
        now = [getattr(self, name) for name in (*_SOURCES, *FLAT_FIELDS)]
        before, config = self.__dict__.get("_compiled", (None, None))
        if config is None or now != before:
            config = self._compile()
            self._compiled = (copy.deepcopy([getattr(self, name) for name in (*_SOURCES, *FLAT_FIELDS)]), config)
        return config

    def _compile(self) -> DistillationConfig:
        if self.preset is not None and self.distillation_config is not None:
            raise ValueError(
                f"preset={self.preset!r} beside a distillation_config: each says what is minimised. Drop one; "
                f"load_preset({self.preset!r}).config().to_yaml() writes the preset down as a config to change."
            )
        base = default_config()
        if self.preset is not None:
            base = load_preset(self.preset).config()
        elif self.distillation_config is not None:
            base = DistillationConfig.load(self.distillation_config)
        before, filled = self.__dict__.get("_filled", {}), {}
        for name, value in flat_values(base).items():
            # Also what was filled in for a preset that a search has since replaced by another.
            if getattr(self, name) is None or (name in before and getattr(self, name) == before[name]):
                filled[name] = value
                setattr(self, name, value)
        self._filled = filled
        return with_flat_values(base, **{name: getattr(self, name) for name in FLAT_FIELDS})

    def _check_readers(self) -> None:
        """Refuses a loss or a map that no term reads. A search that tries a weight of 0 may keep its loss."""
        unread = self.prediction_loss_only or "loss" in self.include_for_metrics
        if self.evaluate_teacher and unread:
            raise ValueError(
                "evaluate_teacher=True compares scores of predictions, without losses. Drop prediction_loss_only and "
                "'loss' in include_for_metrics, or evaluate_teacher."
            )
        for name in _OF_THE_LOGITS:
            if (value := getattr(self, name)) is not None and self.kd_weight == 0:
                raise ValueError(f"{name}={value!r}, but kd_weight is 0, so nobody reads it. Set the weight.")
        if isinstance(self.temperature, dict) and self.kd_weight == 0 and "temperature" not in self._filled:
            raise ValueError(
                f"temperature={self.temperature!r}, but kd_weight is 0, so nobody reads it. Set the weight."
            )
        terms = self.distillation.terms
        for given in self.weight_schedules or ():
            name = "kd" if given == "logits" else given  # as the term is called in a config
            check_choice("weight_schedules", name, terms)
            if terms[name].weight == 0:
                raise ValueError(f"weight_schedules: the weight of {name} is 0, so nobody reads its schedule. Set it.")
        weights = {"hidden": self.hidden_weight, "attention": self.attention_weight}
        for name, weight in weights.items():
            if (loss := getattr(self, f"{name}_loss")) is not None and weight == 0:
                raise ValueError(f"{name}_loss={loss!r}, but {name}_weight is 0, so nobody reads it. Set the weight.")
        if self.layer_mapping is not None and not any(weights.values()):
            raise ValueError(
                f"layer_mapping={self.layer_mapping!r}, but hidden_weight and attention_weight are 0, so nobody reads "
                "it. Set one of the weights."
            )


@dataclass
class Seq2SeqDistillationTrainingArguments(DistillationTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` plus what a distillation needs."""
