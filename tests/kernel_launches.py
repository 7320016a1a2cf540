"""Finds the kernel launches of real models without a GPU and without computing anything.

CupyOps runs on uninitialized NumPy arrays, with a Kernels object that records each launch. The
reference's blocks and products are replaced by functions that compute nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np

from benchmarking.shapes import SHAPES
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.llama import SHIPPED
from npllama.model import Transformer
from npllama.ops import CupyOps, Ops
from npllama.ops.cuda.kernels import Kernels
from npllama.ops.rope_frequencies import Rotation
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS
from npllama.weight_table import EMBEDDING, LM_HEAD, OF_LAYER, PRODUCTS, tensor_shapes

MODELS = {
    **{name: LlamaConfig.named(name) for name in ("7B", "13B", "34B", "70B")},
    **{name: SHAPES[name] for name in ("1.1b", "110m")},
    "stories": LlamaConfig.from_directory(SHIPPED),
}
PROMPT = 64  # tokens
GREEDY = Sampling(temperature=0)
ALL_FILTERS = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1)


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that kernel launches depend on, and its limits."""

    arch: str
    compute_capability: str
    n_sms: int
    shared_limit: int  # bytes of shared memory per block

    @property
    def cuda(self) -> SimpleNamespace:
        """The parts of cupy.cuda that the launching code uses."""
        attributes = {
            "MultiProcessorCount": self.n_sms,
            "MaxSharedMemoryPerBlockOptin": self.shared_limit,
            "MaxSharedMemoryPerMultiprocessor": self.shared_limit + 1024,
        }
        device = SimpleNamespace(
            id=0, attributes=attributes, compute_capability=self.compute_capability
        )
        return SimpleNamespace(Device=lambda *_: device)


A100 = Gpu("sm_80", "80", 108, 163 * 1024)
H100 = Gpu("sm_90", "90", 132, 227 * 1024)
GPUS = (A100, H100)
REGISTERS = 65_536  # per streaming multiprocessor, and therefore the limit of a block


@dataclass(frozen=True)
class Launch:
    """One kernel of one file, with threads per block and bytes of dynamic shared memory."""

    file: str
    name: str
    n_threads: int
    shared: int


def launches(
    gpu: Gpu,
    n_rows: int,
    configs: Iterable[LlamaConfig] = tuple(MODELS.values()),
    dtypes: Iterable[str] = tuple(FORMATS),
) -> set[Launch]:
    """The launches of decode steps with n_rows rows, of a prompt's first chunk and of training, for
    all given models and dtypes."""
    noted: set[Launch] = set()
    with _nothing_computed(), np.errstate(all="ignore"):
        for config in configs:
            for dtype in dtypes:
                ops = _NotingOps(_Untouched(gpu), noted)
                _run(ops, replace(config, n_layers=1), dtype, n_rows)
    return noted


def few(launched: set[Launch], with_first: bool) -> set[str]:
    """Select a few kernels that together cover every template argument.

    If several kernels cover the same arguments, the one with the largest block is selected, because
    its threads have the fewest registers.

    Args:
        with_first: cover every pair of the first template argument, which is a dtype, and another
            one.
    """
    parts = {launch: _parts(launch.name, with_first) for launch in launched}
    left: set[tuple] = set().union(*parts.values())
    names: set[str] = set()
    while left:

        def gain(launch: Launch, left: set = left) -> tuple[int, int, str]:
            return len(parts[launch] & left), launch.n_threads, launch.name

        best = max(launched, key=gain)
        names.add(best.name)
        left -= parts[best]
    return names


def _parts(name: str, with_first: bool) -> set[tuple]:
    kernel, _, arguments = name.partition("<")
    values = arguments.rstrip(">").split(", ")
    beside = values[0] if with_first else ""
    return {(kernel, beside, i, value) for i, value in enumerate(values)}


