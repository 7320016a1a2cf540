"""A sliding window replaces `is_hidden`, and all attention functions use this rule."""

import math

import numpy as np
import pytest

import test_gradients
from conftest import make_llama, make_ops
from npllama.gradients import loss_and_gradients
from npllama.ops.equations import Equations

WINDOW = 3
IDS = [1, 100, 7, 259, 3, 42, 42, 8, 200, 11, 12]
CAUSAL = Equations.is_hidden, Equations.hidden_keys


def outside_the_window(self, query, key):
    """Hides all keys except those at the query's position and the two positions before."""
    return (key > query) | (key <= query - WINDOW)


def of_all_keys(self, n_new, n_keys):
    """The mask (T, N). It includes the oldest keys, because a window hides them too."""
    position = self.xp.arange(n_keys)
    return self.is_hidden(position[n_keys - n_new :, None], position[None, :])


WINDOWED = outside_the_window, of_all_keys


def use(monkeypatch, is_hidden, hidden_keys):
    monkeypatch.setattr(Equations, "is_hidden", is_hidden)
    monkeypatch.setattr(Equations, "hidden_keys", hidden_keys)


@pytest.fixture(autouse=True)
def window(monkeypatch):
    use(monkeypatch, *WINDOWED)


def attention_one_by_one(q, k, v):
    """Attention of each query of each head separately, over the keys in its window.

    Returns o (H, T, C) and p (H, T, N).
    """
    n_heads, n_new, head_dim = q.shape
    n_kv_heads, n_keys, _ = k.shape
    o, p = np.zeros(q.shape), np.zeros((n_heads, n_new, n_keys))
    for h, t in np.ndindex(n_heads, n_new):
        kv, place = h * n_kv_heads // n_heads, n_keys - n_new + t
        seen = slice(max(0, place - WINDOW + 1), place + 1)
        e = np.exp(k[kv, seen] @ q[h, t] / math.sqrt(head_dim))
        p[h, t, seen] = e / e.sum()
        o[h, t] = p[h, t, seen] @ v[kv, seen]
    return o, p


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n_new", [1, 2, 5, 70])
def test_attention_and_its_weights_follow(ops, to_device, to_host, rng, n_new, dtype):
    """With and without workspace for scores. All sizes use the same `ops`, which must not reuse a
    mask of another size."""
    for start in (0, 1, 4, 9):
        q = rng.standard_normal((6, n_new, 6)).astype(dtype)
        k, v = rng.standard_normal((2, 3, start + n_new, 6)).astype(dtype)
        truth_o, truth_p = attention_one_by_one(q, k, v)
        q, k, v = to_device(q), to_device(k), to_device(v)
        scratch = to_device(np.zeros(10_000, dtype="float32"))
        tolerance = 1e-12 if dtype == "float64" else 1e-5
        for got, truth in (
            (ops.attention_weights(q, k), truth_p),
            (ops.attention(q, k, v), truth_o),
            (ops.attention(q, k, v, scratch), truth_o),
        ):
            assert np.abs(to_host(got) - truth).max() < tolerance


def test_the_map_for_readers_follows(ops):
    attention = make_llama(ops).trace(IDS).attention
    distance = np.arange(len(IDS))[:, None] - np.arange(len(IDS))
    sees = (distance >= 0) & (distance < WINDOW)
    assert (attention[..., sees] > 0).all() and not attention[..., ~sees].any()


def test_a_prompt_and_decoding_with_the_cache_follow(ops, to_device, to_host, monkeypatch):
    llama = make_llama(ops)
    whole = llama.logits(IDS)
    cache = llama.new_cache()
    llama.prefill(IDS[:4], cache, chunk=3)
    for t in range(4, len(IDS)):
        step = to_host(llama.forward(to_device(np.array([[IDS[t]]], dtype="int32")), cache))
        assert np.abs(step[0, 0] - whole[t]).max() < 1e-5 * np.abs(whole).max()
    use(monkeypatch, *CAUSAL)
    causal = make_llama(ops.__class__(ops.backend)).logits(IDS)
    assert np.abs(causal[:WINDOW] - whole[:WINDOW]).max() < 1e-5 * np.abs(whole).max()
    assert np.abs(causal[WINDOW:] - whole[WINDOW:]).max() > 1e-2 * np.abs(whole).max()


def test_trainings_forward_and_backward_follow(rng, monkeypatch):
    test_gradients.test_gradients_equal_central_differences(rng)
    losses = []
    for rule in (WINDOWED, CAUSAL):
        use(monkeypatch, *rule)
        model, batch, case = test_gradients.torch_case("gqa", make_ops("numpy"))
        losses.append(float(loss_and_gradients(model, *batch)[0]))
    assert abs(losses[1] - case["loss"]) < 1e-12 * abs(case["loss"]) < abs(losses[0] - losses[1])
