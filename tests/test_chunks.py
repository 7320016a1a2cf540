"""Divided work: each column is computed once, for any chunk size."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import npllama.ops.chunks as chunks
from npllama.ops.chunks import MANY_ROWS, for_each, in_chunks
from npllama.threads import Threads


@pytest.mark.parametrize("width", [1, 7, 1000])
@pytest.mark.parametrize("n_columns", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("n_rows", [1, MANY_ROWS - 1, MANY_ROWS, 1000, 100_000])
def test_every_column_is_computed_once(n_rows, n_columns, width):
    seen = []
    everything = list(range(n_columns))
    in_chunks(Threads(2), lambda some: seen.append(everything[some]), n_columns, n_rows, width)
    assert sorted(column for chunk in seen for column in chunk) == everything
    if n_rows >= MANY_ROWS:
        numbers = max(map(len, seen)) * width * n_rows
        assert numbers <= chunks.CHUNK or max(map(len, seen)) == 1


def test_few_rows_are_one_chunk():
    seen = []
    in_chunks(Threads(2), seen.append, 10**6, MANY_ROWS - 1)
    assert seen == [slice(None)]


@pytest.mark.parametrize("n_rows", [1, MANY_ROWS])
def test_each_item_is_computed_once(n_rows):
    seen = []
    for_each(Threads(2), lambda item, _slot: seen.append(item), range(20), n_rows)
    assert sorted(seen) == list(range(20))


def test_numpys_error_state_is_the_callers_in_every_thread():
    def on_a_thread(function, items):
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(lambda item: function(item, 0), items))

    threads = SimpleNamespace(map=on_a_thread)
    states = []
    with np.errstate(over="ignore", invalid="print"):
        for_each(threads, lambda _item, _slot: states.append(np.geterr()), range(2), MANY_ROWS)
        assert states == [np.geterr()] * 2
