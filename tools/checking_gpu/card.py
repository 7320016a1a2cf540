"""Prints the GPU, driver and CuPy of this machine, the first line of the table's heading."""

import importlib
import sys
from datetime import UTC, datetime


def main() -> int:
    """Print the line, or the reason why CuPy cannot compute here."""
    try:
        import numpy as np

        from npllama.backend import get_backend
        from npllama.errors import NpllamaError

        importlib.import_module("npllama.llama")  # also imports everything that it needs
    except ImportError as error:
        print(
            f"check_gpu: error: {error}: install the packages that setup.cfg lists", file=sys.stderr
        )
        return 2
    try:
        backend = get_backend("cupy")
    except NpllamaError as error:
        print(f"check_gpu: error: {error}", file=sys.stderr)
        return 2
    cupy = backend.xp
    driver = _version(cupy.cuda.runtime.driverGetVersion())
    runtime = _version(cupy.cuda.runtime.runtimeGetVersion())
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    free = (backend.free_bytes() or 0) / 1e9
    print(
        f"{now}: {backend.device_name()}, {free:.0f} GB free, driver for CUDA {driver}, "
        f"CuPy {cupy.__version__} (CUDA {runtime}), NumPy {np.__version__}, "
        f"Python {sys.version.split()[0]}"
    )
    return 0


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


if __name__ == "__main__":
    sys.exit(main())
