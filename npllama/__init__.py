"""LLaMA-2 as explicit array math on NumPy and CuPy.

>>> import npllama
>>> llama = npllama.load()
>>> llama.logits([1, 100, 101]).shape
(3, 1024)
"""

from npllama.completion import Completion
from npllama.errors import NpllamaError
from npllama.llama import Llama, load
from npllama.sampling_options import Sampling

__all__ = ["Completion", "Llama", "NpllamaError", "Sampling", "load"]
__version__ = "0.1.0"
