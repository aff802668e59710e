"""A new model like another, and the tensors that a model saves."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def new_model(model_class: type[PreTrainedModel], config: Any, like: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A freshly initialised model with the device, dtype and ways of generating of another.

    Args:
        model_class: its class.
        config: its config, of which it gets a copy.
        like: the other model.
        seed: of its values; the random state of the caller stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = model_class._from_config(copy.deepcopy(config), dtype=like.dtype)
    if getattr(like, "generation_config", None) is not None and model.can_generate():
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or saved buffer; of shared ones the first name alone."""
    tensors = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}
