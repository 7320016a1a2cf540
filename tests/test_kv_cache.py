"""The cache: buffers are allocated once, and each row has its own position."""

import numpy as np
import pytest

from conftest import TINY
from npllama.errors import InputError


def test_buffers_stay_where_they_are(llama, to_device):
    cache = llama.new_cache(batch=2, context=8)
    before = [(layer.k, layer.v) for layer in cache.layers]
    for rows, t in (((0, 1), 3), ((1,), 2), ((0, 1), 1)):
        llama.forward(to_device(np.ones((len(rows), t), dtype="int32")), cache, rows)
    assert all(
        layer.k is k and layer.v is v for layer, (k, v) in zip(cache.layers, before, strict=True)
    )
    assert cache.lengths == [4, 6]


def test_positions_are_the_same_on_host_and_device(llama, to_device, to_host):
    cache = llama.new_cache(batch=3, context=16)
    llama.forward(to_device(np.ones((1, 5), dtype="int32")), cache, (1,))
    llama.forward(to_device(np.ones((3, 2), dtype="int32")), cache)
    llama.forward(to_device(np.ones((2, 1), dtype="int32")), cache, (2, 1))
    assert cache.lengths == [2, 8, 3]
    assert to_host(cache.device_lengths).tolist() == [2, 8, 3]
    positions = cache.positions(2, (1, 0))
    assert positions.starts == (8, 2)
    assert to_host(positions.device_starts).tolist() == [8, 2]
    everything = cache.positions(1)
    cache.advance_on_device(everything)  # positions that were created before do not change
    assert to_host(everything.device_starts).tolist() == list(everything.starts) == [2, 8, 3]
    cos, _ = (to_host(table) for table in llama.rope_table)
    assert np.array_equal(to_host(positions.cos), cos[[[8, 9], [2, 3]]])


def test_a_row_writes_its_own_places_and_no_others(llama, to_device, to_host):
    cache = llama.new_cache(batch=2, context=6)
    llama.forward(to_device(np.array([[5, 6]], dtype="int32")), cache, (1,))
    for layer in cache.layers:
        for buffer in (to_host(layer.k), to_host(layer.v)):
            assert buffer.shape == (2, TINY.n_kv_heads, 6, TINY.head_dim)
            assert not buffer[0].any()
            assert buffer[1, :, :2].all()
            assert not buffer[1, :, 2:].any()


def test_what_does_not_fit_is_refused_and_changes_nothing(llama, to_device):
    cache = llama.new_cache(batch=2, context=4)
    llama.forward(to_device(np.ones((1, 3), dtype="int32")), cache, (1,))
    with pytest.raises(InputError, match="3 positions are filled and 2 more do not fit"):
        llama.forward(to_device(np.ones((2, 2), dtype="int32")), cache)
    assert cache.lengths == [0, 3]
    llama.forward(to_device(np.ones((2, 1), dtype="int32")), cache)
    assert cache.lengths == [1, 4]


def test_rows_advance_by_numbers_of_their_own(llama, to_device):
    cache = llama.new_cache(batch=3, context=16)
    cache.advance((0, 2), (3, 1))
    assert cache.lengths == [3, 0, 1]


def test_a_truncated_row_goes_on_from_where_it_was_cut(llama, to_device, to_host):
    ids = [1, 5, 9, 30, 7, 8]
    cache = llama.new_cache(batch=2, context=16)
    llama.prefill(ids, cache, row=1)
    assert cache.ids == [[], ids]
    for length in (6, 4, 2, 0):
        cache.truncate(1, length)
        assert (cache.lengths, cache.ids) == ([0, length], [[], ids[:length]])
        assert to_host(cache.device_lengths).tolist() == [0, length]
        if length < len(ids):
            logits = to_host(llama.prefill(ids[length:], cache, row=1))
            assert np.allclose(logits[0], llama.logits(ids)[-1], atol=2e-2)
            cache.truncate(1, length)


@pytest.mark.parametrize("length", [-1, 3])
def test_a_row_cannot_be_truncated_to_more_than_it_holds(llama, length):
    cache = llama.new_cache(batch=1, context=16)
    llama.prefill([1, 5], cache)
    with pytest.raises(InputError, match=rf"holds 2 positions: it cannot be truncated to {length}"):
        cache.truncate(0, length)


