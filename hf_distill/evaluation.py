"""Evaluation that is exact over batches and ranks, with the teacher's view beside the labels'."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import BestRun, EvalLoopOutput

from hf_distill.accounting import TermMeter
from hf_distill.items import batch_size


def _evaluation_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


class EvaluationMixin:
    """`Trainer`'s evaluation, with `eval_loss`, `eval_kd` and `eval_agreement` as sums over global counts.

    `Trainer` averages the batches' means, and repeats rows where ranks do not come out even; here each item counts
    once.
    """

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels of one evaluation batch, as `Trainer` gives them; the sums go into the meter."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        student = self.split(inputs).student
        if getattr(self.args, "predict_with_generate", False) and not prediction_loss_only:
            return super().prediction_step(model, student, prediction_loss_only, ignore_keys, **gen_kwargs)
        loss = None if loss is None else loss.detach()
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits = nested_detach(tuple(v for k, v in outputs.items() if k not in [*ignore_keys, "loss"]))
        labels = tuple(student.get(name) for name in self.label_names)
        labels = None if not labels or any(label is None for label in labels) else nested_detach(labels)
        return (
            loss,
            logits[0] if len(logits) == 1 else logits,
            labels[0] if labels is not None and len(labels) == 1 else labels,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop; the exact sums replace its loss and add the teacher's metrics."""
        self._eval_meter = TermMeter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        totals = self._eval_meter.totals(self.accelerator)
        for metric, divisor in (("loss", "task_items"), ("kd", "kd_items"), ("agreement", "kd_items")):
            if totals.get(divisor) and metric in totals:
                output.metrics[f"{metric_key_prefix}_{metric}"] = totals[metric] / totals[divisor]
        return output

    def hyperparameter_search(
        self,
        hp_space: Callable | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """`Trainer.hyperparameter_search`, whose objective is `eval_loss` unless another is given.

        `Trainer` would add up every metric there is, agreement and distance alike.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _evaluation_loss, *args, **kwargs)

    def _rows_that_count(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """(batch,) False for rows that fill the last batch a second time, as `gather_for_metrics` drops them."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        rows = batch_size(inputs)
        first = rows * self.accelerator.process_index
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        return torch.arange(first, first + rows, device=device) < state.remainder
