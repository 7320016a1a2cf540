"""--prompt-cache FILE: read before a generation, written after it."""

import os
from collections.abc import Sequence
from pathlib import Path

from npllama.atomic_file import check_writable
from npllama.errors import InputError
from npllama.llama import Llama
from npllama.prompt_cache import StoredPrompt, check_is_prompt_cache, is_new, save_cache


class PromptCacheFile:
    """A cache that begins as a file of earlier ids, and becomes the file again.

    Args:
        llama: the model.
        path: of the file, which need not exist yet.
        ids: the prompt, of which the cache then holds what the file has of it. None is all that
            the file has, for a caller who truncates the cache.
        context: positions that the cache has room for; None is the model's.
        read_only: the file must exist and is not written.

    Attributes:
        cache: of one row.
        n_kept: ids that it holds from the file.

    Raises:
        InputError: the file cannot be used; see also `check_options`.
        OutOfMemoryError: so many positions do not fit.
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
        """Write the file, where the cache holds more ids than the file or other ones.

        Raises:
            InputError: it cannot be written.
        """
        ids = self.cache.ids[0]
        if not self._read_only and ids != self._stored[: len(ids)]:
            save_cache(self._llama, self.cache, self._path)
            self._stored = list(ids)


def check_options(path: str | None, read_only: bool, n_prompts: int = 1) -> None:
    """Refuse, before a model is loaded, options that cannot be served with any.

    Raises:
        InputError: --prompt-cache-read-only alone, several prompts, a path that holds something
            else than a prompt cache, or one that cannot be written later.
    """
    if path is None:
        if read_only:
            raise InputError("--prompt-cache-read-only is for --prompt-cache: give both")
        return
    if n_prompts > 1:
        raise InputError(
            f"--prompt-cache is for one prompt and there are {n_prompts}: give one, or leave it out"
        )
    if read_only or not is_new(path):
        check_is_prompt_cache(path)
    if not read_only:
        check_writable(Path(os.path.realpath(path)))
