"""Arrays that other processes map: their contents, shared memory, and cleanup."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict

import ml_dtypes
import numpy as np
import pytest

from npllama.shared_arrays import (
    MappedFile,
    can_share,
    location_of,
    memory_of,
    neighbours,
    share,
)

pytestmark = pytest.mark.skipif(not can_share(), reason="no shared memory without a name here")

READ = """
import json, sys
from npllama.shared_arrays import Mapped, Location
mapped = Mapped()
for place in json.loads(sys.argv[1]):
    print(mapped.array(Location(**place)).astype("float64").sum())
"""
DTYPES = ("float32", "float16", "int8", ml_dtypes.bfloat16)


def sums_elsewhere(arrays):
    """The sum of each array, computed by another process that maps it."""
    locations = [location_of(array) for array in arrays]
    handed = {int(place.path.removeprefix("/dev/fd/")) for place in locations}
    command = [sys.executable, "-c", READ, json.dumps([asdict(place) for place in locations])]
    out = subprocess.run(command, pass_fds=handed, capture_output=True, text=True, check=True)
    return [float(line) for line in out.stdout.split()]


def some(rng, dtype, shape=(33, 64)):
    return (rng.integers(-100, 100, shape)).astype(dtype)


def test_another_process_reads_shared_arrays(rng):
    arrays = [some(rng, dtype) for dtype in DTYPES]
    shared = share(arrays)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, shared, strict=True))
    assert sums_elsewhere(shared) == [a.astype("float64").sum() for a in arrays]


def test_another_process_reads_a_part_of_a_file_though_its_name_is_gone(tmp_path, rng):
    values = some(rng, "int8", (5000, 1000))
    path = tmp_path / "values"
    path.write_bytes(b"head" + values.tobytes())
    with open(path, "rb") as file:
        memory = MappedFile(file)
    array = np.frombuffer(memory, "int8", values.size, 4).reshape(values.shape)[4000:]
    path.unlink()
    path.write_bytes(b"another file")
    assert sums_elsewhere([array]) == [values[4000:].astype("float64").sum()]


def test_what_lies_in_this_process_alone_has_no_place(rng):
    array = some(rng, "float32")
    assert location_of(array) is None
    assert location_of(share([array])[0][:, :3]) is None  # not contiguous


def test_a_descriptor_is_closed_with_the_last_array(rng):
    shared = share([some(rng, "int8")])
    path = location_of(shared[0]).path
    part = shared[0][3:5]
    del shared
    gc.collect()
    assert os.path.exists(path)
    del part
    gc.collect()
    assert not os.path.exists(path)


@pytest.mark.parametrize("shared", [False, True])
def test_neighbours_become_one_view(rng, shared):
    whole = some(rng, "float32", (10, 16))
    if shared:
        whole = share([whole])[0]
    parts = [whole[2:5], whole[5:6], whole[6:10]]
    joined = neighbours(parts)
    assert np.array_equal(joined, whole[2:])
    assert np.shares_memory(joined, whole)
    assert memory_of(joined) is memory_of(whole)
    assert neighbours([parts[0], parts[2]]) is None
    assert neighbours([parts[1], parts[0]]) is None
    assert neighbours([parts[0], parts[1].astype("float16")]) is None
    assert neighbours([part.copy() for part in parts]) is None


def test_shared_arrays_of_a_layer_are_neighbours(rng):
    arrays = share([some(rng, "int8"), some(rng, "int8", (7, 64)), some(rng, "int8", (1, 64))])
    assert neighbours(arrays).shape == (41, 64)
