"""Model cards of distilled students, from the record of the training and, where there is one, the report."""

from hf_distill.card.metadata import CardOptions
from hf_distill.card.rendering import render_card
from hf_distill.card.writing import write_card

__all__ = ["CardOptions", "render_card", "write_card"]
