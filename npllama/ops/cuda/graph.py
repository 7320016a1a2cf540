"""The decode step, captured as CUDA graphs and replayed."""