def _run(ops: CupyOps, config: LlamaConfig, dtype: str, n_rows: int) -> None:
    model = Transformer(config, _parameters(config, dtype), ops)
    n = config.context_length
    for length in (1, n - 1):  # the shortest and the longest cache
        cache = model.new_cache(n_rows)
        cache.lengths = [length] * n_rows
        cache.device_lengths[:] = length
        tokens = np.zeros((n_rows, 1), dtype="int64")
        model.compute(tokens, cache, cache.place(1))
        logits = np.zeros((n_rows, config.vocab_size), dtype="float32")
        seen = np.zeros(logits.shape, dtype=bool)
        ops.next_token(logits, None, GREEDY)
        ops.next_token(logits, np.zeros(n_rows), ALL_FILTERS, seen)
    cache = model.new_cache(1)
    tokens = np.zeros((1, PROMPT), dtype="int64")
    model.compute(tokens, cache, cache.place(PROMPT), n_last=PROMPT)
    if dtype == "float32":
        dx = np.zeros((1, PROMPT, config.dim), "float32")
        ops.embedding_backward(dx, tokens, model.parameters.embedding)


def _parameters(config: LlamaConfig, dtype: str) -> Parameters:
    """Uninitialized weights of one layer, joined in the same way as by CupyOps."""
    shapes = tensor_shapes(config)

    def matrix(n_out: int, n_in: int) -> Matrix:
        stored = FORMATS[dtype].stored("", (n_out, n_in)).values()
        return Matrix(*(np.empty(shape, kind) for kind, shape in stored))

    parts, joined = {}, {}
    for weights in PRODUCTS.values():
        sizes = [weight.sizes(config) for weight in weights]
        whole = matrix(sum(n_out for n_out, _ in sizes), sizes[0][1])
        if len(weights) > 1:
            joined[weights[0].joined] = whole
        begin = 0
        for weight, (n_out, _) in zip(weights, sizes, strict=True):
            parts[weight.field] = whole.slice_rows(slice(begin, begin + n_out))
            begin += n_out
    norms = {w.field: np.ones(config.dim, "float32") for w in OF_LAYER if not w.is_matrix}
    layer = Layer(**parts, **norms, norm_eps=config.norm_eps).with_derived(**joined)
    embedding = matrix(*shapes[EMBEDDING])
    lm_head = embedding if config.tie_embeddings else matrix(*shapes[LM_HEAD])
    head = Head(np.ones(config.dim, "float32"), lm_head, config.norm_eps)
    return Parameters(embedding, (layer,), head)


class _Untouched(Backend):
    """NumPy's functions with the attributes of a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(_Module(gpu))


class _Module:
    def __init__(self, gpu: Gpu) -> None:
        self.cuda = gpu.cuda

    def __getattr__(self, name: str) -> object:
        return getattr(np, name)


class _NotingOps(CupyOps):
    def __init__(self, backend: Backend, noted: set[Launch]) -> None:
        super().__init__(backend)
        self.kernels = _NotingKernels(backend, noted)

    def rope_table(self, n: int, rotation: Rotation, dtype: str = "float32") -> tuple:
        shape = (n, len(rotation.frequencies))
        return np.empty(shape, dtype), np.empty(shape, dtype)


class _NotingKernels(Kernels):
    def __init__(self, backend: Backend, noted: set[Launch]) -> None:
        super().__init__(backend)
        self._noted = noted

    def launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple,
        shared: int = 0,
    ) -> None:
        self._noted.add(Launch(file, name, int(np.prod(block)), shared))


@contextmanager
def _nothing_computed() -> Iterator[None]:
    """Replace the reference's blocks and products by functions that return uninitialized memory."""

    def attention_block(self, x, layer, cache, positions, n_last=None):
        return np.empty((x.shape[0], n_last or x.shape[1], x.shape[2]), "float32")

    def feed_forward(self, x, layer):
        return np.empty_like(x)

    def head(self, x, head):
        return np.empty((*x.shape[:2], head.lm_head.shape[0]), "float32")

    def linear(self, x, w):
        return np.empty((*x.shape[:-1], w.shape[0]), x.dtype)

    replaced = (attention_block, feed_forward, head, linear)
    with (
        mock.patch.multiple(Ops, **{f.__name__: f for f in replaced}),
        mock.patch.object(CupyOps, "linear", linear),
        mock.patch("npllama.ops.cuda.prompt.cublas_product"),
    ):
        yield
