"""The progress table of a notebook, with the terms of the distillation; it needs IPython, which a notebook has."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback


class DistillationNotebookCallback(NotebookProgressCallback):
    """`Trainer`'s table, where the losses of the terms stand beside the training loss.

    What evaluations find, such as agreement, is there already. Columns are named as `Trainer` names them: `loss_kd` of
    the training is Loss Kd, `eval_kd` is Kd.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line for each log, where nothing is evaluated."""
        if args.eval_strategy == IntervalStrategy.NO and logs is not None and "loss" in logs:
            terms = {_title(name): value for name, value in _terms(logs).items()}
            self.training_tracker.write_line({"Step": state.global_step, "Training Loss": logs["loss"], **terms})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line for each evaluation, with the terms as they were last logged."""
        terms = {f"train_{name}": value for name, value in _terms(_last_log(state.log_history)).items()}
        # The first word of a metric's name is left out in the table. The terms come first, as a name that ends in
        # _loss, the last of them, is taken for that of the evaluation.
        super().on_evaluate(args, state, control, metrics={**terms, **(metrics or {})}, **kwargs)


def use_notebook_table(handler: CallbackHandler) -> None:
    """Puts our table in place of `Trainer`'s, where `Trainer` has just added that; callbacks of the user's stay."""
    if type(handler.callbacks[-1]) is NotebookProgressCallback:  # the default comes last
        handler.callbacks[-1] = DistillationNotebookCallback()


def _last_log(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((entry for entry in reversed(history) if "loss" in entry), {})


def _terms(logs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: logs[name] for name in sorted(logs) if name.startswith("loss_")}


def _title(name: str) -> str:
    return " ".join(word.capitalize() for word in name.split("_"))
