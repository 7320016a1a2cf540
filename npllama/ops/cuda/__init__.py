"""The decode step and the prompt on CUDA: kernels of our own, and what launches them.

`CupyOps` takes these where shapes and dtypes fit, and the plain array calls elsewhere.
"""
