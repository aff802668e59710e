"""Terms between the layers of a student and a teacher: planned once, recorded, projected, compared and reduced."""

from hf_distill.matching.first_batch import plan_layers
from hf_distill.matching.plan import NOTHING
from hf_distill.matching.session import LEARNED, LayerTerms, Learned

__all__ = ["LEARNED", "NOTHING", "LayerTerms", "Learned", "plan_layers"]
