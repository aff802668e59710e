"""Task and logit term from hidden states and heads: time and peak memory of value and gradient."""
