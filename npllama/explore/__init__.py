"""One real run of a model as a page: `python -m npllama.explore`."""
