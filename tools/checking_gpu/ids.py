"""The ids that the shipped model chooses on the GPU are NumPy's: greedy, sampled, and in a batch."""

import sys
from collections.abc import Sequence

from checking_gpu.models import shipped_llama
from checking_gpu.results import DIFFERS, OK
from checking_gpu.stage import Stage, main
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
                truth[dtype] = all_ids(shipped_llama(NumpyOps(Backend()), dtype), n_new)

            def compare(name: str = name, ops: Ops = ops, dtype: str = dtype) -> None:
                found = all_ids(shipped_llama(ops, dtype), n_new)
                figures = [_equal(found[way], truth[dtype][way]) for way in WAYS]
                same = all(found[way] == truth[dtype][way] for way in WAYS)
                text = ", ".join(f"{way} {x}" for way, x in zip(WAYS, figures, strict=True))
                stage.add(f"{name} {dtype}", text, "NumPy's ids", OK if same else DIFFERS)

            stage.attempt(f"{name} {dtype}", compare)


def all_ids(llama: Llama, n_new: int) -> dict[str, list[list[int]]]:
    """The ids of each way, a list for each of its prompts."""
    found = {}
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
