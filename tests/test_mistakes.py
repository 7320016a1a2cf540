"""Seeds known mistakes in the mathematics, one at a time. The test suite must fail for each.

Each case changes one line in a copy of the package, and runs the tests of the mathematics on the
copy, in a separate process, until one fails. The case also fails if the source no longer contains
the line. Finally, all tests that failed must pass on an unchanged copy.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from conftest import ROOT

EQUATIONS, BLOCKS = "ops/equations.py", "ops/blocks.py"
ROPE = "ops/rope_frequencies.py"
DERIVATIVES, GRADIENTS = "ops/derivatives.py", "gradients.py"
SAMPLING, CACHE = "ops/sampling.py", "kv_cache.py"
NUMPY_EQUATIONS, NUMPY_BLOCKS = "ops/numpy_equations.py", "ops/numpy_ops.py"
NUMPY_DERIVATIVES, NUMPY_SAMPLING = "ops/numpy_derivatives.py", "ops/numpy_sampling.py"
TILES, CHUNKS, WEIGHT_FORMATS = "ops/tiles.py", "ops/chunks.py", "weight_formats.py"
GRAPH = "ops/cuda/graph.py"
GENERATION, UNIFORMS = "generation.py", "uniforms.py"

# name of the mistake: (file, part of the correct line, replacement)
MISTAKES = {
    "eps ignored": (EQUATIONS, "sqrt(mean_square + eps)", "sqrt(mean_square)"),
    "eps outside the root": (EQUATIONS, "sqrt(mean_square + eps)", "sqrt(mean_square) + eps"),
    "mean forgotten": (EQUATIONS, "(x * x).mean(", "(x * x).sum("),
    "norm weight forgotten": (EQUATIONS, " * weight.astype(x.dtype, copy=False)", ""),
    "mask off by one, future seen": (EQUATIONS, "return key > query", "return key > query + 1"),
    "mask off by one, self hidden": (EQUATIONS, "return key > query", "return key >= query"),
    "mask ignores the past": (
        EQUATIONS,
        "scores[..., n_keys - hidden.shape[1] :]",
        "scores[..., : hidden.shape[1]]",
    ),
    "no mask": (EQUATIONS, "if n_new == 1:", "if True:"),
    "H//K where K belongs": (
        EQUATIONS,
        "q.reshape(n_kv_heads, -1, head_dim)  # (H, T",
        "q.reshape(n_heads // n_kv_heads, -1, head_dim)  # (H, T",
    ),
    "groups interleaved": (
        EQUATIONS,
        "grouped = q.reshape(n_kv_heads, -1, head_dim)",
        "grouped = q.reshape(-1, n_kv_heads, n_new, head_dim).swapaxes(0, 1)"
        ".reshape(n_kv_heads, -1, head_dim)",
    ),
    "rotation with the wrong sign": (
        EQUATIONS,
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
    ),
    "rotation of the wrong pairs": (
        EQUATIONS,
        "x[..., :half], x[..., half:]",
        "x[..., 0::2], x[..., 1::2]",
    ),
    "rotation with the wrong base": (
        ROPE,
        "return theta ** (",
        "return (theta + 1) ** (",
    ),
    "rotation exponent without the 2": (ROPE, "(-2.0 * pair", "(-1.0 * pair"),
    "angles in half precision": (
        EQUATIONS,
        "a = rotation.attention_scaling",
        "a, angle = rotation.attention_scaling, angle.astype('float16')",
    ),
    "attention scaling forgotten": (EQUATIONS, "a = rotation.attention_scaling", "a = 1.0"),
    "positions multiplied by the factor": (
        ROPE,
        "return frequencies / scaling",
        "return frequencies * scaling",
    ),
    "dynamic without the - (s - 1)": (ROPE, "/ most - (factor - 1)", "/ most"),
    "dynamic from its first token on": (ROPE, "max(context, most)", "context"),
    "dynamic with the wrong exponent": (ROPE, "(config.head_dim - 2))", "config.head_dim)"),
    "llama3's ends exchanged": (
        ROPE,
        "(1 - t) * frequencies / scaling.factor + t * frequencies",
        "t * frequencies / scaling.factor + (1 - t) * frequencies",
    ),
    "llama3 without its ramp": (ROPE, "xp.clip((turns - low)", "xp.clip((turns - low) * 1e9"),
    "yarn's ends not rounded": (ROPE, "if scaling.truncate:", "if not scaling.truncate:"),
    "yarn's last pair rounded down": (ROPE, "math.ceil(last)", "math.floor(last)"),
    "yarn's ramp over C/2": (ROPE, "return head_dim * math.log", "return head_dim // 2 * math.log"),
    "yarn's temperature squared": (ROPE, "return 0.1 * log_s + 1", "return (0.1 * log_s + 1) ** 2"),
    "attention_factor ignored": (ROPE, "if scaling.attention_factor is not", "if None is not"),
    "gradients with another rotation": (
        GRADIENTS,
        "n_new, model.rotation, dtype",
        "n_new, ops.rope_frequencies(model.config), dtype",
    ),
    "no 1/sqrt(C)": (EQUATIONS, " / math.sqrt(head_dim)", ""),
    "1/C for 1/sqrt(C)": (EQUATIONS, "/ math.sqrt(head_dim)", "/ head_dim"),
    "softmax without its shift": (EQUATIONS, "x - x.max(axis=-1, keepdims=True))", "x)"),
    "gate and up swapped": (EQUATIONS, "self.silu(gate) * up", "self.silu(up) * gate"),
    "sigmoid for SiLU": (
        EQUATIONS,
        "return x * self.sigmoid(x)",
        "return self.sigmoid(x)",
    ),
    "norm after instead of before attention": (
        BLOCKS,
        "return last(x, n_last) + self.all_reduce(self.linear(o, layer.wo))",
        "return self.rms_norm(last(x, n_last) + self.all_reduce(self.linear(o, layer.wo)), "
        "layer.attention_norm, layer.norm_eps)",
    ),
    "no norm before attention": (
        BLOCKS,
        "h = self.rms_norm(x, layer.attention_norm, layer.norm_eps)\n"
        "        q, k, v = self.queries_keys_values(h, layer, positions, n_last)\n        o = ",
        "q, k, v = self.queries_keys_values(x, layer, positions, n_last)\n        o = ",
    ),
    "norm after instead of before the feed-forward": (
        BLOCKS,
        "h = self.rms_norm(x, layer.ffn_norm, layer.norm_eps)\n        y",
        "h = x\n        y",
    ),
    "no final norm": (
        BLOCKS,
        "h = self.rms_norm(x, head.norm, head.norm_eps)\n        return",
        "h = x\n        return",
    ),
    "no residual around attention": (
        BLOCKS,
        "return last(x, n_last) + self.all_reduce(self.linear(o",
        "return self.all_reduce(self.linear(o",
    ),
    "no residual around the feed-forward": (
        BLOCKS,
        "return x + self.all_reduce(self.linear(y",
        "return self.all_reduce(self.linear(y",
    ),
    "keys not rotated": (BLOCKS, "k = self.rope(k, positions.cos, positions.sin)", "pass"),
    "values rotated": (
        BLOCKS,
        "return q, k, v",
        "return q, k, self.rope(v, positions.cos, positions.sin)",
    ),
    "k and v swapped": (BLOCKS, "return q, k, v", "return q, v, k"),
    "position off by one after prefill": (
        CACHE,
        "at = device_starts[:, None] +",
        "at = (device_starts + (device_starts > 0))[:, None] +",
    ),
    "every row at the first row's position": (
        CACHE,
        "at = device_starts[:, None] +",
        "at = (device_starts * 0 + device_starts[0])[:, None] +",
    ),
    "new keys written over the last old one": (
        CACHE,
        "new = slice(start, start + positions.n_new)",
        "start = max(start - 1, 0)\n            new = slice(start, start + positions.n_new)",
    ),
    "a truncated row keeps its length on the device": (
        CACHE,
        "self.device_lengths[row] = length",
        "pass",
    ),
    "a row is advanced by another's number": (
        CACHE,
        "for row, n in zip(rows, n_new, strict=True):",
        "for row, n in zip(rows, reversed(n_new), strict=True):",
    ),
    "the whole prompt is read onto a kept cache": (
        GENERATION,
        "row.prompt_ids[self._cache.lengths[row.cache_row] :]",
        "row.prompt_ids",
    ),
    "a cache is left with what was launched ahead": (
        GENERATION,
        "length = min(cache.lengths[row.number], known)",
        "length = cache.lengths[row.number]",
    ),
    "the same random number at every step": (
        "decode_step.py",
        "at += 1  # in-place",
        "pass",
    ),
    "the rows that stay have the first rows' numbers": (
        "decode_step.py",
        "gathered([state.at for state in states])",
        "states[0].at[: len(index)]",
    ),
    "a graph for every bucket": (GRAPH, "place.bucket, self._frozen", "self._frozen"),
    "a graph for every sampling": (GRAPH, "place.bucket, self._frozen", "place.bucket"),
    "graphs of other weights": (GRAPH, "or [*map(id, captures.constants)] !=", "or [] and [] !="),
    "a kept cache is not emptied": ("kept_cache.py", "cache.clear()", "pass"),
    "a loaded row's length stays on the host": (
        CACHE,
        "self.device_lengths[row] = len(ids)",
        "pass",
    ),
    "a prompt cache of other weights": ("cache_fingerprint.py", "in layer.arrays()", "in ()"),
    "a prompt cache of another embedding": (
        "cache_fingerprint.py",
        "in embedding.arrays()",
        "in ()",
    ),
    "a copy is read before it is there": ("backend.py", "copied.synchronize()", "pass"),
    "a key of Philox that does not grow": (UNIFORMS, "round_ * weyl", "weyl"),
    "every row writes row 0": (CACHE, "self.k[row, :, new] = k[b]", "self.k[0, :, new] = k[b]"),
    "NumPy override: mask ignores the past": (
        NUMPY_EQUATIONS,
        "scores[..., scores.shape[-1] - hidden.shape[1] :]",
        "scores[..., : hidden.shape[1]]",
    ),
    "NumPy override: no mask": (
        NUMPY_EQUATIONS,
        "if hidden is not None:\n        np",
        "if False:\n        np",
    ),
    "NumPy override: a kept mask for other keys": (
        NUMPY_EQUATIONS,
        "self._hidden.get((n_new, n_keys))",
        "next((h for (t, _), h in self._hidden.items() if t == n_new), None)",
    ),
    "NumPy override: no 1/sqrt(C)": (
        NUMPY_EQUATIONS,
        "few.reshape(*shape[:2], head_dim) * np.float32(1 / math.sqrt(head_dim))",
        "few.reshape(*shape[:2], head_dim)",
    ),
    "NumPy override: turned back": (
        NUMPY_EQUATIONS,
        "_SIGNS = np.array([[-1], [1]]",
        "_SIGNS = np.array([[1], [-1]]",
    ),
    "NumPy override: gate and up swapped": (
        NUMPY_BLOCKS,
        "gate, up = both[..., :n], both[..., n:]",
        "gate, up = both[..., n:], both[..., :n]",
    ),
    "NumPy override: squares left over forgotten": (
        NUMPY_EQUATIONS,
        "-(-x.shape[-1] // 64)",
        "max(1, x.shape[-1] // 64)",
    ),
    "NumPy override: a bound of top-p that is too high": (
        NUMPY_SAMPLING,
        "logits.shape[-1] / 2",
        "2",
    ),
    "NumPy override: a token's place among those left": (
        NUMPY_SAMPLING,
        "left[super().sample(x[None, left], u)[0]]",
        "super().sample(x[None, left], u)[0]",
    ),
    "float16 a power of two off": (
        WEIGHT_FORMATS,
        "x_exponent, y_exponent = 48, 64",
        "x_exponent, y_exponent = 48, 63",
    ),
    "NumPy override: sigmoid without its 1": (NUMPY_EQUATIONS, "    out += 1\n", ""),
    "NumPy override: a token's last place alone": (
        NUMPY_DERIVATIVES,
        "np.add.reduceat(rows, begins, axis=0)",
        "rows[begins]",
    ),
    "NumPy override: softmax's own derivative forgotten": (
        NUMPY_DERIVATIVES,
        "dx = dp - np.vecdot(dp, p)[..., None]",
        "dx = dp.copy()",
    ),
    "NumPy override: SiLU's derivative without its second part": (
        NUMPY_DERIVATIVES,
        "        dgate *= silu\n        dgate += s\n",
        "        dgate = s\n",
    ),
    "log p of the next token instead of minus it": (EQUATIONS, "return -chosen", "return chosen"),
    "gradient turned forward instead of back": (
        DERIVATIVES,
        "self.rope(dy, cos, -sin)",
        "self.rope(dy, cos, sin)",
    ),
    "the norm's own derivative forgotten": (
        DERIVATIVES,
        "(dn - n * (dn * n).mean(axis=-1, keepdims=True)) / r",
        "dn / r",
    ),
    "softmax's own derivative forgotten": (
        DERIVATIVES,
        "p * (dp - (dp * p).sum(axis=-1, keepdims=True))",
        "p * dp",
    ),
    "gradient without 1/sqrt(C)": (DERIVATIVES, " / math.sqrt(head_dim)", ""),
    "gradients of gate and up swapped": (
        DERIVATIVES,
        "return self.silu_backward(dy * up, gate), dy * self.silu(gate)",
        "return dy * self.silu(gate), self.silu_backward(dy * up, gate)",
    ),
    "target not taken from the softmax": (
        DERIVATIVES,
        "self.softmax(logits) - is_target",
        "self.softmax(logits)",
    ),
    "gradient stops at attention": (BLOCKS, 'return dy + dx, {"att', 'return dx, {"att'),
    "gradient stops at the feed-forward": (BLOCKS, 'return dy + dx, {"ffn', 'return dx, {"ffn'),
    "values turned back like keys": (
        BLOCKS,
        "dq, dk, dv = (a.reshape(",
        "dv = self.rope_backward(dv, positions.cos, positions.sin)\n"
        "        dq, dk, dv = (a.reshape(",
    ),
    "a tied head's gradient forgotten": (
        GRADIENTS,
        'dembedding + dhead["lm_head"]',
        "dembedding",
    ),
    "layers' gradients in the wrong order": (
        GRADIENTS,
        "layers=tuple(reversed(dlayers))",
        "layers=tuple(dlayers)",
    ),
    "NumPy override: scale forgotten": (NUMPY_EQUATIONS, "y = format_.scaled(w, y)", "pass"),
    "scale of the outputs forgotten": (WEIGHT_FORMATS, "y *= w.scale", "pass"),
    "scale of the embedding forgotten": (
        WEIGHT_FORMATS,
        "x = x * w.scale[index]",
        "x * w.scale[index]",
    ),
    "a part of a tile's rows widened": (
        TILES,
        "slice(first, last), tile",
        "slice(begin, last), tile",
    ),
    "NumPy override: the last columns forgotten": (
        CHUNKS,
        "range(0, n_columns, at_once)",
        "range(0, n_columns - at_once, at_once)",
    ),
    "NumPy override: a column computed twice": (
        CHUNKS,
        "slice(begin, min(begin + at_once, n_columns))",
        "slice(begin, min(begin + at_once + 1, n_columns))",
    ),
    "top-p drops the token that crosses p": (
        SAMPLING,
        "before <= p, falling",
        "before + falling <= p, falling",
    ),
    "top-p drops the token after a sum of p": (
        SAMPLING,
        "before <= p, falling",
        "before < p, falling",
    ),
    "NumPy override: top-p drops the token after a sum of p": (
        NUMPY_SAMPLING,
        "falling[before <= p]",
        "falling[before < p]",
    ),
    "temperature multiplies": (SAMPLING, "/ temperature", "* temperature"),
    "the last filter forgotten": (
        SAMPLING,
        "in sampling.filters():",
        "in [*sampling.filters()][:-1]:",
    ),
    "filters in the wrong order": (
        SAMPLING,
        "in sampling.filters():",
        "in [*sampling.filters()][::-1]:",
    ),
    "top-k keeps one too many": (
        SAMPLING,
        "n - k, axis=-1)[..., n - k, None]",
        "n - k - 1, axis=-1)[..., n - k - 1, None]",
    ),
    "penalty rewards negative logits": (
        SAMPLING,
        "logits / penalty, logits * penalty",
        "logits / penalty, logits / penalty",
    ),
    "sample takes a token without probability": (
        SAMPLING,
        "(cumulative > uniform[:, None] * total) & has_any",
        "(cumulative >= uniform[:, None] * total)",
    ),
}

# the tests for each file, with those that fail first at the front
SUITES = {
    EQUATIONS: ("equations", "blocks", "rope_scaling"),
    ROPE: ("rope_scaling", "equations"),
    BLOCKS: ("blocks", "derivatives", "equations", "model"),
    DERIVATIVES: ("derivatives",),
    GRADIENTS: ("gradients", "rope_scaling"),
    CACHE: ("kv_cache", "model", "blocks", "prompt_cache::test_a_row_comes_back_bit_by_bit"),
    NUMPY_EQUATIONS: ("blocks", "hidden_keys", "overrides"),
    NUMPY_BLOCKS: ("blocks", "overrides"),
    NUMPY_DERIVATIVES: ("overrides",),
    NUMPY_SAMPLING: ("sampling", "overrides"),
    TILES: ("overrides::test_with_one_thread_it_computes_the_same", "overrides"),
    CHUNKS: ("chunks", "overrides"),
    WEIGHT_FORMATS: ("equations", "overrides"),
    GENERATION: ("generation",),
    "decode_step.py": ("generation", "decode_step"),
    UNIFORMS: ("uniforms",),
    GRAPH: (
        "capture::test_a_replayed_step_says_what_numpy_says",
        "capture::test_each_way_to_sample_is_captured_once",
        "capture::test_other_weights_are_captured_anew_and_the_old_ones_freed",
    ),
    "cache_fingerprint.py": (
        "prompt_cache::test_every_matrix_of_every_layer_counts",
        "prompt_cache::test_the_embedding_counts_where_the_ids_are_and_the_head_not",
    ),
    "kept_cache.py": ("capture::test_the_kept_cache_is_emptied",),
    "backend.py": ("capture::test_copies_are_of_the_step_that_they_were_queued_behind",),
    SAMPLING: ("sampling::test_the_ends_of_the_uniforms_sample_no_excluded_token", "sampling"),
}


def arguments_for(file):
    """The arguments of pytest: test files, or file::test."""
    for name in SUITES[file]:
        suite, *test = name.split("::")
        yield "::".join([f"tests/test_{suite}.py", *test])


OPTIONS = ["-x", "-q", "--backend", "numpy", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
OPTIONS += ["-c", str(ROOT / "setup.cfg"), "--tb", "native", "-s", "-p", "no:logging"]
OPTIONS += ["--array-calls"]  # test_kernel_mistakes.py tests the kernels


class Program:
    """forked_runs.py with a copy of the package, in which one line at a time is changed."""

    def __init__(self, folder, compiled):
        self.package = folder / "npllama"
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / "npllama", self.package, ignore=ignored)
        (self.package / "assets").symlink_to(ROOT / "npllama" / "assets")
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forked_runs.py"), compiled],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )

    def run(self, tests):
        arguments = [*OPTIONS, *(str(ROOT / test) for test in tests)]
        job = {"copy": str(self.package.parent), "arguments": arguments}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    @contextmanager
    def mistaken(self, number, change):
        name, right, wrong = change
        file = self.package / name
        source, status = file.read_text(), file.stat()
        assert source.count(right) == 1, f"{name} holds {right!r} {source.count(right)} times"
        try:
            file.write_text(source.replace(right, wrong))
            # bytecode is cached by size and by modification time in whole seconds
            os.utime(file, (number, number))
            yield
        finally:
            file.write_text(source)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


class Runs:
    """Runs pytest on as many copies at a time as there are cores, each run in a forked process."""

    def __init__(self, new_folder):
        self.new_folder, self.compiled = new_folder, new_folder("compiled")
        self.programs, self.idle = [], queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def submit(self, tests, *mistake):
        """Start a run. `mistake`, if given, is a unique number and the change."""
        return self.pool.submit(self._run, tests, *mistake)

    def _run(self, tests, *mistake):
        try:
            program = self.idle.get_nowait()
        except queue.Empty:
            program = Program(self.new_folder("copy"), self.compiled)
            self.programs.append(program)
        try:
            with program.mistaken(*mistake) if mistake else nullcontext():
                return program.run(tests)
        finally:
            self.idle.put(program)

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        for program in self.programs:
            program.process.communicate()


def run_all(mistakes, new_folder):
    """The run of the suite for each mistake, and the run of what failed on an unchanged copy."""
    runs = Runs(new_folder)
    try:
        futures = {
            mistake: runs.submit(arguments_for(MISTAKES[mistake][0]), number, MISTAKES[mistake])
            for number, mistake in enumerate(mistakes, 10**9)
        }
        results = {mistake: outcome(future) for mistake, future in futures.items()}
        noticed = {test for result in results.values() for test in result["failed"]}
        unchanged = outcome(runs.submit(sorted(noticed or {"tests/test_blocks.py"})))
    finally:
        runs.close()
    return {"mistakes": results, "unchanged": unchanged}


def outcome(future):
    """The result of a run, with the end of its output; or why there was no run."""
    try:
        result = future.result()
    except AssertionError as error:  # the source does not contain the line
        return {"code": str(error), "failed": [], "output": ""}
    return result | {"output": result["output"][-4000:]}


def work_arguments(items):
    """The selected mistakes, for this file as a program. See work_ahead.py."""
    return ["mistakes", *(i.callspec.params["mistake"] for i in items if hasattr(i, "callspec"))]


@pytest.fixture(scope="module")
def results(work_ahead):
    return work_ahead.result(sys.modules[__name__])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_suite_fails_for(mistake, results):
    result = results["mistakes"][mistake]
    assert result["code"] == 1 and result["failed"], f"{result['code']}:\n{result['output']}"


def test_what_failed_passes_on_an_unchanged_copy(results):
    """This shows that the mistakes caused the failures. CI runs the whole suite on the package
    itself."""
    result = results["unchanged"]
    assert result["code"] == 0, result["output"]


if __name__ == "__main__":
    found = run_all(sys.argv[2:], lambda name: Path(tempfile.mkdtemp(prefix=name, dir=Path.cwd())))
    print(json.dumps(found))
