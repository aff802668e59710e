"""Twins of the losses on relations between the rows of a batch, and between domains."""
