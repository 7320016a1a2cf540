"""Launchers of our CUDA kernels for decode steps, prompts and training.

`CupyOps` uses them for the shapes and dtypes that they support, and plain array calls otherwise.
"""
