"""The flat face of the configuration: `TrainingArguments` with the fields of a distillation."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_distill.config import DistillationConfig, LogitTerm, TaskTerm


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus what a distillation needs; every field is also a command-line option.

    Raises:
        ValueError: a negative weight, no weight at all, a temperature that is not positive, an unknown loss.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as in TrainingArguments, where dataclass must not take it for a field
        *TrainingArguments._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "model_init_kwargs",
    ]

    task_weight: float = field(
        default=0.5, metadata={"help": "Weight of the student's own loss on the labels. Weights are not normalised."}
    )
    kd_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the distance of the student's logits from the teacher's. 0: plain Trainer."},
    )
    kd_loss: str = field(
        default="forward_kl",
        metadata={
            "help": "Distance of the logits: forward_kl (Hinton et al. 2015; multi-label heads take "
            "binary_forward_kl, regression heads logit_mse in its place) or logit_mse."
        },
    )
    temperature: float = field(
        default=2.0,
        metadata={
            "help": "T > 0 in softmax(logits / T) of teacher and student; the loss is multiplied by T squared, so "
            "that its gradient stays comparable."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Arguments of from_pretrained for a teacher given by name, e.g. \'{"dtype": "bfloat16"}\'.'},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a student given by name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_model_init_kwargs", "model_init_kwargs"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f'{name}={value!r} is not a JSON object. Write it as \'{{"dtype": "bfloat16"}}\'.')
            if isinstance(value, dict) and {"token", "use_auth_token"} & {*value}:
                raise ValueError(
                    f"{name} holds an access token, which would be saved and logged with the arguments. Set the "
                    "environment variable HF_TOKEN, or log in with `hf auth login`."
                )
        _ = self.distillation

    @property
    def distillation(self) -> DistillationConfig:
        """The checked terms these arguments stand for, as they are now: a hyperparameter search may change them."""
        return DistillationConfig(
            task=TaskTerm(weight=self.task_weight),
            logits=LogitTerm(loss=self.kd_loss, weight=self.kd_weight, temperature=self.temperature),
        )


@dataclass
class Seq2SeqDistillationTrainingArguments(DistillationTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` plus what a distillation needs."""
