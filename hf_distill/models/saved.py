"""Weights that `Trainer.save_model` wrote, put back into a model of the same shape."""

import os
from typing import Any

from peft import PeftModel
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME


def load_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Puts the saved weights into `model`, whatever kind of model it is; of a PEFT model those of its active adapter.

    Args:
        model: of the architecture that was saved; keeps its dtype, device and frozen parts.
        folder: where `Trainer.save_model` wrote it.

    Raises:
        RuntimeError: the saved weights are of another architecture.
        OSError: there are none.
    """
    folder = os.fspath(folder)
    if isinstance(model, PeftModel):
        model.load_adapter(folder, model.active_adapter, is_trainable=True)
    elif isinstance(model, PreTrainedModel):
        # Not the file itself: what is written may have other names than what is in memory (experts, old checkpoints).
        loader: Any = type(model)
        model.load_state_dict(loader.from_pretrained(folder).state_dict())
    else:
        load_model(model, os.path.join(folder, SAFE_WEIGHTS_NAME))
