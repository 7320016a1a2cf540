"""The exceptions that npllama raises for problems that a user can fix.

Every message is one line: what was found, what was expected, what to do. The command line prints
the message to stderr and exits with code 2.
"""

import contextlib


class NpllamaError(Exception):
    """Base class of all errors that npllama raises on purpose."""

    def __init__(self, message: str) -> None:
        with contextlib.suppress(UnicodeError):  # file names, if the locale is not UTF-8
            message = message.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        super().__init__(  # escaped, because names from files may hold line breaks
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        )


class InputError(NpllamaError):
    """An argument or a prompt is invalid."""


class ConfigError(NpllamaError):
    """A config.json is damaged, or asks for mathematics that is not implemented."""


class WeightsError(NpllamaError):
    """A checkpoint's tensors are missing, unexpected, misshapen or truncated."""


class TokenizerError(NpllamaError):
    """A tokenizer is missing or damaged, or does not belong to the model."""


class OtherTokenizerError(TokenizerError):
    """A tokenizer.json is intact, but of a kind that is not implemented."""


class TokenizerWarning(UserWarning):
    """A tokenizer is usable, but probably does not belong to the model."""


class BackendError(NpllamaError):
    """The requested array backend is not available."""


class WorkerError(NpllamaError):
    """A worker process could not be started, or has ended."""


class NumericalError(NpllamaError):
    """The model computed a NaN or an infinity."""


class OutOfMemoryError(NpllamaError):
    """The device has less free memory than is needed. Raised before any of it is allocated."""


def exhausted(error: Exception) -> str | None:
    """Which memory an exception reports as exhausted: "memory", "GPU memory", or None if the
    exception has another cause. CUDA's own errors are RuntimeErrors whose message has a code."""
    codes = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, MemoryError):
        return "GPU memory" if type(error).__module__.startswith("cupy") else "memory"
    return "GPU memory" if any(code in str(error) for code in codes) else None
