"""Checks that the shipped model chooses the same ids on the GPU as with NumPy."""

import sys
from collections.abc import Sequence

from checking_gpu.models import shipped_llama
from checking_gpu.results import DIFFERS, OK
from checking_gpu.stage import Stage, main
from comparing.operations import has_kernels
from npllama.backend import Backend
from npllama.llama import Llama
from npllama.ops import CupyOps, NumpyOps, Ops
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS

PROMPTS = ("Once upon a time", "The dog", "Lily and her mother went to the beach. They")
WAYS: dict[str, tuple[Sequence[str], Sampling]] = {
    "greedy": (PROMPTS[:1], Sampling(temperature=0)),
    "sampled": (PROMPTS[:1], Sampling(temperature=0.9, top_k=50, top_p=0.95)),
    "batch": (PROMPTS, Sampling(temperature=0.8, min_p=0.02, repetition_penalty=1.1)),
}
"""Name -> prompts, and the sampling of their tokens."""
Ids = dict[str, list[list[int]]]


def run(stage: Stage) -> None:
    """Add one row per implementation and dtype."""
    dtypes = ("float16",) if stage.tiny else tuple(FORMATS)
    n_prompts, n_new = (1, 3) if stage.tiny else (len(PROMPTS), 64)
    truth = {
        dtype: all_ids(shipped_llama(NumpyOps(Backend()), dtype), n_prompts, n_new)
        for dtype in dtypes
    }
    gpu = stage.backend()
    for name, ops in (("overrides", CupyOps(gpu)), ("reference", Ops(gpu))):
        for dtype in dtypes:
            what = f"{name} {dtype}"
            stage.attempt(what, _compare, stage, what, ops, dtype, truth[dtype], n_prompts, n_new)


def _compare(
    stage: Stage, what: str, ops: Ops, dtype: str, truth: Ids, n_prompts: int, n_new: int
) -> None:
    llama = shipped_llama(ops, dtype)
    found = all_ids(llama, n_prompts, n_new)
    figures = [f"{way} {_equal(found[way], truth[way])}" for way in WAYS]
    layer, cache = llama.parameters.layers[0], llama.new_cache().layers[0]
    by = "kernels" if has_kernels(ops, layer, cache, 1) else "array calls"
    figure = f"{', '.join(figures)}; decoded by {by}"
    stage.add(what, figure, "NumPy's ids", OK if found == truth else DIFFERS)


def all_ids(llama: Llama, n_prompts: int, n_new: int) -> Ids:
    """The ids for each entry of WAYS, one list per prompt, for its first n_prompts prompts."""
    found = {}
    for way, (prompts, sampling) in WAYS.items():
        completions = llama.generate_batch(
            prompts[:n_prompts], max_new_tokens=n_new, seed=3, sampling=sampling, ignore_eos=True
        )
        found[way] = [completion.ids for completion in completions]
    return found


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """ "64 of 64": number of ids before the first difference, summed over rows, and of all ids."""
    n = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        n += next((i for i, (a, b) in pairs if a != b), len(other))
    return f"{n} of {sum(map(len, theirs))}"


if __name__ == "__main__":
    sys.exit(main("ids", run))
