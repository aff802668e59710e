"""The trainers whose steps are timed. All of them learn from the labels too, and none from the teacher's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.layers.workloads import STUDENT_LAYERS, TEACHER_LAYERS, batch_of, student_of, teacher_of
from benchmarks.step_overhead.contenders import Stepper, floor, training_arguments
from benchmarks.step_overhead.workloads import Inputs

STRIDE = TEACHER_LAYERS // STUDENT_LAYERS
RELATION_HEADS = 16  # 16 wide each, as the 48 of a model that is 768 wide


class EagerTrainer(Trainer):
    """Layer terms as they are usually written: both models return all their layers, and autograd sees to the rest.

    TinyBERT compares the scores before the softmax, which eager attention does not return; its probabilities are the
    cheapest stand-in.
    """

    teacher: nn.Module

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss and the mean squared errors of the mapped layers."""
        returned = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}, **returned)
        outputs = model(**inputs, **returned)
        hidden = zip(outputs.hidden_states, taught.hidden_states[::STRIDE], strict=True)
        attentions = zip(outputs.attentions, taught.attentions[STRIDE - 1 :: STRIDE], strict=True)
        return outputs.loss + sum(F.mse_loss(own, other) for pairs in (hidden, attentions) for own, other in pairs)


def eager(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any]) -> Trainer:
    """All layers out of both models, mean squared errors under autograd."""
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    trainer = EagerTrainer(student, TrainingArguments(**arguments))
    trainer.teacher = teacher.to(trainer.args.device)
    return trainer


def with_terms(**terms: Any) -> Callable[[PreTrainedModel, PreTrainedModel, dict[str, Any]], Trainer]:
    """A builder of our trainer with the labels and these terms."""

    def build(student: PreTrainedModel, teacher: PreTrainedModel, arguments: dict[str, Any]) -> Trainer:
        from hf_distill import DistillationTrainer, DistillationTrainingArguments

        args = DistillationTrainingArguments(**arguments, **terms)
        rows = batch_of(8, "cpu")
        dataset = [{name: value[row] for name, value in rows.items()} for row in range(2)]
        trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=dataset)
        trainer._start_layers()  # as `train` does before its first step
        return trainer

    return build


def relations() -> dict[str, Any]:
    """MiniLMv2's three relations between the last layers, and the labels."""
    options = {"relation_heads": RELATION_HEADS}
    matches = [
        {"name": kind, "student": f"{kind}[-1]", "teacher": f"{kind}[-1]",
         "loss": "minilmv2_relations", "options": options}
        for kind in ("query", "key", "value")
    ]  # fmt: skip
    return {"task": {"weight": 1.0}, "logits": {"weight": 0.0}, "matches": matches}


WEIGHTS = {"task_weight": 1.0, "kd_weight": 0.0, "hidden_weight": 1.0, "attention_weight": 1.0}
CONTENDERS = {
    "floor": floor,
    "ours": with_terms(**WEIGHTS),
    "ours, attention_kl": with_terms(**WEIGHTS, attention_loss="attention_kl"),
    "ours, minilmv2_relations": with_terms(distillation_config=relations()),
    "eager": eager,
}


def stepper_of(name: str, *, device: str, bf16: bool, dropout: float) -> Stepper:
    """One contender with models of its own, ready to take optimizer steps one at a time."""
    models = student_of(dropout), teacher_of(dropout)
    return Stepper(CONTENDERS[name](*models, training_arguments(device, bf16=bf16)))
