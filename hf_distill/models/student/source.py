"""The teacher a student is built from: a module, or a name to load with the head it was saved with."""

from torch import nn
from transformers import PreTrainedModel

from hf_distill.models.heads import task_model
from hf_distill.models.loading import load_as_saved


def source_model(teacher: nn.Module | str) -> PreTrainedModel:
    """The Transformers model whose weights a student can be made of.

    Args:
        teacher: a model, a Hub name or a local folder.

    Raises:
        TypeError: the teacher is no Transformers model.
        ValueError: its weights are quantized or hold adapters, or its config names no known class.
    """
    if isinstance(teacher, str):
        return source_model(load_as_saved(teacher, {"dtype": "auto"}, argument="teacher"))
    if hasattr(teacher, "peft_config"):
        raise ValueError(
            f"The teacher is a {type(teacher).__name__} with adapters beside its weights. Fold them in first: "
            "build_student(teacher.merge_and_unload(), ...)."
        )
    model = task_model(teacher)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"A student is built from a Transformers model, its name or its folder; got {type(model)!r}.")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"The teacher {type(model).__name__} is quantized: packed weights cannot be cut. Load it without "
            "quantization_config to build the student; it may be quantized again as the teacher."
        )
    return model
