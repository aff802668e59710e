"""What a distillation minimises, as frozen values checked once, and the language in which they are written."""

from hf_distill.config.checks import ALWAYS
from hf_distill.config.distillation import DistillationConfig
from hf_distill.config.flat import default_config, flat_values, with_flat_values
from hf_distill.config.language import read_map, write_map
from hf_distill.config.matches import MatchTerm
from hf_distill.config.terms import Balance, LayerMap, LogitTerm, Projection, TaskTerm

__all__ = [
    "ALWAYS",
    "Balance",
    "DistillationConfig",
    "LayerMap",
    "LogitTerm",
    "MatchTerm",
    "Projection",
    "TaskTerm",
    "default_config",
    "flat_values",
    "read_map",
    "with_flat_values",
    "write_map",
]
