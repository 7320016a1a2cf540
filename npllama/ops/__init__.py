"""The mathematics of LLaMA-2: read equations.py, then blocks.py, then sampling.py.

`Ops` is the reference implementation in plain array calls. `NumpyOps` and `CupyOps` override the
methods that their backend can compute faster. An override has the signature of its method, and the
tests compare its result with the reference.
"""

from npllama.backend import Backend
from npllama.ops.blocks import Ops
from npllama.ops.cupy_ops import CupyOps
from npllama.ops.numpy_ops import NumpyOps

__all__ = ["CupyOps", "NumpyOps", "Ops", "ops_for"]


def ops_for(backend: Backend, graph: bool = True) -> Ops:
    """Return the implementation of the mathematics for a backend.

    Args:
        graph: whether CuPy captures decode steps as CUDA graphs.
    """
    if backend.name == "cupy":
        return CupyOps(backend, graph)
    return {"numpy": NumpyOps}.get(backend.name, Ops)(backend)
