"""Sequence-level distillation: data sets of what the teacher writes (Kim & Rush 2016, arXiv:1606.07947)."""
