"""The optimizer against its formula, evaluated element by element in float64."""

import math

import numpy as np
import pytest

from training.adamw import AdamW, clip


def adamw_of_one_number(w, gradients, rates, decay, b1=0.9, b2=0.99, eps=1e-8):
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        w -= rate * (m_hat / (math.sqrt(v_hat) + eps) + decay * w)
    return w


@pytest.mark.parametrize(("shape", "decay"), [((3, 5), 0.1), ((5,), 0.0)])
def test_adamw_is_its_formula_and_decays_matrices_alone(ops, rng, to_device, to_host, shape, decay):
    w, gradients = rng.standard_normal(shape), rng.standard_normal((4, *shape))
    rates = [1e-2, 2e-2, 3e-2, 1e-3]
    weights = {"w": to_device(w.copy())}
    optimizer = AdamW(weights, decay=0.1, xp=ops.xp)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        optimizer.update({"w": to_device(g.copy())}, rate, t)
    got = to_host(weights["w"])
    for i in np.ndindex(shape):
        truth = adamw_of_one_number(w[i], gradients[(slice(None), *i)], rates, decay)
        assert abs(got[i] - truth) < 1e-12


def test_adamw_stays_in_float32_and_in_place(ops, rng, to_device, to_host):
    w = to_device(rng.standard_normal((3, 5), dtype="float32"))
    before = to_host(w).copy()
    optimizer = AdamW({"w": w}, xp=ops.xp)
    optimizer.update({"w": to_device(rng.standard_normal((3, 5), dtype="float32"))}, 0.1, 1)
    assert not np.array_equal(to_host(w), before)
    assert {to_host(a).dtype.name for a in (w, optimizer.m["w"], optimizer.v["w"])} == {"float32"}


@pytest.mark.parametrize(("largest", "factor"), [(1.0, 0.2), (5.0, 1.0), (100.0, 1.0)])
def test_clip_scales_all_gradients_to_a_joint_norm(ops, to_device, to_host, largest, factor):
    a, b = np.array([[3.0, 0.0]], dtype="float32"), np.array([4.0], dtype="float32")
    gradients = {"a": to_device(a.copy()), "b": to_device(b.copy())}
    norm = clip(gradients, largest, ops.xp)
    assert abs(float(to_host(norm)) - 5) < 1e-5
    assert np.allclose(to_host(gradients["a"]), a * factor, rtol=1e-5)
    assert np.allclose(to_host(gradients["b"]), b * factor, rtol=1e-5)
    assert to_host(gradients["a"]).dtype == np.float32
