"""Knowledge distillation on Hugging Face Transformers: change one import, add a teacher."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_EXPORTS = {
    "DistillationTrainer": "trainer",
    "Seq2SeqDistillationTrainer": "trainer",
    "DistillationTrainingArguments": "arguments",
    "Seq2SeqDistillationTrainingArguments": "arguments",
    "DistillationCollator": "collator",
    "DistillationConfig": "config",
    "forward_kl": "losses",
    "binary_forward_kl": "losses",
    "logit_mse": "losses",
    "compute_metrics_for": "metrics",
    "load_metric": "metrics",
    "Stage": "stages",
    "run_stages": "stages",
    "build_student": "models.student",
    "trim_vocabulary": "models.student",
    "generate_answers": "generation.answers",
    "tokenize_for_teacher": "token_alignment",
    "weigh_phrases": "phrases",
    "make_report": "report",
}

__all__ = [
    "DistillationCollator",
    "DistillationConfig",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "Seq2SeqDistillationTrainer",
    "Seq2SeqDistillationTrainingArguments",
    "Stage",
    "binary_forward_kl",
    "build_student",
    "compute_metrics_for",
    "forward_kl",
    "generate_answers",
    "load_metric",
    "logit_mse",
    "make_report",
    "run_stages",
    "tokenize_for_teacher",
    "trim_vocabulary",
    "weigh_phrases",
]

if TYPE_CHECKING:
    from hf_distill.arguments import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
    from hf_distill.collator import DistillationCollator
    from hf_distill.config import DistillationConfig
    from hf_distill.generation.answers import generate_answers
    from hf_distill.losses import binary_forward_kl, forward_kl, logit_mse
    from hf_distill.metrics import compute_metrics_for, load_metric
    from hf_distill.models.student import build_student, trim_vocabulary
    from hf_distill.phrases import weigh_phrases
    from hf_distill.report import make_report
    from hf_distill.stages import Stage, run_stages
    from hf_distill.token_alignment import tokenize_for_teacher
    from hf_distill.trainer import DistillationTrainer, Seq2SeqDistillationTrainer


def __getattr__(name: str) -> Any:
    # PEP 562: importing a loss must not load transformers, importing the package must not load torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_distill' has no attribute {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(import_module(f"hf_distill.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
