"""A training written down: a YAML file that names models, data and arguments, and what runs it."""
