"""What is found in, or done to, a Transformers model."""
