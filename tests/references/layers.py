"""Twins of the losses on hidden states, attention and relations between tokens."""
