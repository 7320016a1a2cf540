"""int8 weights: the scheme, and its effect on logits and perplexity."""

import re

import numpy as np
import pytest
import safetensors.numpy

from conftest import DATA, FIXTURES, ROOT, data_file
from convert import main as convert_main
from npllama import load
from npllama.quantization import dequantize, quantize

CASES = sorted(path.name for path in (FIXTURES / "hf").iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_each_number_is_off_by_half_a_step_at_most(rng, dtype):
    w = (rng.standard_normal((7, 300)) * 10.0 ** rng.integers(-3, 3, (7, 1))).astype(dtype)
    values, scale = quantize(w)
    assert (values.dtype, scale.dtype, scale.shape) == ("int8", "float32", (7,))
    wide = w.astype("float64")
    assert np.allclose(scale, np.abs(wide).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(dequantize(values, scale) - wide) <= scale[:, None] * 0.5001).all()


def test_rows_are_scaled_alone_and_signs_are_symmetric(rng):
    w = rng.standard_normal((3, 10)).astype("float32")
    values, scale = quantize(w)
    negative, same = quantize(-w)
    assert np.array_equal(values, -negative)
    assert np.array_equal(scale, same)
    w[1] *= 1000
    louder, _ = quantize(w)
    assert np.array_equal(values, louder)


def test_zeros_and_the_smallest_numbers_stay_finite():
    w = np.zeros((3, 4), dtype="float32")
    w[1, 0] = 1e-45  # the smallest subnormal
    w[2, 0] = 3e38
    values, scale = quantize(w)
    assert not values[0].any()
    assert scale[0] == 0
    assert np.isfinite(dequantize(values, scale)).all()
    assert dequantize(values, scale)[2, 0] == pytest.approx(3e38)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_fixtures_move_little(case):
    directory = FIXTURES / "hf" / case
    expected = safetensors.numpy.load_file(directory / "expected.safetensors")
    got = load(directory, "numpy", dtype="int8").logits(expected["ids"])
    error = np.abs(got - expected["logits"]).max() / np.abs(expected["logits"]).max()
    assert 0.001 < error < 0.08  # tools/README.md says: 0.04 to 0.07
    ids = expected["ids"]
    perplexities = []
    for logits in (expected["logits"], got.astype("float64")):
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        perplexities.append(np.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean()))
    # tools/README.md says: at most 1.4 %
    assert 0 < abs(perplexities[1] / perplexities[0] - 1) < 0.0145


def stories260k(tmp_path, dtype):
    source, tokenizer = data_file("stories260K/stories260K.bin"), "stories260K/tok512.bin"
    args = [str(source), str(tmp_path / dtype), "--tokenizer", str(DATA / tokenizer)]
    assert convert_main([*args, "--dtype", dtype]) == 0
    return load(tmp_path / dtype, "numpy")


def compared(exact, narrow, n_stories):
    """The perplexity of each model, and the largest error of a logit relative to the largest of its
    story."""
    text = data_file("stories/valid.txt").read_text(encoding="utf-8")
    nats, n_tokens, worst = np.zeros(2), 0, 0.0
    for story in text.split("<|endoftext|>")[:n_stories]:
        ids = exact.encode(story.strip())[: exact.context]
        both = [llama.logits(ids[:-1]).astype("float64") for llama in (exact, narrow)]
        for i, logits in enumerate(both):
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats[i] -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        n_tokens += len(ids) - 1
        worst = max(worst, np.abs(both[1] - both[0]).max() / np.abs(both[0]).max())
    return (*np.exp(nats / n_tokens), worst)


def test_perplexity_of_stories260k_is_that_of_float32(tmp_path):
    models = [stories260k(tmp_path, dtype) for dtype in ("float32", "int8")]
    exact, narrow, error = compared(*models, n_stories=8)
    assert exact != narrow
    assert narrow == pytest.approx(exact, rel=2e-3)
    assert 0.005 < error < 0.03


@pytest.mark.slow
def test_the_figures_of_the_readme_are_measured_here(tmp_path):
    readme = " ".join((ROOT / "tools" / "README.md").read_text(encoding="utf-8").split())
    told = re.search(
        r"over (\d+) stories .* logits move by at most ([\d.]+) % of the largest .* perplexity "
        r"goes from ([\d.]+) to ([\d.]+) \(bfloat16: ([\d.]+) % and ([\d.]+)\)",
        readme,
    )
    n_stories, *figures = told.groups()
    exact = stories260k(tmp_path, "float32")
    found = []
    for dtype in ("int8", "bfloat16"):
        before, after, error = compared(exact, stories260k(tmp_path, dtype), int(n_stories))
        found += [f"{100 * error:.1f}", f"{before:.4f}", f"{after:.4f}"]
    assert found[:3] + [found[3], found[5]] == figures
