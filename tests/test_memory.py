"""Predicted and actual memory use."""

import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest

from conftest import STRICT_CUPY, make_ops
from model_directory import write_model
from npllama import load
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.errors import OutOfMemoryError
from npllama.initialization import random_parameters
from npllama.kv_cache import KVCache
from npllama.llama import Llama
from npllama.memory import mapped_nbytes, workspace_nbytes
from npllama.sampling_options import Sampling
from npllama.weights import Checkpoint
from strict_array import StrictBackend

LIVELY = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)

# the name of the largest part: (config, prompt tokens, batch)
CASES = {
    "many logits": (LlamaConfig(32, 1, 4, 2, 32, 20_000, 64), 8, 32),
    "long attention": (LlamaConfig(32, 2, 8, 4, 32, 64, 4096), 3000, 1),
    "wide feed-forward": (LlamaConfig(256, 2, 4, 4, 4096, 64, 600), 512, 1),
}


def foretold(llama, batch, context):
    config, dtype = llama.config, llama.cache_dtype
    cache = KVCache.nbytes(
        config.n_layers, config.n_kv_heads, config.head_dim, batch, context, dtype.itemsize
    )
    chunk = min(llama.ops.prefill_chunk(), context)
    return cache + workspace_nbytes(config, llama.ops, batch, context, chunk, dtype)


@pytest.mark.parametrize("cache_dtype", ["float32", "float16"])
@pytest.mark.parametrize("where", ["numpy", "strict"])
@pytest.mark.parametrize("case", CASES)
def test_a_generation_takes_no_more_than_foretold_and_not_far_less(case, where, cache_dtype):
    config, n_prompt, batch = CASES[case]
    ops = make_ops(where)
    llama = Llama(config, random_parameters(config, ops), ops, cache_dtype=cache_dtype)
    generation = llama.new_generation([[5] * n_prompt] * batch, max_new_tokens=3, sampling=LIVELY)
    tracemalloc.start()
    for _ in generation:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    promised = foretold(llama, batch, n_prompt + 3)
    assert peak <= 1.05 * promised + 1_000_000
    assert peak >= 0.3 * promised


def test_a_long_result_is_foretold_too(monkeypatch):
    config, _, _ = CASES["many logits"]
    ops = make_ops("numpy")
    llama = Llama(config, random_parameters(config, ops), ops)
    monkeypatch.setattr(ops.backend, "free_bytes", lambda: 10_000_000)
    for call in (llama.logits, llama.trace):
        call([1, 2])
    with pytest.raises(OutOfMemoryError, match=r"0\.01 GB are free"):
        llama.logits([1] * 64)  # 64 x 20,000 logits
    config = LlamaConfig(32, 4, 8, 4, 32, 64, 4096)
    llama = Llama(config, random_parameters(config, ops), ops)
    with pytest.raises(OutOfMemoryError):
        llama.trace([1] * 1000)


def test_mapped_weights_are_kept_in_memory_and_copies_are_there_already(tmp_path, monkeypatch):
    config = LlamaConfig(64, 2, 4, 2, 96, 260, 64)
    write_model(tmp_path, config)
    mapped, copied = load(tmp_path, "numpy"), load(tmp_path, "numpy", dtype="bfloat16")
    norms = 4 * (2 * config.n_layers + 1) * config.dim  # always copied
    qkv = sum(layer.qkv.nbytes for layer in mapped.parameters.layers)  # copied to become contiguous
    assert mapped_nbytes(mapped.parameters) == mapped.parameters.nbytes - norms - qkv
    assert mapped_nbytes(copied.parameters) == 0
    needed = mapped_nbytes(mapped.parameters)
    monkeypatch.setattr(mapped.backend, "free_bytes", lambda: needed)
    with pytest.raises(OutOfMemoryError, match="weights"):
        mapped.generate([1], max_new_tokens=5)
    monkeypatch.setattr(copied.backend, "free_bytes", lambda: needed)
    copied.generate([1], max_new_tokens=5)


def test_loading_foretells_weights_cache_and_workspace(tmp_path, monkeypatch):
    config = LlamaConfig(64, 2, 4, 2, 96, 260, 512)
    write_model(tmp_path, config)
    free = load(tmp_path, "numpy").parameters.nbytes + 2 * 2 * 2 * 512 * 16 * 4 + 2_000_000
    monkeypatch.setattr("npllama.backend.Backend.free_bytes", lambda self: free)
    load(tmp_path, "numpy", context=64)
    with pytest.raises(OutOfMemoryError, match=r"cache 0\.00 GB for 1 x 512 positions"):
        load(tmp_path, "numpy")


def test_a_narrow_cache_is_foretold_with_what_is_widened_of_it():
    config = LlamaConfig(4096, 1, 32, 32, 64, 64, 4096)  # 64 MB of keys, and as much of values
    for where in ("strict", "numpy"):
        ops = make_ops(where)
        narrow, wide = (
            workspace_nbytes(config, ops, 1, 4096, 1, np.dtype(dtype))
            for dtype in ("float16", "float32")
        )
        assert narrow - wide >= 2 * 4 * 4096 * 4096 and wide < 2 * 4 * 4096 * 4096


@pytest.mark.parametrize("where", ["numpy", "strict", STRICT_CUPY])
def test_loading_takes_no_more_than_the_weights_and_the_largest_tensor(tmp_path, where):
    config = LlamaConfig(256, 3, 4, 4, 2000, 260, 64)
    checkpoint = Checkpoint(write_model(tmp_path, config), config)
    assert checkpoint.largest_nbytes == 256 * 2000 * 4
    ops = make_ops(where)
    tracemalloc.start()
    parameters = checkpoint.parameters(ops)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parameters.nbytes == checkpoint.nbytes
    assert peak <= checkpoint.nbytes + checkpoint.largest_nbytes + 1_000_000
    free = checkpoint.nbytes + checkpoint.largest_nbytes - 1
    with (
        mock.patch.object(Backend, "free_bytes", lambda _: free),
        pytest.raises(OutOfMemoryError, match=r"loading 0\.00 GB before the last two"),
    ):
        load(tmp_path, "numpy", context=1)


def test_too_little_gpu_memory_is_one_line_before_anything_is_uploaded(tmp_path, monkeypatch):
    class Gpu(StrictBackend):
        def to_device(self, array):
            raise AssertionError("nothing is uploaded")

        def memory_name(self):
            return "GPU memory"

        def free_bytes(self):
            return 3 * 10**9

    config = LlamaConfig(64, 2, 4, 2, 96, 260, 10**8)
    write_model(tmp_path, config)
    monkeypatch.setattr("npllama.llama.get_backend", lambda *_: Gpu())
    with pytest.raises(OutOfMemoryError) as caught:
        load(tmp_path)
    assert re.fullmatch(
        r"\S+ GB of GPU memory needed \(weights \S+ GB, cache 51\.20 GB for 1 x 100000000 "
        r"positions, workspace \S+ GB\) and 3\.00 GB are free: use a shorter --context, .*",
        str(caught.value),
    )
