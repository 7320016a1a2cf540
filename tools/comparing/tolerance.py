"""Tolerance of a single operation relative to float64: the largest absolute difference divided by
the largest absolute value. Tests check every override against these values; a README lists them."""

_WIDE = 2e-6
_OF_CUPY = {"float32": _WIDE, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": _WIDE}


def tolerance(backend: str, dtype: str, operation: str, phase: str) -> float:
    """The tolerance of an operation, by its name in operations.py, for weights of `dtype`.

    NumPy computes in float32 whatever the storage dtype. For 16-bit weights, CuPy rounds the
    activations of products to the weights' dtype, and stores keys and values in it. Without a
    fitting kernel it rounds results too. For int8 weights, the cache is float16, and a prompt's
    products are in float16, which represents int8 exactly.

    Args:
        phase: "prompt" or "decode".
    """
    if backend == "numpy":
        return _WIDE
    if dtype == "int8" and (phase == "prompt" or "attention" in operation):
        return _OF_CUPY["float16"]
    return _OF_CUPY[dtype]
