"""How far a single operation may be from float64: the largest difference as a fraction of the
largest value. The tests hold every override to it, and the README to the same numbers."""

_WIDE = 2e-6
_OF_CUPY = {"float32": _WIDE, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": _WIDE}


def tolerance(backend: str, dtype: str, operation: str, phase: str) -> float:
    """Of an operation, by its name in operations.py, for weights of `dtype`.

    NumPy computes in float32 whatever the storage. CuPy rounds activations of a 16-bit product to
    that type, results too where no kernel fits, and keeps keys and values in it. Beside int8
    weights the cache is float16, and a prompt's products are of float16, which holds int8 exactly.

    Args:
        phase: "prompt" or "decode".
    """
    if backend == "numpy":
        return _WIDE
    if dtype == "int8" and (phase == "prompt" or "attention" in operation):
        return _OF_CUPY["float16"]
    return _OF_CUPY[dtype]