@pytest.mark.parametrize("row", [-1, 1])
def test_a_row_that_is_none_cannot_be_truncated(llama, row):
    with pytest.raises(InputError, match=f"there is no row {row}"):
        llama.new_cache(batch=1).truncate(row, 0)


@pytest.mark.parametrize("size", [{"context": 65}, {"context": 0}, {"context": -1}, {"batch": 0}])
def test_a_cache_has_rows_and_no_more_positions_than_the_model(llama, size):
    with pytest.raises(InputError, match=r"expected at least 1 row, and 1 to 64 positions"):
        llama.new_cache(**size)


def test_the_bucket_holds_the_longest_row(llama, monkeypatch):
    monkeypatch.setattr("npllama.kv_cache.BUCKET", 8)
    cache = llama.new_cache(batch=2, context=20)
    for lengths, n_new, bucket in (
        ([0, 0], 1, 8),
        ([7, 2], 1, 8),
        ([7, 8], 1, 16),
        ([3, 16], 1, 20),
    ):
        cache.lengths[:] = lengths
        assert cache.place(n_new).bucket == bucket


def test_the_device_has_the_numbers_of_rows_once(llama):
    cache = llama.new_cache(batch=3, context=16)
    assert cache.place(1, (2, 0)).device_rows is cache.place(1, (2, 0)).device_rows


def test_nbytes_is_what_the_buffers_take(llama):
    cache = llama.new_cache(batch=2, context=10)
    c = TINY
    promised = cache.nbytes(c.n_layers, c.n_kv_heads, c.head_dim, 2, 10, 4)
    assert promised == sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers)


@pytest.mark.parametrize(
    ("held", "prompt", "kept"),
    [
        ([1, 5, 6], [1, 5, 6, 7], 3),
        ([1, 5, 6], [1, 5, 6], 2),  # the last id is read in any case
        ([1, 5, 6], [1, 5], 1),
        ([1, 5, 6], [1, 7, 6, 8], 1),
        ([1, 5, 6], [7, 5, 6], 0),
        ([1, 5, 6], [1], 0),
        ([], [1, 5], 0),
    ],
)
def test_a_row_keeps_what_it_has_in_common_with_a_prompt(llama, held, prompt, kept):
    cache = llama.new_cache(batch=2, context=16)
    if held:
        llama.prefill(held, cache, row=1)
    llama.prefill([9, 9], cache, row=0)
    assert cache.keep(1, prompt) == kept
    assert cache.lengths == [2, kept] and cache.ids == [[9, 9], prompt[:kept]]
    cache.check_prefix(1, prompt)


def test_ids_that_are_not_known_are_not_kept(llama, to_device):
    cache = llama.new_cache()
    llama.prefill([1, 5], cache)
    llama.forward(to_device(np.array([[6, 7]], dtype="int32")), cache)
    assert cache.keep(0, [1, 5, 6, 7, 8]) == 2
    assert cache.lengths == [2] and cache.ids == [[1, 5]]


def test_nothing_is_kept_of_no_row_or_for_no_prompt(llama):
    cache = llama.new_cache()
    for row in (-1, 1):
        with pytest.raises(InputError, match=f"there is no row {row}"):
            cache.keep(row, [1])
    with pytest.raises(InputError, match="the prompt has no ids"):
        cache.keep(0, [])


@pytest.mark.parametrize(
    "size", [{"batch": "a"}, {"context": "a"}, {"batch": 1.5}, {"batch": None}, {"context": 2.0}]
)
def test_sizes_of_a_cache_are_whole_numbers(llama, size):
    (value,) = size.values()
    with pytest.raises(InputError, match=rf"{value!r} (rows|positions).*expected at least 1 row"):
        llama.new_cache(**size)


def test_sizes_of_a_cache_may_be_numpys(llama):
    cache = llama.new_cache(np.int8(2), np.uint8(60))
    assert (len(cache.lengths), cache.context) == (2, 60)
