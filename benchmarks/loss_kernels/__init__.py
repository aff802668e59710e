"""The losses on given logits alone: time and peak memory of value and gradient."""
