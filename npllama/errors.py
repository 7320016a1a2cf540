"""The one family of errors that a user can do something about.

Every message is one line: what was found, what was expected, what to do.
The command line prints it on stderr and exits with code 2.
"""

import contextlib


class NpllamaError(Exception):
    """Base of all errors that npllama raises on purpose."""

    def __init__(self, message: str) -> None:
        with contextlib.suppress(UnicodeError):  # names of files, where the locale is not UTF-8
            message = message.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        super().__init__(  # one line: names from files may hold line breaks
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        )


class InputError(NpllamaError):
    """An argument or a prompt that cannot be served."""


class ConfigError(NpllamaError):
    """A config.json that is damaged, or asks for mathematics that is not implemented."""


class WeightsError(NpllamaError):
    """A checkpoint whose tensors are missing, surplus, misshapen or truncated."""


class TokenizerError(NpllamaError):
    """A tokenizer that is missing, damaged, or does not belong to the model."""


class OtherTokenizerError(TokenizerError):
    """A tokenizer.json that is whole, and of a kind that is not implemented."""


class TokenizerWarning(UserWarning):
    """A tokenizer that can be used, and probably does not belong to the model."""


class BackendError(NpllamaError):
    """An array backend that was asked for and cannot be had."""


class WorkerError(NpllamaError):
    """A process that computed beside this one could not be started, or has ended."""


class NumericalError(NpllamaError):
    """The model computed something that is not a number."""


class OutOfMemoryError(NpllamaError):
    """More bytes needed than the device has free; found out before any is taken."""


def exhausted(error: Exception) -> str | None:
    """Which memory an error says is used up, "memory" or "GPU memory"; None where it says
    another thing. CUDA's own errors are RuntimeErrors that name a code."""
    codes = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, MemoryError):
        return "GPU memory" if type(error).__module__.startswith("cupy") else "memory"
    return "GPU memory" if any(code in str(error) for code in codes) else None
