"""Raw text for causal language models: formats, truncation, packing, and batches without padding."""
