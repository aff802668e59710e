"""Terms between the layers of a student and a teacher: planned once, recorded, projected, compared and reduced."""

from hf_distill.matching.first_batch import plan_layers
from hf_distill.matching.session import LayerTerms

__all__ = ["LayerTerms", "plan_layers"]
