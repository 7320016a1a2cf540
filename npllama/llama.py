"""The library's front door: `load` a model directory, then `Llama` reads and writes text."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from npllama.backend import Array, get_backend
from npllama.config import LlamaConfig
from npllama.errors import InputError, TokenizerError, TokenizerWarning
from npllama.generation import Completion, Generation, Row, StopFilter
from npllama.memory import check_memory
from npllama.model import PREFILL_CHUNK, Transformer
from npllama.not_a_model import (
    directory_instead,
    file_instead,
    missing_instead,
)
from npllama.ops import Ops, ops_for
from npllama.parameters import Parameters
from npllama.sampling import Sampling, checked_seed, is_integer
from npllama.tokenizer import Tokenizer
from npllama.tokenizer_files import mismatch, read_tokenizer
from npllama.weight_formats import FORMATS
from npllama.weights import Checkpoint

Prompt = str | Sequence[int]
MAX_NEW_TOKENS = 512
MAX_THREADS = 1024
DEFAULT_SAMPLING = Sampling()
NO_TOKENIZER = (
    "the model directory has no tokenizer.model or tokenizer.json: put the checkpoint's there to "
    "work with text, or pass token ids"
)
SHIPPED = Path(__file__).parent / "assets" / "stories"
"""The model that ships with the package."""


class Llama(Transformer):
    """A transformer that reads and writes text; made by `load`.

    Attributes:
        config, parameters, ops, backend, context: see Transformer.
        tokenizer: None where the directory has none that can be read; ids work all the same.
        dtype: storage dtype of the weights, by name.
        notes: what `load` warns of, a line each: a tokenizer that fits the model badly.
    """

    def __init__(
        self,
        config: LlamaConfig,
        parameters: Parameters,
        ops: Ops,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        no_tokenizer: str = NO_TOKENIZER,
    ) -> None:
        super().__init__(config, parameters, ops, context)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model "
                f"{config.vocab_size}: expected the tokenizer.model that came with the checkpoint"
            )
        self.tokenizer = tokenizer
        self.notes: tuple[str, ...] = ()
        if tokenizer is not None:
            self.tokenizer = tokenizer.for_model(config.vocab_size, config.eos_ids)
            note = mismatch(self.tokenizer, config.vocab_size, config.eos_ids)
            self.notes = () if note is None else (note,)
        self._no_tokenizer = no_tokenizer
        self._n_tokens, self._allowed = self._choosable()
        self.dtype = parameters.layers[0].wq.format.name

    def generate(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fresh_text: bool = False,
    ) -> Completion:
        """Continue a prompt.

        Args:
            prompt: a text, or token ids taken as they are; "" is BOS alone.
            max_new_tokens: the completion ends here, or where the context is full.
            temperature: 0 for the likeliest token each time; higher is more surprising.
            top_p, top_k, min_p, repetition_penalty: see npllama.sampling.Sampling.
            seed: reproduces a text; None is a random one, found in the completion.
            stop: texts that end the completion and are not part of it.
            ignore_eos: go on after an end-of-sequence id.
            fresh_text: the completion begins a text of its own, as the answer to
                npllama.chat.encode_chat does, and has no leading space.

        Returns:
            A Completion: text, ids, log-probabilities, finish reason, timings, seed.

        Raises:
            InputError: a prompt that does not fit the context (of several by its number, from 1),
                or an argument out of range.
            TokenizerError: text asked of a model without a tokenizer.

        >>> llama = load()
        >>> completion = llama.generate("Once upon", max_new_tokens=5, seed=1, ignore_eos=True)
        >>> len(completion.ids), completion.finish_reason
        (5, 'length')
        >>> completion.text == llama.generate(
        ...     "Once upon", max_new_tokens=5, seed=1, ignore_eos=True
        ... ).text
        True
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fresh_text=fresh_text,
        )[0]

    def stream(
        self,
        prompt: Prompt = "",
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fresh_text: bool = False,
    ) -> Iterator[str]:
        """As `generate`, yielding the text in pieces as they become certain.

        Joined, they are `generate(...).text`; no piece holds half a character.

        >>> llama = load()
        >>> pieces = list(llama.stream("Once", max_new_tokens=8, temperature=0))
        >>> "".join(pieces) == llama.generate("Once", max_new_tokens=8, temperature=0).text
        True
        """
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        generation = self.generation(
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fresh_text=fresh_text,
        )
        return (text for _row, text in generation if text)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = DEFAULT_SAMPLING,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fresh_text: bool = False,
    ) -> list[Completion]:
        """Continue several prompts at once, each as long as it is; see `generate`.

        >>> from npllama.sampling import Sampling
        >>> greedy = Sampling(temperature=0)
        >>> both = load().generate_batch(["a", "Once upon"], max_new_tokens=4, sampling=greedy)
        >>> [len(completion.ids) for completion in both]
        [4, 4]
        """
        generation = self.generation(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            fresh_text=fresh_text,
        )
        for _ in generation:
            pass
        return generation.completions()

    def generation(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = DEFAULT_SAMPLING,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        fresh_text: bool = False,
    ) -> Generation:
        """The batch before it runs: iterate for (row, text) pieces, then `.completions()`.

        >>> generation = load().generation(["a", "b"], max_new_tokens=3, ignore_eos=True)
        >>> sorted({row for row, text in generation})
        [0, 1]
        >>> [len(completion.ids) for completion in generation.completions()]
        [3, 3]
        """
        if not is_integer(max_new_tokens) or max_new_tokens < 0:
            raise InputError(
                f"max_new_tokens is {max_new_tokens!r}: expected a whole number from 0"
            )
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling is {sampling!r}: expected a npllama.Sampling")
        stops = _checked_stops(stop)
        if stops and self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        if isinstance(prompts, str | bytes) or not prompts:
            raise InputError("prompts is not a list of at least one prompt")
        rows = []
        for number, prompt in enumerate(prompts):
            where = f"prompt {number + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
            ids = self._checked_ids(prompt, where)
            rows.append(
                Row(
                    number=number,
                    prompt_ids=ids,
                    limit=min(max_new_tokens, self.context - len(ids)),
                    eos_ids=frozenset(() if ignore_eos else self.config.eos_ids),
                    stop=StopFilter(stops),
                    tokenizer=self.tokenizer,
                    fresh_text=fresh_text,
                )
            )
        longest = max(len(row.prompt_ids) + row.limit for row in rows)
        self.check_memory(len(rows), longest)
        return Generation(self, rows, sampling, checked_seed(seed), self._n_tokens, self._allowed)

    def _choosable(self) -> tuple[int, Array | None]:
        """One more than the last id that may be chosen, and a mask (n_tokens,) on the device
        where some below may not: pieces, added tokens and end ids may, padding rows not."""
        n_rows = self.config.vocab_size
        if self.tokenizer is None:
            return n_rows, None
        n_pieces = self.tokenizer.vocab_size
        ids = {*self.tokenizer.added, *self.config.eos_ids}
        beyond = [id_ for id_ in ids if n_pieces <= id_ < n_rows]
        n_tokens = max(beyond, default=n_pieces - 1) + 1
        if n_tokens == n_pieces + len(beyond):
            return n_tokens, None
        allowed = np.arange(n_tokens) < n_pieces
        allowed[beyond] = True
        return n_tokens, self.backend.to_device(allowed)

    def _checked_ids(self, prompt: Prompt, where: str) -> list[int]:
        try:
            ids = self.encode(prompt)
            self.to_tokens(ids)
        except InputError as error:
            raise InputError(f"{where}{error}") from None
        return ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, BOS first; ids are taken as they are.

        Where tokenizer_config.json has `add_bos_token` false or `add_eos_token` true, there is
        no BOS, or EOS at the end. A text without ids, as the empty one, is BOS alone all the same.

        >>> load().encode("a")
        [1, 261]
        """
        if not isinstance(prompt, str):
            if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
                raise InputError(f"the prompt is {prompt!r}: expected a text or token ids")
            return list(prompt)
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        return self.tokenizer.encode_prompt(prompt)

    @property
    def bytes_per_forward(self) -> int:
        """Bytes of weights that one forward reads: all but an untied embedding, of which it
        reads a row a token."""
        parameters = self.parameters
        untied = parameters.head.lm_head.values is not parameters.embedding.values
        return parameters.nbytes - (parameters.embedding.nbytes if untied else 0)


def load(
    path: str | Path | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    context: int | None = None,
    threads: int | None = None,
) -> Llama:
    """Load a model directory: config.json, safetensors, tokenizer.model or tokenizer.json.

    A tokenizer with far fewer tokens than the model has rows is warned of, with a
    TokenizerWarning. A tokenizer.json of another kind than Llama's is refused where text is
    asked for; ids work.

    Args:
        path: the directory, as Hugging Face lays it out; None is the model that ships with the
            package, which tells little stories (npllama/assets/stories/README.md).
        backend: "numpy", "cupy", or "auto": CuPy where a CUDA device and CuPy are.
        dtype: storage dtype of the matrices, "float32", "bfloat16", "float16" or "int8"
            (see npllama.quantization); None keeps them as stored (on the CPU as views of the
            memory-mapped file).
        context: positions to plan memory for, at most and by default the model's own.
        threads: to compute with on the CPU; None for as many as there are free cores, which
            is looked at again and again.

    Raises:
        NpllamaError: one of its kinds, with one line that says what is wrong.

    >>> llama = load()
    >>> llama.config.n_layers, llama.dtype
    (6, 'int8')

    A checkpoint from a directory is used the same way (this one is not run here):

    >>> llama = load("llama-2-7b", dtype="bfloat16")    # doctest: +SKIP
    >>> print(llama.generate("The sea").text)           # doctest: +SKIP
    >>> for piece in llama.stream("The sea"): ...       # doctest: +SKIP
    >>> logits = llama.logits(llama.encode("The sea"))  # doctest: +SKIP
    """
    if dtype is not None and dtype not in FORMATS:
        raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(path, str | os.PathLike | None):
        raise InputError(f"path is {path!r}: expected a model directory")
    directory = SHIPPED if path is None else _checked_directory(Path(path))
    config = LlamaConfig.from_directory(directory)
    context = _checked_context(context, config)
    ops = ops_for(get_backend(backend, _checked_threads(threads)))
    tokenizer, no_tokenizer = None, NO_TOKENIZER
    try:
        tokenizer = read_tokenizer(directory, config)
    except TokenizerError as error:
        if (directory / "tokenizer.model").exists():
            raise
        no_tokenizer = str(error)
    checkpoint = Checkpoint(directory, config, dtype)
    cache_dtype = ops.cache_dtype(checkpoint.storage_dtype)
    chunk = min(PREFILL_CHUNK, context)
    check_memory(config, ops, cache_dtype, 1, context, chunk, weights=checkpoint.nbytes)
    llama = Llama(config, checkpoint.parameters(ops), ops, context, tokenizer, no_tokenizer)
    for note in llama.notes:
        warnings.warn(note, TokenizerWarning, stacklevel=2)
    return llama


def _checked_directory(path: Path) -> Path:
    if not os.path.exists(path):  # False, not an error, for a name that is too long
        what = "does not exist: expected a model directory with a config.json"
        raise InputError(f"{path} {missing_instead(path) or what}")
    if not path.is_dir():
        what = "is a file: expected a model directory; tools/convert.py makes one"
        raise InputError(f"{path} {file_instead(path) or what}")
    if not (path / "config.json").exists() and (what := directory_instead(path)) is not None:
        raise InputError(f"{path} {what}")
    return path


def _checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise InputError(f"a stop text is {text!r}: expected a text")
        if not text:
            raise InputError("a stop text is empty: expected at least one character")
    return stops


def _checked_threads(threads: int | None) -> int | None:
    if threads is not None and (not is_integer(threads) or not 1 <= threads <= MAX_THREADS):
        raise InputError(f"threads is {threads!r}: expected a whole number from 1 to {MAX_THREADS}")
    return threads


def _checked_context(context: int | None, config: LlamaConfig) -> int:
    if context is None:
        return config.context_length
    if not is_integer(context) or context < 1:
        raise InputError(f"context is {context!r}: expected a whole number of at least 1")
    if context > config.context_length:
        raise InputError(
            f"context is {context}: the model was trained for {config.context_length} positions"
        )
    return context
