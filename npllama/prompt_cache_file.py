"""The file of --prompt-cache: it is read before a generation and written after it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from npllama.atomic_file import check_writable
from npllama.errors import InputError
from npllama.interrupts import ended_by_signals
from npllama.llama import Llama
from npllama.prompt_cache import StoredPrompt, check_is_prompt_cache, is_new, save_cache


class PromptCacheFile:
    """A cache that is read from a file, and saved to the file again.

    Args:
        llama: the model.
        path: the file. If it does not exist, the cache is empty.
        ids: a prompt. The cache then holds the first ids that the file and the prompt have in
            common, without the prompt's last id. None is all ids of the file, for a caller who
            truncates the cache.
        context: positions of the cache; None is the model's context.
        read_only: require that the file exists, and do not write it.

    Attributes:
        cache: a cache of one row.
        n_kept: number of ids in the cache that are from the file.

    Raises:
        InputError: the file cannot be used; see also `check_options`.
        OutOfMemoryError: the positions do not fit the memory.
    """

    def __init__(
        self,
        llama: Llama,
        path: str,
        ids: Sequence[int] | None = None,
        context: int | None = None,
        read_only: bool = False,
    ) -> None:
        self._llama, self._path, self._read_only = llama, path, read_only
        self._stored: list[int] = []
        if not read_only and is_new(path):
            llama.check_memory(1, llama.context if context is None else context)
            self.cache = llama.new_cache(1, context)
        else:
            stored = StoredPrompt(llama, path)
            self._stored = stored.ids.tolist()
            self.cache = stored.to_cache(ids, context)
        self.n_kept = self.cache.lengths[0]

    def save(self) -> None:
        """Write the cache to the file, unless its ids are a prefix of those in the file.

        Raises:
            InputError: the file cannot be written.
        """
        ids = self.cache.ids[0]
        if not self._read_only and ids != self._stored[: len(ids)]:
            save_cache(self._llama, self.cache, self._path)
            self._stored = list(ids)


@contextmanager
def saved_at_end(prompt_cache: PromptCacheFile | None) -> Iterator[None]:
    """A block after which a prompt cache is saved, even if an error, Ctrl-C, SIGTERM or SIGHUP ends
    the block. None is no prompt cache.

    Raises:
        InputError: the file cannot be written.
    """
    if prompt_cache is None:
        yield
        return
    with ended_by_signals():
        try:
            yield
        finally:
            prompt_cache.save()


def check_options(path: str | None, read_only: bool, n_prompts: int = 1) -> None:
    """Check the options before a model is loaded.

    Raises:
        InputError: --prompt-cache-read-only is given alone, there are several prompts, the path is
            another kind of file, or it cannot be written.
    """
    if path is None:
        if read_only:
            raise InputError("--prompt-cache-read-only is for --prompt-cache: give both")
        return
    if n_prompts > 1:
        raise InputError(
            f"--prompt-cache is for one prompt and there are {n_prompts}: give one prompt, or no "
            "--prompt-cache"
        )
    if read_only or not is_new(path):
        check_is_prompt_cache(path)
    if not read_only:
        try:
            check_writable(Path(os.path.realpath(path)))
        except InputError as error:
            hint = "" if is_new(path) else "; --prompt-cache-read-only only reads it"
            raise InputError(f"{error}{hint}") from None
