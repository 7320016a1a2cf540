"""The ids that the shipped model chooses on the GPU, greedy, sampled and in a batch: NumPy's?"""

import sys
from collections.abc import Sequence

from checking_gpu.models import shipped_llama
from checking_gpu.results import DIFFERS, OK
from checking_gpu.stage import Stage, main
from npllama.backend import Backend
from npllama.ops import CupyOps, NumpyOps, Ops
from npllama.sampling_options import Sampling
from npllama.weight_formats import FORMATS

PROMPTS = ("Once upon a time", "The dog", "Lily and her mother went to the beach. They")
WAYS: dict[str, tuple[Sequence[str], Sampling]] = {
    "greedy": (PROMPTS[:1], Sampling(temperature=0)),
    "sampled": (PROMPTS[:1], Sampling(temperature=0.9, top_k=50, top_p=0.95)),
    "batch": (PROMPTS, Sampling(temperature=0.8, min_p=0.02, repetition_penalty=1.1)),
}
"""Name -> prompts, and how their tokens are chosen."""


def run(stage: Stage) -> None:
    """A row for each implementation, dtype and way."""
    dtypes = ("float32", "int8") if stage.tiny else tuple(FORMATS)
    n_new = 3 if stage.tiny else 64
    gpu = stage.backend()
    truth = {}
    for name, ops in (("kernels", CupyOps(gpu)), ("reference", Ops(gpu))):
        for dtype in dtypes:
            if dtype not in truth:
                truth[dtype] = all_ids(NumpyOps(Backend()), dtype, n_new)
            stage.attempt(f"{name} {dtype}", _compare, stage, name, ops, dtype, truth[dtype], n_new)


def _compare(
    stage: Stage, name: str, ops: Ops, dtype: str, truth: dict[str, list[list[int]]], n_new: int
) -> None:
    found = all_ids(ops, dtype, n_new)
    figures = [f"{way} {_equal(found[way], truth[way])}" for way in WAYS]
    verdict = OK if found == truth else DIFFERS
    stage.add(f"{name} {dtype}", ", ".join(figures), "NumPy's ids", verdict)


def all_ids(ops: Ops, dtype: str, n_new: int) -> dict[str, list[list[int]]]:
    """The ids of each way, a list for each of its prompts."""
    llama, found = shipped_llama(ops, dtype), {}
    for way, (prompts, sampling) in WAYS.items():
        completions = llama.generate_batch(
            prompts, max_new_tokens=n_new, seed=3, sampling=sampling, ignore_eos=True
        )
        found[way] = [completion.ids for completion in completions]
    return found


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """ "64 of 64": ids before the first that differs, of all rows."""
    n = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        n += next((i for i, (a, b) in pairs if a != b), len(other))
    return f"{n} of {sum(map(len, theirs))}"


if __name__ == "__main__":
    sys.exit(main("ids", run))
