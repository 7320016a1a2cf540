"""LLaMA-2 as explicit array math on NumPy and CuPy.

>>> import npllama
>>> llama = npllama.load()
>>> llama.logits([1, 100, 101]).shape
(3, 1024)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npllama.completion import Completion
    from npllama.conversation import Chat
    from npllama.errors import NpllamaError
    from npllama.llama import Llama, load
    from npllama.sampling_options import Sampling

__all__ = ["Chat", "Completion", "Llama", "NpllamaError", "Sampling", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import a name of `__all__` on first access.

    `python -m npllama.generate` runs this file first. Imports here would delay the handling of
    Ctrl-C in npllama.early_interrupt.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in ("completion", "conversation", "errors", "llama", "sampling_options"):
        exports = vars(importlib.import_module(f"{__name__}.{module}"))
        globals().update({name: exports[name] for name in __all__ if name in exports})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
