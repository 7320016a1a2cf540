"""The main interface: `load` opens a model directory, and `Llama` reads and writes text."""

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from npllama.backend import Array, get_backend
from npllama.chat_formats import FORMATS as CHAT_FORMATS
from npllama.completion import Completion
from npllama.config import LlamaConfig
from npllama.dialogue import encode_chat, find_chat_format
from npllama.dialogue_parts import ChatFormat, Message
from npllama.errors import InputError, TokenizerError, TokenizerWarning
from npllama.generation import Generation
from npllama.kv_cache import KVCache
from npllama.memory import require_free_memory
from npllama.model import Transformer
from npllama.not_a_model import (
    HOW_TO_GET_ONE,
    as_given,
    directory_instead,
    file_instead,
    missing_instead,
)
from npllama.ops import Ops, ops_for
from npllama.parameters import Parameters
from npllama.prompt_cache import load_cache, save_cache
from npllama.row import Row, StopFilter
from npllama.sampling_options import Sampling, checked_seed, is_integer
from npllama.serving import Server
from npllama.text_stream import TextStream
from npllama.tokenizer import Tokenizer
from npllama.tokenizer_files import check_size, mismatch, read_tokenizer, tokenizer_file
from npllama.weight_formats import FORMATS
from npllama.weights import Checkpoint

Prompt = str | Sequence[int]
Method = TypeVar("Method", bound=Callable)
MAX_NEW_TOKENS = 512
MAX_TOP_LOGPROBS = 20  # each one takes a pass over the logits
MAX_THREADS = 1024
DEFAULT_SAMPLING = Sampling()
NO_TOKENIZER = (
    "{} has no tokenizer.model or tokenizer.json: copy the checkpoint's file there to use text, "
    "or pass token ids"
)
SHIPPED_CANNOT_CHAT = (
    "the model that ships with npllama tells stories and cannot chat: load a chat model, or name "
    "a format with chat_format= (--chat-format)"
)
SHIPPED = Path(__file__).parent / "assets" / "stories"
"""The model that ships with the package."""


def shows_keywords_of(source: Callable, but: Sequence[str] = ()) -> Callable[[Method], Method]:
    """A decorator that shows the keywords of `source` in place of the `**` of a method.

    help() and notebooks show this signature. The keywords and their defaults are thus written
    once.

    Args:
        but: keywords to leave out.
    """
    passed_on = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(source).parameters.values()
        if parameter.default is not parameter.empty and parameter.name not in but
    ]

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        method.__signature__ = signature.replace(parameters=[*own, *passed_on])
        return method

    return decorate


