"""How far a training is: bars where a person looks on, lines where they go into a file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers.utils import logging

# Of every log, and said by the step already, or of no use before the end.
_UNSAID = ("epoch", "total_flos", "step")
_EVALUATION = "eval_"
_AT_THE_END = "train_runtime"
_SPEEDS = ("_runtime", "_per_second")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the bars of other libraries, and puts back what was on."""
    bars = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            logging.enable_progress_bar()


def described(metrics: Mapping[str, Any]) -> str:
    """Metrics on one line, without what says how fast they came about."""
    shown = {
        name.removeprefix(_EVALUATION): value
        for name, value in metrics.items()
        if name not in _UNSAID and not name.endswith(_SPEEDS)
    }
    return "  ".join(f"{name} {_rounded(value)}" for name, value in shown.items())


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TrainingProgress(TrainerCallback):
    """Says where a training is, on one process: a bar on a terminal, else a line for each log.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        if (bars := self._open(state)) is not None:
            self._training = bars.add_task("training", total=state.max_steps, completed=state.global_step)

    def _open(self, state: Any) -> Progress | None:
        """The bars; None where nobody sees them."""
        if self._bars is None and self._console.is_terminal and state.is_world_process_zero:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, *times, console=self._console)
            self._bars.start()
        return self._bars

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._bars is not None and self._training is not None:
            self._bars.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation."""
        bars = self._open(state)
        if bars is None or eval_dataloader is None or not hasattr(eval_dataloader, "__len__"):
            return
        if self._evaluation is None:
            self._evaluation = bars.add_task("evaluation", total=len(eval_dataloader))
        bars.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar of an evaluation."""
        if self._bars is not None and self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None
        if self._training is None:
            self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints a line."""
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step}/{state.max_steps}" if state.max_steps > 0 else ""
        if _AT_THE_END in logs:
            line = f"trained {state.global_step} steps in {logs[_AT_THE_END]:.1f} s"
        elif any(name.startswith(_EVALUATION) for name in logs):
            line = f"{step}  evaluation: {described(logs)}"
        else:
            line = f"{step}  epoch {logs.get('epoch', 0):.2f}  {described(logs)}"
        self.say(line.strip())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, also where a training stopped in the middle."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._training = self._evaluation = None

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
