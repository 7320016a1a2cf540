"""Write tests/cupy_api.json: the names and keywords of CuPy's public interface.

    python tools/make_cupy_api.py        (needs a cupy package, but no GPU)

On a machine without CuPy, tests check every `xp` name that npllama uses against this list. The
tests' strict arrays have exactly the methods that it names.
"""

import inspect
import json
import re
import types
from pathlib import Path

import cupy

from npllama.console import open_streams, tell

DEST = Path(__file__).parent.parent / "tests" / "cupy_api.json"


def parameters(function: object) -> list[str]:
    """Parameter names, from the signature or else from the first line of the docstring."""
    try:
        return [name for name in inspect.signature(function).parameters if name != "self"]
    except (TypeError, ValueError):  # compiled functions have no signature
        first_line = (inspect.getdoc(function) or "").split("\n")[0]
    inside = re.search(r"\((.*)\)", first_line)
    parts = inside.group(1).split(",") if inside else []
    names = [re.search(r"(\w+)\s*(=|$)", part.strip()) for part in parts]
    return [name.group(1) for name in names if name and name.group(1) != "self"]


def public(owner: object, prefix: str = "") -> dict[str, list[str] | None]:
    """Dotted name -> parameter names; None for what is not callable."""
    found = {}
    for name in sorted(dir(owner)):
        value = getattr(owner, name, None)
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        found[prefix + name] = parameters(value) if callable(value) else None
    return found


def main() -> None:
    """Write the file."""
    open_streams()
    api = {
        "version": cupy.__version__,
        "functions": public(cupy)
        | public(cupy.cuda, "cuda.")
        | public(cupy.cuda.runtime, "cuda.runtime."),
        "ndarray": public(cupy.ndarray),
    }
    DEST.write_text(json.dumps(api, indent=0) + "\n")
    tell(f"wrote {DEST}: CuPy {api['version']}")


if __name__ == "__main__":
    main()
