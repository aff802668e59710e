"""A demonstration on bundled data: `make demo`."""