class Llama(Transformer):
    """A transformer that reads and writes text. `load` returns one.

    A pickle of it contains the arguments of `load`, and no weights or caches. Unpickling calls
    `load` again, so another process needs access to the same directory.

    Attributes:
        config, sizes, parameters, ops, backend, context, cache_dtype: see Transformer.
        tokenizer: None if the directory has no readable tokenizer. Methods that take ids still
            work.
        dtype: the name of the weights' storage dtype.
        notes: the warnings of `load`, one line each: a tokenizer that does not fit the model.
    """

    def __init__(
        self,
        config: LlamaConfig,
        parameters: Parameters,
        ops: Ops,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        no_tokenizer: str = NO_TOKENIZER.format("the model"),
        cache_dtype: np.dtype | str | None = None,
    ) -> None:
        super().__init__(config, parameters, ops, context, cache_dtype)
        self.tokenizer = tokenizer
        self.notes: tuple[str, ...] = ()
        if tokenizer is not None:
            check_size(tokenizer, "the tokenizer", config.vocab_size)
            self.tokenizer = tokenizer.for_model(config.vocab_size, config.eos_ids)
            note = mismatch(self.tokenizer, config.vocab_size, config.eos_ids)
            self.notes = () if note is None else (note,)
        self._no_tokenizer = no_tokenizer
        self._n_tokens, self._allowed = self._choosable()
        self.dtype = parameters.layers[0].wq.format.name
        self._loaded: tuple[tuple, Parameters] | None = None  # arguments of load, its result
        self._chat_format: ChatFormat | None = None

    def __reduce__(self) -> tuple[Callable, tuple]:
        """The pickle: `load` and its arguments.

        Raises:
            InputError: the model was not loaded from a directory, or its weights were replaced.
        """
        if self._loaded is None:
            raise InputError(
                "a model is pickled by its path, and this one was not loaded from a directory: "
                "expected one that npllama.load returned"
            )
        arguments, parameters = self._loaded
        if parameters is not self.parameters:
            raise InputError(
                "a model is pickled by its path, and the weights of this one were replaced after "
                "npllama.load: expected the model as it was loaded"
            )
        return load, arguments

    def __copy__(self) -> "Llama":
        """A model with the same weight arrays; nothing is loaded again."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<Llama of {c.n_layers} layers, D {c.dim}, V {c.vocab_size}, "
            f"{self.parameters.nbytes / 1e6:.1f} MB in {self.dtype}, context {self.context}, "
            f"{self.backend.name}>"
        )

    @shows_keywords_of(Sampling)
    def new_generation(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = MAX_NEW_TOKENS,
        seed: int | None = None,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool | None = False,
        fresh_text: bool | None = False,
        cache: KVCache | None = None,
        batch_size: int | None = None,
        top_logprobs: int | None = 0,
        sampling: Sampling | None = DEFAULT_SAMPLING,
        **changes: float | None,
    ) -> Generation:
        """A generation that has not started: iterate over its (row, text) pieces, then call
        `.completions()`.

        `generate`, `stream` and `generate_batch` take the same keywords. The value None selects
        the default of a keyword.

        Args:
            prompts: each a text, or token ids, which are used unchanged; "" is BOS alone.
            max_new_tokens: the most tokens of a completion, which also ends when the context is
                full.
            seed: the same seed gives the same text. None is a random seed, which the completion
                reports.
            stop: texts that end the completion and are not part of it.
            ignore_eos: go on after an end-of-sequence id.
            fresh_text: the completion is a separate text, such as the answer to
                npllama.dialogue.encode_chat, and has no leading space.
            cache: from `new_cache` or `load_cache`, with a row per prompt. Each row holds the first
                ids of its prompt, or none, and the model reads only the others. Afterwards it holds
                the prompt and the completion without its last id. After Ctrl-C it holds the ids
                that were read by then. A prompt that gets no new token is not read.
                `cache.keep(row, ids)` truncates a row for the next prompt.
            batch_size: the most prompts that are decoded together; when one ends, the next one
                begins. None is all of them, or as many as fit the memory.
            top_logprobs: number of most likely tokens per step in the completion's `top_logprobs`,
                up to 20. Their log-probabilities are those of the unchanged logits.
            sampling: how tokens are chosen.
            changes: fields of npllama.Sampling (temperature, top_k, ...) that replace those of
                `sampling`.

        Raises:
            InputError: a prompt does not fit the context (the message has its number, from 1), or
                an argument is out of range.
            TokenizerError: a prompt is a text, and the model has no tokenizer.
            TypeError: an unknown keyword.

        >>> generation = load().new_generation(["a", "b"], max_new_tokens=3, ignore_eos=True)
        >>> sorted({row for row, text in generation})
        [0, 1]
        >>> [len(completion.ids) for completion in generation.completions()]
        [3, 3]
        """
        max_new_tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if not is_integer(max_new_tokens) or max_new_tokens < 0:
            raise InputError(
                f"max_new_tokens is {max_new_tokens!r}: expected a whole number from 0"
            )
        max_new_tokens = int(max_new_tokens)  # a narrow integer of NumPy's overflows
        top_logprobs = 0 if top_logprobs is None else top_logprobs
        if not is_integer(top_logprobs) or not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise InputError(
                f"top_logprobs is {top_logprobs!r}: expected a whole number from 0 to "
                f"{MAX_TOP_LOGPROBS}"
            )
        sampling = _changed(DEFAULT_SAMPLING if sampling is None else sampling, changes)
        stops = _checked_stops(() if stop is None else stop)
        if stops and self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        if _n_prompts(prompts) == 0:
            raise InputError(f"prompts is {prompts!r:.60}: expected a list of at least one prompt")
        if cache is not None:
            self.checked_cache(cache, len(prompts))
        context = self.context if cache is None else cache.context
        rows = []
        for number, prompt in enumerate(prompts):
            where = f"prompt {number + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
            ids = self._checked_ids(prompt, where, number, cache)
            rows.append(
                Row(
                    number=number,
                    prompt_ids=ids,
                    limit=min(max_new_tokens, context - len(ids)),
                    eos_ids=frozenset(() if ignore_eos else self.config.eos_ids),
                    stop=StopFilter(stops),
                    tokenizer=self.tokenizer,
                    fresh_text=bool(fresh_text),
                )
            )
        seed = checked_seed(seed)
        batch_size = self._checked_batch_size(batch_size, rows, cache)
        return Generation(
            self,
            rows,
            sampling,
            seed,
            self._n_tokens,
            self._allowed,
            cache,
            batch_size,
            n_likeliest=int(top_logprobs),
        )

    def _checked_batch_size(
        self, batch_size: int | None, rows: Sequence[Row], cache: KVCache | None
    ) -> int:
        """The number of rows to decode together."""
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise InputError(f"batch_size is {batch_size!r}: expected a whole number from 1")
        most = len(rows) if batch_size is None else min(int(batch_size), len(rows))
        if cache is not None:
            if most < len(rows):
                raise InputError(
                    f"batch_size is {batch_size} and the cache has a row for each of {len(rows)} "
                    "prompts: give one of the two"
                )
            return most
        longest = max(len(row.prompt_ids) + row.limit for row in rows)
        if batch_size is None:
            return self.rows_that_fit(most, longest)
        self.check_own_memory(most, longest)
        return most

    def checked_cache(self, cache: KVCache, n_prompts: int) -> KVCache:
        """The cache, which must be from this model and have a row per prompt.

        Raises:
            InputError: it is from another model, or has another number of rows.
        """
        self.check_own_cache(cache)
        if len(cache.lengths) != n_prompts:
            raise InputError(
                f"the cache has {len(cache.lengths)} rows and there are {n_prompts} prompts: "
                "expected a row per prompt"
            )
        return cache

    @shows_keywords_of(new_generation)
    def generate(self, prompt: Prompt | None = "", **options: Any) -> Completion:
        """Continue a prompt; `generate_batch` continues several.

        Args:
            prompt: a text, or token ids, which are used unchanged; "" is BOS alone.
            options: max_new_tokens, temperature, seed, stop and the other keywords of
                `new_generation`, which explains them and their errors.

        Returns:
            A Completion: text, ids, log-probabilities, finish reason, timings, seed.

        Raises:
            KeyboardInterrupt: Ctrl-C. The text so far is lost; `stream` and `new_generation`
                keep it.

        >>> llama = load()
        >>> completion = llama.generate("Once upon", max_new_tokens=5, seed=1, ignore_eos=True)
        >>> len(completion.ids), completion.finish_reason
        (5, 'length')
        >>> completion.text == llama.generate(
        ...     "Once upon", max_new_tokens=5, seed=1, ignore_eos=True
        ... ).text
        True
        """
        return self.generate_batch([_one_prompt(prompt)], **options)[0]

    @shows_keywords_of(new_generation)
    def stream(self, prompt: Prompt | None = "", **options: Any) -> TextStream:
        """As `generate`, yielding each piece of text as soon as it is final.

        The joined pieces are `generate(...).text`, and no piece has a part of a character. After
        the last piece, the stream's `completion` is the result of `generate`: finish reason,
        log-probabilities, ...

        >>> llama = load()
        >>> pieces = list(llama.stream("Once", max_new_tokens=8, temperature=0))
        >>> "".join(pieces) == llama.generate("Once", max_new_tokens=8, temperature=0).text
        True
        >>> stream = llama.stream("Once", max_new_tokens=8, temperature=0)
        >>> for piece in stream:
        ...     print(end=piece)
         upon a time, there was a little
        >>> stream.completion.finish_reason
        'length'
        """
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        return TextStream(self.new_generation([_one_prompt(prompt)], **options))

    @shows_keywords_of(new_generation)
    def generate_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """Continue several prompts of any lengths together; the keywords are those of `generate`.

        At most `batch_size` prompts are decoded together. When one ends, the next one begins.

        >>> both = load().generate_batch(["a", "Once upon"], max_new_tokens=4, temperature=0)
        >>> [len(completion.ids) for completion in both]
        [4, 4]
        """
        generation = self.new_generation(prompts, **options)
        generation.run()
        return generation.completions()

    @property
    def chat_format(self) -> ChatFormat:
        """The chat format that the model was trained on, read from its directory once.

        It is the directory's chat template. Without one it is the format of Llama-2-chat, whose
        original files have no template, and a TokenizerWarning says so.

        Raises:
            InputError: the model was not loaded from a directory, or it is the one that ships with
                the package, which cannot chat.
            TokenizerError: the chat template is damaged.
        """
        if self._chat_format is None:
            if self._loaded is None:
                raise InputError(
                    "the model was not loaded from a directory, so its chat format is unknown: "
                    f"give chat_format=, one of {', '.join(CHAT_FORMATS)}"
                )
            directory = self._loaded[0][0]
            if directory is None or Path(directory) == SHIPPED:
                raise InputError(SHIPPED_CANNOT_CHAT)
            self._chat_format, note = find_chat_format(directory)
            if note is not None:
                warnings.warn(note, TokenizerWarning, stacklevel=2)
        return self._chat_format

    def resolved_chat_format(self, chat_format: str | ChatFormat | None) -> ChatFormat:
        """The chat format of a name, or the format given; None is the model's own.

        Raises:
            InputError: the name is unknown, or see `chat_format`.
            TokenizerError: see `chat_format`.
        """
        if chat_format is None:
            return self.chat_format
        if isinstance(chat_format, str):
            return find_chat_format(None, chat_format)[0]
        if not callable(chat_format):
            raise InputError(
                f"chat_format is {chat_format!r:.60}: expected a name of "
                f"{', '.join(CHAT_FORMATS)}, or a format of npllama.chat_formats"
            )
        return chat_format

    @shows_keywords_of(new_generation, but=("fresh_text",))
    def chat(
        self,
        messages: Iterable[Message],
        *,
        answer: str | None = "",
        chat_format: str | ChatFormat | None = None,
        **options: Any,
    ) -> Completion:
        """Answer the last message of a dialogue.

        Each call reads the whole dialogue. `npllama.Chat` reads only what is new.

        Args:
            messages: {"role": ..., "content": ...} each. The roles are an optional "system", then
                "user" and "assistant" in turn, and "user" last. The template of a checkpoint may
                allow others.
            answer: the beginning of the answer, which the model continues. The completion does not
                contain it.
            chat_format: a name of npllama.chat_formats.FORMATS, or a format; None is the property
                `chat_format`.
            options: keywords of `new_generation`, which explains them and their errors. The default
                of `fresh_text` is True, except with `answer`. A `cache` is truncated to the first
                ids that it has in common with the dialogue.

        Raises:
            InputError: something else than messages, roles that the format does not know, or a
                model without a chat format.
            TokenizerError: the model has no tokenizer, or its chat template cannot be rendered.

        >>> hello = [{"role": "user", "content": "Hello!"}]
        >>> len(load().chat(hello, chat_format="llama-2", max_new_tokens=3, ignore_eos=True).ids)
        3
        """
        prompt, options = self._chat_prompt(messages, answer, chat_format, options)
        return self.generate(prompt, **options)

    @shows_keywords_of(new_generation, but=("fresh_text",))
    def stream_chat(
        self,
        messages: Iterable[Message],
        *,
        answer: str | None = "",
        chat_format: str | ChatFormat | None = None,
        **options: Any,
    ) -> TextStream:
        """As `chat`, yielding each piece of text as soon as it is final; see `stream`.

        >>> hello = [{"role": "user", "content": "Hello!"}]
        >>> stream = load().stream_chat(hello, chat_format="vicuna", max_new_tokens=5)
        >>> "".join(stream) == stream.completion.text
        True
        """
        prompt, options = self._chat_prompt(messages, answer, chat_format, options)
        return self.stream(prompt, **options)

    def _chat_prompt(
        self,
        messages: Iterable[Message],
        answer: str | None,
        chat_format: str | ChatFormat | None,
        options: Mapping[str, Any],
    ) -> tuple[list[int], dict[str, Any]]:
        """The ids of a dialogue, and the options with which they are continued."""
        self.encode("")  # raises an error if there is no tokenizer
        chosen = self.resolved_chat_format(chat_format)
        answer = "" if answer is None else answer
        ids = encode_chat(self.tokenizer, messages, chosen, answer)
        given = {name: value for name, value in options.items() if value is not None}
        if "cache" in given:
            self.checked_cache(given["cache"], 1).keep(0, ids)
        return ids, {"fresh_text": not answer.strip(), **given}

    def server(self, batch_size: int = 8, context: int | None = None) -> Server:
        """An object that decodes the requests of many threads together; see Server.

        Args:
            batch_size: the most requests that are decoded together.
            context: positions per request, for prompt and completion; None is the model's context.

        Raises:
            OutOfMemoryError: the positions do not fit the memory.

        >>> with load().server(batch_size=2, context=64) as server:
        ...     len(server.generate("Once", max_new_tokens=5, ignore_eos=True).ids)
        5
        """
        return Server(self, self._n_tokens, self._allowed, batch_size, context)

    def save_cache(self, cache: KVCache, path: str | Path, row: int = 0) -> None:
        """Write a row of a cache to a file that `load_cache` reads.

        Any number of programs can then continue a long prompt that was read once. The file
        contains the row's token ids and their keys and values.

        Args:
            cache: from this model's `new_cache`.
            path: a new file, or a prompt cache, which is replaced. The file is written whole or
                not at all.

        Raises:
            InputError: the row is empty, the cache is from another model, `path` is another kind
                of file, or it cannot be written.

        >>> from tempfile import TemporaryDirectory
        >>> llama = load()
        >>> ids = llama.encode("Once upon a time, there was")
        >>> cache = llama.new_cache()
        >>> first = llama.generate(ids, cache=cache, max_new_tokens=5, temperature=0)
        >>> with TemporaryDirectory() as folder:
        ...     llama.save_cache(cache, folder + "/once.safetensors")
        ...     cache = llama.load_cache(folder + "/once.safetensors", ids)
        >>> cache.ids == [ids[:-1]]  # a prompt's last id is always read
        True
        >>> again = llama.generate(ids, cache=cache, max_new_tokens=5, temperature=0)
        >>> again.text == first.text, again.timings.prompt_tokens
        (True, 1)
        """
        save_cache(self, cache, path, row)

    def load_cache(
        self, path: str | Path, ids: Sequence[int] | None = None, context: int | None = None
    ) -> KVCache:
        """A cache of one row, read from a file that `save_cache` wrote.

        The file must be from a model with the same weights, storage dtype and rotary frequencies,
        since others give other keys and values. The dtype of the cache may differ, as between NumPy
        and CuPy; the elements are then converted.

        Args:
            ids: a prompt. The row gets the first ids that the file and the prompt have in common,
                without the prompt's last id, so `generate` accepts the cache with this prompt.
                None is all ids of the file.
            context: positions of the cache; None is the model's context. Ids of the file that do
                not fit are left out.

        Raises:
            InputError: the file does not exist, is damaged, is no prompt cache, or is from another
                model.
            OutOfMemoryError: the positions do not fit the memory.
        """
        return load_cache(self, path, ids, context)

    def _choosable(self) -> tuple[int, Array | None]:
        """The ids that may be sampled: pieces, added tokens and end ids, but no padding rows.

        Returns:
            n_tokens: the last such id + 1.
            A mask (n_tokens,) on the device, or None if all ids below n_tokens may be sampled.
        """
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

    def _checked_ids(
        self, prompt: Prompt, where: str, row: int, cache: KVCache | None
    ) -> list[int]:
        try:
            ids = self.encode(prompt)
            self.to_tokens(ids)
            if cache is not None:
                cache.check_prefix(row, ids)
        except InputError as error:
            raise InputError(f"{where}{error}") from None
        return list(map(int, ids))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, BOS first; ids are returned unchanged.

        If tokenizer_config.json has `add_bos_token` false, there is no BOS, and if it has
        `add_eos_token` true, EOS is at the end. The result is never empty: an empty text gives
        BOS.

        >>> load().encode("a")
        [1, 261]
        """
        if not isinstance(prompt, str):
            is_scalar = isinstance(prompt, np.ndarray) and prompt.ndim == 0
            if isinstance(prompt, bytes) or is_scalar or not isinstance(prompt, Iterable):
                raise InputError(f"the prompt is {prompt!r:.60}: expected a text or token ids")
            return list(prompt)
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        return self.tokenizer.encode_prompt(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, such as those of a completion. Control tokens have no text.

        Raises:
            InputError: something else than ids, or an id outside the vocabulary.
            TokenizerError: the model has no tokenizer.

        >>> llama = load()
        >>> llama.decode(llama.encode("Once upon a time"))
        'Once upon a time'
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise InputError(f"the ids are {ids!r:.60}: expected token ids, such as [1, 261]")
        if self.tokenizer is None:
            raise TokenizerError(self._no_tokenizer)
        ids = list(ids)
        for i, id_ in enumerate(ids):
            if not is_integer(id_):
                raise InputError(f"token id {id_!r:.60} at position {i} is not an integer")
        return self.tokenizer.decode(ids)

    @property
    def bytes_per_forward(self) -> int:
        """Bytes of weights that a forward pass reads: all except an untied embedding, of which it
        reads one row per token."""
        parameters = self.parameters
        untied = parameters.head.lm_head.values is not parameters.embedding.values
        return parameters.nbytes - (parameters.embedding.nbytes if untied else 0)


def load(
    path: str | Path | None = None,
    backend: str | None = "auto",
    dtype: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    device: int | None = None,
    graph: bool = True,
    rope_scaling: str | None = None,
) -> Llama:
    """Load a model directory: config.json, safetensors, tokenizer.model or tokenizer.json.

    A TokenizerWarning reports a tokenizer with far fewer tokens than the embedding has rows. If
    tokenizer.json is of another kind than Llama's, the model takes ids, and raises an error for
    text.

    Args:
        path: a directory with Hugging Face's file names; None is the model that ships with the
            package, which tells short stories (npllama/assets/stories/README.md).
        backend: "numpy", "cupy", or "auto", which is CuPy if CuPy and a CUDA device are available.
            None is "auto".
        dtype: storage dtype of the matrices, "float32", "bfloat16", "float16" or "int8"
            (see npllama.quantization). None keeps the dtype of the files. On the CPU, the arrays
            are then views of the memory-mapped file.
        context: positions to reserve memory for; at most, and by default, the model's context. If
            config.json has the RoPE scaling "dynamic", a longer context turns the scaling on for
            all positions.
        threads: number of CPU threads. None is the number of free cores, which is measured
            repeatedly.
        device: the number of the GPU, from 0; None is the first.
        graph: whether a GPU captures each step as a CUDA graph and replays it, which is faster.
            False launches each kernel.
        rope_scaling: "TYPE:FACTOR", such as "linear:4", for a checkpoint whose config.json lacks
            the field or has a wrong one. TYPE is linear, dynamic or yarn. The factor multiplies
            original_max_position_embeddings, or max_position_embeddings if the config lacks it;
            "linear:1" is no scaling.

    Raises:
        NpllamaError: an error of one of its subclasses, whose message is one line.

    >>> llama = load()
    >>> llama.config.n_layers, llama.dtype
    (6, 'int8')

    A checkpoint in a directory is used the same way (these lines are not tested):

    >>> llama = load("llama-2-7b", dtype="bfloat16")    # doctest: +SKIP
    >>> print(llama.generate("The sea").text)           # doctest: +SKIP
    >>> for piece in llama.stream("The sea"): ...       # doctest: +SKIP
    >>> logits = llama.logits(llama.encode("The sea"))  # doctest: +SKIP
    """
    if dtype is not None and dtype not in FORMATS:
        raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(path, str | os.PathLike | None):
        raise InputError(f"path is {path!r}: expected a model directory")
    directory = SHIPPED if path is None else _checked_directory(as_given(path))
    backend = "auto" if backend is None else backend
    config = LlamaConfig.from_directory(directory, rope_scaling)
    context = _checked_context(context, config)
    ops = ops_for(get_backend(backend, _checked_threads(threads), device), graph)
    tokenizer, no_tokenizer = None, NO_TOKENIZER.format(directory)
    try:
        tokenizer = read_tokenizer(directory, config)
    except TokenizerError as error:
        if (directory / "tokenizer.model").exists():
            raise
        no_tokenizer = str(error)
    if tokenizer is not None:
        check_size(tokenizer, tokenizer_file(directory), config.vocab_size)
    checkpoint = Checkpoint(directory, config, dtype)
    cache_dtype = ops.cache_dtype(checkpoint.storage_dtype)
    require_free_memory(
        config,
        ops,
        cache_dtype,
        1,
        context,
        min(ops.prefill_chunk(), context),
        weights=checkpoint.nbytes,
        upload=checkpoint.largest_nbytes,
    )
    parameters = checkpoint.parameters(ops)
    llama = Llama(config, parameters, ops, context, tokenizer, no_tokenizer, cache_dtype)
    found = None if path is None else os.path.abspath(directory)  # None: shipped
    arguments = found, backend, dtype, context, threads, device, graph, rope_scaling
    llama._loaded = arguments, parameters
    for note in llama.notes:
        warnings.warn(note, TokenizerWarning, stacklevel=2)
    return llama


def _checked_directory(given: str) -> Path:
    if not given:  # Path("") would be the current directory
        raise InputError("path is empty: expected a model directory")
    path = Path(given)
    if not os.path.exists(path):  # False, not an error, for a name that is too long
        what = "does not exist: expected a model directory with a config.json"
        raise InputError(f"{given} {missing_instead(given) or what}")
    if not path.is_dir():
        what = "is a file: expected a model directory; npllama convert makes one"
        raise InputError(f"{path} {file_instead(path) or what}")
    if not (path / "config.json").exists():
        what = f"has no config.json: expected a model directory; {HOW_TO_GET_ONE}"
        raise InputError(f"{path} {directory_instead(path) or what}")
    return path


def _n_prompts(prompts: Sequence[Prompt]) -> int:
    """The number of prompts of a batch; 0 for a single text and for an object without a length,
    such as a generator."""
    try:
        return 0 if isinstance(prompts, str | bytes) else len(prompts)
    except TypeError:
        return 0


def _changed(sampling: Sampling, changes: Mapping[str, float]) -> Sampling:
    """`sampling` with some fields replaced."""
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling is {sampling!r}: expected a npllama.Sampling")
    unknown = sorted(changes.keys() - {field.name for field in fields(sampling)})
    if unknown:
        expected = [*inspect.signature(Llama.new_generation).parameters][2:]
        raise TypeError(f"no keyword is named {unknown[0]}: expected one of {', '.join(expected)}")
    return replace(sampling, **{k: value for k, value in changes.items() if value is not None})


def _one_prompt(prompt: Prompt | None) -> Prompt:
    """The prompt, "" for None; the error for several prompts names the methods that take them."""
    if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str | bytes):
        first = None if getattr(prompt, "shape", None) == () or not len(prompt) else prompt[0]
        if isinstance(first, str | bytes | Sequence | np.ndarray):
            raise InputError(
                "found several prompts, expected one: generate_batch(prompts) continues them "
                "together, and new_generation(prompts) yields each (row, text) when it is final"
            )
    return "" if prompt is None else prompt


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
    return None if threads is None else int(threads)


def _checked_context(context: int | None, config: LlamaConfig) -> int:
    if context is None:
        return config.context_length
    if not is_integer(context) or context < 1:
        raise InputError(f"context is {context!r}: expected a whole number of at least 1")
    if context > config.longest_context:
        raise InputError(
            f"context is {context}: the model was trained for {config.longest_context} positions"
        )
    return int(context)
