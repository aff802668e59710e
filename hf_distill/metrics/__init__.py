"""Metrics that need no network: one function for each task, and `evaluate.Metric` classes by name.

`compute_metrics_for(task)` is the `compute_metrics` of a Trainer, `preprocess_logits_for(task)` its companion where
full logits would not fit; `load_metric(name)` is `evaluate.load` that looks here first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "compute_metrics_for": "tasks",
    "preprocess_logits_for": "tasks",
    "load_metric": "modules",
}

__all__ = ["compute_metrics_for", "load_metric", "preprocess_logits_for"]

if TYPE_CHECKING:
    from hf_distill.metrics.modules import load_metric
    from hf_distill.metrics.tasks import compute_metrics_for, preprocess_logits_for


def __getattr__(name: str) -> Any:
    # PEP 562: `import evaluate` takes seconds and only `load_metric` needs it.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
