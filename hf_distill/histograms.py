"""Histograms, for the loggers that `Trainer` writes to and that know what a histogram is."""

from typing import Any

import numpy as np
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from hf_distill.temperature_log import Histogram


def write_histogram(handler: CallbackHandler, state: TrainerState, name: str, histogram: Histogram) -> None:
    """Writes a histogram to TensorBoard, Weights & Biases and trackio, where the training logs there.

    It does not go through `Trainer.log`, whose callbacks take numbers alone and warn of everything else. MLflow has
    no histograms.

    Args:
        handler: the trainer's callbacks.
        state: the trainer's; only its main process writes.
        name: as in the logs: `train/temperature`.
        histogram: what is written at this step.
    """
    if not state.is_world_process_zero:
        return
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_histogram_raw(
                name,
                min=histogram.least,
                max=histogram.most,
                num=sum(histogram.counts),
                sum=histogram.total,
                sum_squares=histogram.squares,
                bucket_limits=[*histogram.edges[1:]],
                bucket_counts=[*histogram.counts],
                global_step=state.global_step,
            )
        elif isinstance(callback, WandbCallback) and callback._initialized:
            _log(callback._wandb, state, name, histogram)
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            _log(callback._trackio, state, name, histogram)


def _log(library: Any, state: TrainerState, name: str, histogram: Histogram) -> None:
    """Writes it with wandb, or with trackio, which has the same functions."""
    bins = np.array(histogram.counts), np.array(histogram.edges)
    # The step is named as their callbacks name it (transformers 5.23), or it would be one further.
    library.log({name: library.Histogram(np_histogram=bins), "train/global_step": state.global_step})
